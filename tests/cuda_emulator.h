// A CUDA block on the CPU: each thread is a fiber, and what threads do together waits until all of them have come.
// cuda_emulator.py puts this behind the CUDA headers and in front of the code that TVM generated.
//
// "Late" and "early" are the two ends of what asynchronous instructions may do: they take effect when they are waited
// for, or at once. In a late run the threads also take their turns in reverse order. A kernel that is right in both
// has waited for all that it reads and has overwritten nothing that was still to be read.
//
// The blocks of a cluster run at once, in turns; clusters, and blocks without one, run one after another.
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using std::max;
using std::min;

namespace emulator {

constexpr int SHARED_BYTES = 227 * 1024, STACK_BYTES = 256 * 1024, WARP = 32, WARPGROUP = 128;

struct Index {
  int x, y, z;
};

struct Gate {  // where `size` threads wait for one another
  int arrived = 0, generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes;  // what is behind the valid bytes becomes zero
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index thread;
  int number;
  bool done;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;  // of cp.async
};

struct Product {  // one wgmma of a warpgroup
  std::vector<float*> sums[WARPGROUP];
  std::vector<uint32_t> a_registers[WARPGROUP];  // empty where A is in shared memory
  uint64_t a, b;
  int type, k, accumulate, a_sign, b_sign, a_transposed, b_transposed;
};

struct Warpgroup {
  Gate gate;
  Product next;
  std::vector<Product> open_group;
  std::deque<std::vector<Product>> groups;
};

struct Mbarrier {
  int expected = 0, pending = 0, bytes = 0, phase = 0;
};

struct Block {
  Index index;
  std::vector<Fiber> fibers;
  Gate gate, named_gates[16], warp_gates[64];
  uint32_t exchange[64][WARP][8];
  Warpgroup warpgroups[16];
  std::map<uint32_t, Mbarrier> mbarriers;
  std::deque<std::function<void()>> bulk_copies;  // on their way, in a late run
  alignas(1024) uint8_t shared[SHARED_BYTES];
};

inline std::vector<std::unique_ptr<Block>> cluster;
inline Block* block;  // of the thread that runs
inline Fiber* current;
inline ucontext_t scheduler;
inline Index block_size, grid_size;
inline bool is_late;
inline long events;  // whether anything has happened since the scheduler looked last
inline std::string error;
inline Gate cluster_gate;

inline void give_way() { swapcontext(&current->context, &scheduler); }

inline void fail(const std::string& message) {
  if (error.empty()) error = message;
  for (;;) give_way();  // the scheduler ends
}

inline void on_fault(int) { fail("memory: an access outside of the arguments"); }  // of the thread that runs

template <class Last>
void meet(Gate& gate, int size, Last last) {  // the one who comes last does last()
  int generation = gate.generation;
  events++;
  if (++gate.arrived == size) {
    last();
    gate.arrived = 0;
    gate.generation++;
  } else {
    while (gate.generation == generation) give_way();
  }
}

inline void meet(Gate& gate, int size) {
  meet(gate, size, [] {});
}

inline int warp() { return current->number / WARP; }
inline int lane() { return current->number % WARP; }
inline int block_threads() { return block_size.x * block_size.y * block_size.z; }
inline void meet_warp() { meet(block->warp_gates[warp()], WARP); }
inline void meet_block() { meet(block->gate, block_threads()); }
inline void meet_named(int name, int size) { meet(block->named_gates[name], size); }

inline void* at(uint64_t address, int bytes) {
  if (address % std::min(bytes, 16) || address + bytes > SHARED_BYTES)
    fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address));
  return block->shared + address;
}

inline uint32_t shared_address(const void* pointer) { return (const uint8_t*)pointer - block->shared; }

// ---- Numbers in registers

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

template <int BYTES, class T>
void store(void* to, T value) {  // as many bytes of a register, or of a literal
  static_assert(sizeof(T) >= BYTES || std::is_integral_v<T>);
  if constexpr (sizeof(T) >= BYTES) {
    memcpy(to, &value, BYTES);
  } else {
    int64_t wide = value;
    memcpy(to, &wide, BYTES);
  }
}

enum Type { F16, BF16, TF32 };

inline float number(int type, uint32_t raw) {
  if (type == F16) return (float)bits<_Float16>((uint16_t)raw);
  return bits<float>(type == BF16 ? raw << 16 : raw & 0xffffe000u);  // tensor cores do not see tf32's last 13 bits
}

inline uint32_t to_tf32(float value) {  // cvt.rna: to the nearest, ties away from zero
  uint32_t raw = bits<uint32_t>(value);
  return std::isfinite(value) ? (raw + 0x1000u) & 0xffffe000u : raw;
}

// ---- cp.async

inline void copy(const Copy& c) {
  memcpy(c.to, c.from, c.valid_bytes);
  memset((char*)c.to + c.valid_bytes, 0, c.bytes - c.valid_bytes);
}

inline void cp_async(uint32_t to, uint64_t from, int bytes, int valid_bytes) {
  if (from % bytes) fail("cp.async from an address that is no multiple of its size");
  Copy c{at(to, bytes), (const void*)from, bytes, valid_bytes};
  if (is_late)
    current->open_group.push_back(c);
  else
    copy(c);
}

inline void cp_async_commit() {
  current->groups.push_back(std::move(current->open_group));
  current->open_group.clear();
}

inline void cp_async_wait(size_t groups) {
  for (; current->groups.size() > groups; current->groups.pop_front())
    for (const Copy& c : current->groups.front()) copy(c);
}

// ---- What a warp does together

inline void ldmatrix(bool transposed, uint32_t address, std::vector<uint32_t*> registers) {
  block->exchange[warp()][lane()][0] = address;
  meet_warp();
  for (size_t i = 0; i < registers.size(); i++) {
    uint16_t pair[2];
    for (int e = 0; e < 2; e++) {
      int row = lane() / 4, column = lane() % 4 * 2 + e;
      if (transposed) std::swap(row, column);
      pair[e] = ((uint16_t*)at(block->exchange[warp()][i * 8 + row][0], 16))[column];
    }
    memcpy(registers[i], pair, 4);
  }
  meet_warp();
}

inline void stmatrix(bool transposed, uint32_t address, std::vector<uint32_t> registers) {
  block->exchange[warp()][lane()][0] = address;
  meet_warp();
  for (size_t i = 0; i < registers.size(); i++) {
    for (int e = 0; e < 2; e++) {
      int row = lane() / 4, column = lane() % 4 * 2 + e;
      if (transposed) std::swap(row, column);
      ((uint16_t*)at(block->exchange[warp()][i * 8 + row][0], 16))[column] = registers[i] >> (16 * e);
    }
  }
  meet_warp();
}

// mma.sync m16n8kK (PTX ISA, "Warp-level matrix instructions"): per_register elements of A and B in a register.
inline void mma(int type, int k_extent, std::vector<float*> d, std::vector<uint32_t> a, std::vector<uint32_t> b,
                std::vector<float> c) {
  auto& registers = block->exchange[warp()];
  std::copy(a.begin(), a.end(), registers[lane()]);
  std::copy(b.begin(), b.end(), registers[lane()] + 4);
  meet_warp();
  int per_register = type == TF32 ? 1 : 2, half_k = 4 * per_register;
  auto element = [&](int row, int k, int first, int rows_above) {
    uint32_t raw = registers[row % 8 * 4 + k % half_k / per_register][first + rows_above + k / half_k * (first ? 1 : 2)];
    return number(type, per_register == 1 ? raw : (raw >> (16 * (k % 2))) & 0xffff);
  };
  for (int i = 0; i < 4; i++) {
    int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < k_extent; k++) sum += element(row, k, 0, row / 8) * element(column, k, 4, 0);
    *d[i] = sum;
  }
  meet_warp();
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8);
  memcpy(block->exchange[warp()][lane()], &value, sizeof(T));
  meet_warp();
  T result;
  memcpy(&result, block->exchange[warp()][source], sizeof(T));
  meet_warp();
  return result;
}

inline uint32_t ballot(bool predicate) {
  block->exchange[warp()][lane()][0] = predicate;
  meet_warp();
  uint32_t result = 0;
  for (int i = 0; i < WARP; i++) result |= block->exchange[warp()][i][0] << i;
  meet_warp();
  return result;
}

// ---- wgmma: asynchronous products of a warpgroup

// The element (row, k) of an operand in shared memory, by its matrix descriptor (PTX ISA, "Matrix descriptor").
inline float operand(uint64_t descriptor, int row, int k, bool transposed, int type) {
  uint32_t address = (descriptor & 0x3fff) << 4, element_bytes = type == TF32 ? 4 : 2;
  uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  int layout = descriptor >> 62;  // 0: not swizzled; 1, 2, 3: rows of 128, 64, 32 bytes are
  uint32_t row_bytes = layout ? 256u >> layout : 16, row_elements = row_bytes / element_bytes;
  if (!transposed) {  // rows of k
    if (layout && k * element_bytes >= row_bytes) fail("wgmma: k is longer than a swizzled row");
    address += row / 8 * stride + row % 8 * row_bytes + k % row_elements * element_bytes + k / row_elements * leading;
  } else {
    if (!layout) fail("wgmma: a transposed operand that is not swizzled");
    address += row / row_elements * leading + row % row_elements * element_bytes + k / 8 * stride + k % 8 * row_bytes;
  }
  if (layout) address ^= (address >> 7 & ((8u >> (layout - 1)) - 1)) << 4;
  uint32_t raw = 0;
  memcpy(&raw, at(address, element_bytes), element_bytes);
  return number(type, raw);
}

inline void multiply(Product& p) {
  int columns = p.sums[0].size() * 2, per_register = p.type == TF32 ? 1 : 2;
  std::vector<float> a(64 * p.k), b(columns * p.k);
  for (int row = 0; row < 64; row++) {
    for (int k = 0; k < p.k; k++) {
      if (p.a_registers[0].empty()) {
        a[row * p.k + k] = operand(p.a, row, k, p.a_transposed, p.type) * p.a_sign;
      } else {
        int thread = row / 16 * WARP + row % 8 * 4 + k % (4 * per_register) / per_register;
        uint32_t raw = p.a_registers[thread][row % 16 / 8 + k / (4 * per_register) * 2];
        a[row * p.k + k] = number(p.type, per_register == 1 ? raw : (raw >> (16 * (k % 2))) & 0xffff) * p.a_sign;
      }
    }
  }
  for (int column = 0; column < columns; column++)
    for (int k = 0; k < p.k; k++)
      b[column * p.k + k] = operand(p.b, column, k, p.b_transposed, p.type) * p.b_sign;
  for (int thread = 0; thread < WARPGROUP; thread++) {
    for (size_t i = 0; i < p.sums[thread].size(); i++) {
      int row = thread / WARP * 16 + thread % WARP / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = p.accumulate ? *p.sums[thread][i] : 0;
      for (int k = 0; k < p.k; k++) sum += a[row * p.k + k] * b[column * p.k + k];
      *p.sums[thread][i] = sum;
    }
  }
}

inline Warpgroup& warpgroup() { return block->warpgroups[current->number / WARPGROUP]; }

inline void wgmma(int type, int k, std::vector<float*> sums, std::vector<uint32_t> a_registers, uint64_t a, uint64_t b,
                  int accumulate, int a_sign, int b_sign, int a_transposed, int b_transposed) {
  Warpgroup& group = warpgroup();
  group.next.sums[current->number % WARPGROUP] = sums;
  group.next.a_registers[current->number % WARPGROUP] = a_registers;
  meet(group.gate, WARPGROUP, [&] {
    Product& p = group.next;
    p.a = a, p.b = b, p.type = type, p.k = k, p.accumulate = accumulate, p.a_sign = a_sign, p.b_sign = b_sign;
    p.a_transposed = a_transposed, p.b_transposed = b_transposed;
    if (is_late)
      group.open_group.push_back(p);
    else
      multiply(p);
  });
}

inline void wgmma_commit() {
  Warpgroup& group = warpgroup();
  meet(group.gate, WARPGROUP, [&] {
    group.groups.push_back(std::move(group.open_group));
    group.open_group.clear();
  });
}

inline void wgmma_wait(size_t groups) {
  Warpgroup& group = warpgroup();
  meet(group.gate, WARPGROUP, [&] {
    for (; group.groups.size() > groups; group.groups.pop_front())
      for (Product& p : group.groups.front()) multiply(p);
  });
}

// ---- mbarriers, and copies in bulk that report to them

inline Mbarrier& mbarrier(uint32_t address) {
  if (!block->mbarriers.count(address)) fail("an mbarrier that was not initialised");
  return block->mbarriers[address];
}

inline void mbarrier_init(uint32_t address, int count) {
  at(address, 8);
  block->mbarriers[address] = {count, count, 0, 0};
}

inline void settle(Mbarrier& barrier) {
  events++;
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.expected;
}

inline void mbarrier_arrive(uint32_t address, int expected_bytes = 0) {
  Mbarrier& barrier = mbarrier(address);
  barrier.bytes += expected_bytes;
  if (--barrier.pending < 0) fail("an mbarrier that more threads arrive at than it was initialised for");
  settle(barrier);
}

inline void mbarrier_expect(uint32_t address, int bytes) { mbarrier(address).bytes += bytes; }

inline bool mbarrier_try_wait(uint32_t address, int parity) {
  if (mbarrier(address).phase != parity) return true;
  give_way();
  return mbarrier(address).phase != parity;
}

inline void bulk_copy(uint32_t mbarrier_address, int bytes, std::function<void()> act) {
  auto whole = [=] {
    act();
    mbarrier(mbarrier_address).bytes -= bytes;
    settle(mbarrier(mbarrier_address));
  };
  if (is_late)
    block->bulk_copies.push_back(whole);
  else
    whole();
}

inline void cp_async_bulk(uint32_t to, uint64_t from, int bytes, uint32_t mbarrier_address) {
  if (from % 16 || to % 16 || bytes % 16) fail("cp.async.bulk: no multiple of 16 bytes");
  void* destination = at(to, 16);
  bulk_copy(mbarrier_address, bytes, [=] { memcpy(destination, (const void*)from, bytes); });
}

struct TensorMap {  // what stands for a CUtensorMap; sizes of dimensions, the innermost first
  uint8_t* data;
  int element_bytes, rank, swizzle_bytes, unused;
  int64_t strides[5];  // in bytes
  int sizes[5], box[5];
  uint8_t steps[5];  // of a box, from one element that is copied to the next
};
static_assert(sizeof(TensorMap) <= 128);

inline void cp_async_tensor(uint32_t to, uint64_t map_address, std::vector<int> start, uint32_t mbarrier_address) {
  TensorMap map = *(const TensorMap*)map_address;
  int elements = 1, counts[5];
  for (int d = 0; d < map.rank; d++) {
    counts[d] = (map.box[d] + map.steps[d] - 1) / map.steps[d];
    if (map.box[d] > 256) fail("a box of more than 256 elements along a dimension");
    elements *= counts[d];
  }
  if (to % 128) fail("a tensor's copy to an address that is no multiple of 128");
  bulk_copy(mbarrier_address, elements * map.element_bytes, [=] {
    for (int i = 0; i < elements; i++) {
      bool inside = true;
      int64_t offset = 0;
      for (int d = 0, rest = i; d < map.rank; rest /= counts[d++]) {
        int64_t coordinate = start[d] + rest % counts[d] * map.steps[d];
        inside = inside && coordinate >= 0 && coordinate < map.sizes[d];
        offset += coordinate * map.strides[d];
      }
      uint32_t address = to + i * map.element_bytes;
      if (map.swizzle_bytes) address ^= (address >> 7 & (map.swizzle_bytes / 16 - 1)) << 4;
      uint8_t* element = (uint8_t*)at(address, map.element_bytes);
      if (inside)
        memcpy(element, map.data + offset, map.element_bytes);
      else
        memset(element, 0, map.element_bytes);
    }
  });
}

// ---- Clusters

inline int alive_in_cluster() {
  int alive = 0;
  for (auto& each : cluster)
    for (Fiber& fiber : each->fibers) alive += !fiber.done;
  return alive;
}

inline void meet_cluster() {  // those that have ended need not come
  int generation = cluster_gate.generation;
  events++, cluster_gate.arrived++;
  while (cluster_gate.generation == generation) {
    if (cluster_gate.arrived == alive_in_cluster())
      events++, cluster_gate.arrived = 0, cluster_gate.generation++;
    else
      give_way();
  }
}

inline Index index_in_cluster() { return {0, 0, block->index.z % (int)cluster.size()}; }

constexpr int RANK_SHIFT = 24;  // of a block's number in an address that others of its cluster use

inline uint32_t map_to_block(uint32_t address, int rank) { return address | (uint32_t)rank << RANK_SHIFT; }

inline void* at_any_block(uint32_t address, int bytes) {
  if (address >> RANK_SHIFT >= cluster.size()) fail("a block that the cluster does not have");
  Block* here = block;
  block = cluster[address >> RANK_SHIFT].get();
  if (std::all_of(block->fibers.begin(), block->fibers.end(), [](Fiber& fiber) { return fiber.done; }))
    fail("shared memory of a block that has ended");
  void* place = at(address & ((1u << RANK_SHIFT) - 1), bytes);
  block = here;
  return place;
}

// ---- A launch

template <class P>
P argument(void* value) {
  if constexpr (std::is_pointer_v<P>)
    return (P)value;
  else if constexpr (std::is_integral_v<P>)
    return (P)(intptr_t)value;
  else
    return *(P*)value;
}

inline std::function<void()> call;

inline void enter() {
  call();
  block->fibers[current->number].done = true;
  events++;
  for (;;) give_way();
}

template <class... P, size_t... I>
void bind_arguments(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  call = [=] { kernel(argument<P>(arguments[I])...); };
}

inline void begin_block(Block& begun, Index index) {
  begun.index = index;
  memset(begun.shared, 0xff, SHARED_BYTES);
  begun.mbarriers.clear();
  begun.gate = Gate();
  std::fill(std::begin(begun.named_gates), std::end(begun.named_gates), Gate());
  std::fill(std::begin(begun.warp_gates), std::end(begun.warp_gates), Gate());
  for (Warpgroup& group : begun.warpgroups) group = Warpgroup();
  begun.fibers.resize(block_threads());
  for (int i = 0; i < block_threads(); i++) {
    Fiber& fiber = begun.fibers[i];
    fiber.stack.resize(STACK_BYTES);
    fiber.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    fiber.number = i, fiber.done = false;
    fiber.open_group.clear(), fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, enter, 0);
  }
}

inline bool give_turns() {  // to each thread of the block; whether one is not done yet
  bool alive = false;
  int threads = block_threads();
  for (int i = 0; i < threads && error.empty(); i++) {
    current = &block->fibers[is_late ? threads - 1 - i : i];
    if (current->done) continue;
    alive = true;
    swapcontext(&scheduler, &current->context);
  }
  return alive;
}

inline bool end_a_copy() {  // in the first block that has one on its way; whether there was one
  for (auto& each : cluster)
    if (!each->bulk_copies.empty()) {
      block = each.get();
      auto copy_one = block->bulk_copies.front();
      block->bulk_copies.pop_front();
      copy_one();
      return true;
    }
  return false;
}

inline void run_cluster() {
  for (bool alive = true; alive && error.empty();) {
    long before = events;
    alive = false;
    for (auto& each : cluster) {
      block = each.get();
      alive |= give_turns();
    }
    if (alive && events == before && error.empty() && !end_a_copy()) error = "the threads wait for one another for ever";
  }
  for (auto& each : cluster) {
    if (!each->bulk_copies.empty() && error.empty()) error = "a block ended before its copies";
    each->bulk_copies.clear();
  }
}

// Returns what went wrong, "" where nothing did. depth: of a cluster, which is as wide and as high as a block.
template <class... P>
const char* launch(void (*kernel)(P...), void** arguments, const int* grid, const int* block, int depth, bool late) {
  bind_arguments(kernel, arguments, std::index_sequence_for<P...>());
  grid_size = {grid[0], grid[1], grid[2]}, block_size = {block[0], block[1], block[2]}, is_late = late;
  error.clear();
  struct sigaction fault = {}, before;
  fault.sa_handler = on_fault;
  sigaction(SIGSEGV, &fault, &before);
  while ((int)cluster.size() < depth) cluster.push_back(std::make_unique<Block>());
  cluster.resize(depth);
  for (int z = 0; z < grid[2]; z += depth)
    for (int y = 0; y < grid[1]; y++)
      for (int x = 0; x < grid[0] && error.empty(); x++) {
        cluster_gate = Gate();
        for (int i = 0; i < depth; i++) begin_block(*cluster[i], {x, y, z + i});
        run_cluster();
      }
  sigaction(SIGSEGV, &before, nullptr);
  return error.c_str();
}

}  // namespace emulator

// ---- CUDA's names

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define cluster_ctaid (emulator::index_in_cluster())
#define __shared__ static  // there are no clusters with it, and blocks run one after another
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline
#define __expf expf
#define __logf logf

inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp(unsigned = ~0u) { emulator::meet_warp(); }
inline unsigned __activemask() { return ~0u; }
inline uint32_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  int lane = emulator::lane();
  return emulator::shuffle(value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  return emulator::shuffle(value, emulator::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
  int lane = emulator::lane();
  return emulator::shuffle(value, lane % width + delta < width ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta, int width = 32) {
  int lane = emulator::lane();
  return emulator::shuffle(value, lane % width >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) { return emulator::ballot(predicate); }
inline int __all_sync(unsigned, int predicate) { return emulator::ballot(predicate) == ~0u; }
inline int __any_sync(unsigned, int predicate) { return emulator::ballot(predicate) != 0; }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline half hexp(half x) { return __float2half(expf(__half2float(x))); }
inline half hlog(half x) { return __float2half(logf(__half2float(x))); }
inline half hsqrt(half x) { return __float2half(sqrtf(__half2float(x))); }
inline half hrsqrt(half x) { return __float2half(1 / sqrtf(__half2float(x))); }
inline half htanh(half x) { return __float2half(tanhf(__half2float(x))); }
inline half herf(half x) { return __float2half(erff(__half2float(x))); }

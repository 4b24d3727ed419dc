"""Runs generated CUDA on the CPU, tensor cores and asynchronous copies included: kernels are checked without a GPU.

TVM generates the CUDA C++ of a scheduled module. Its inline PTX is rewritten as calls of what cuda_emulator.h defines,
and g++ compiles the rest against NVIDIA's own headers. A kernel of a small shape takes a few seconds.
"""

import ctypes
import dataclasses
import functools
import hashlib
import mmap
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from ptx_to_cpp import translate_assembly

HEADER, HEADERS, LIBC = Path(__file__).with_suffix(".h"), "headers.h", ctypes.CDLL(None)
PAGE_BYTES, ALIGNMENT = mmap.PAGESIZE, 16  # what a kernel may count on is ALIGNMENT: it loads so many bytes at once


def emulate(module, target, arguments, pipeline=None):
    """Runs a scheduled module's "main" for CUDA on the CPU twice, with asynchronous instructions late and early.

    module: IRModule of one PrimFunc. arguments: CPU tensors in the order of its parameters. They are left as they are;
    returns their values after each of the two runs, as two lists of tensors. pipeline: the name of one of TVM's for
    TIR, its default one if None. Raises RuntimeError for a kernel that hangs, or accesses memory where it must not.
    """
    return run(*generate(module, target, pipeline), arguments)


def run(source, launches, buffers, arguments):
    """Returns what emulate() does, of CUDA C++: `launches` one after another, with generate()'s `buffers`."""
    library = compile_source(source, tuple(dict.fromkeys(launch.kernel for launch in launches)))
    results = []
    for is_late in (True, False):
        values = [tensor.clone() for tensor in arguments]
        held = []  # what pointers point to
        memories = [Memory(as_bytes(tensor)) for tensor in values]
        memories += [Memory(np.full(size, 0xFF, np.uint8)) for size in buffers]
        for launch in launches:
            pointers = []
            for kind, value in launch.arguments:
                if kind == "map":
                    held.append(value.encode(memories[value.buffer].address))
                    pointers.append(ctypes.addressof(held[-1]))
                else:
                    pointers.append(memories[value].address if kind == "buffer" else value)
            message = getattr(library, f"launch_{launch.kernel}")(
                (ctypes.c_void_p * len(pointers))(*pointers),
                (ctypes.c_int * 3)(*launch.grid),
                (ctypes.c_int * 3)(*launch.block),
                launch.cluster_depth,
                is_late,
            )
            if message:
                raise RuntimeError(f"{launch.kernel}: {message.decode()}")
        for tensor, memory in zip(values, memories):
            tensor.copy_(torch.from_numpy(memory.read()).view(tensor.dtype).view(tensor.shape))
        results.append(values)
    return results


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


class Memory:
    """Bytes at an address between two pages that cannot be accessed, and next to the second.

    What lies between them and those pages are bytes of NaN, which read() raises RuntimeError for if they have changed.
    """

    def __init__(self, values):
        inside = -(-values.size // PAGE_BYTES) * PAGE_BYTES
        self.mapping = mmap.mmap(-1, inside + 2 * PAGE_BYTES)
        whole = np.frombuffer(self.mapping, np.uint8)
        for page in (0, PAGE_BYTES + inside):
            if LIBC.mprotect(ctypes.c_void_p(whole.ctypes.data + page), ctypes.c_size_t(PAGE_BYTES), 0):
                raise OSError("mprotect")
        self.bytes, self.size = whole[PAGE_BYTES:-PAGE_BYTES], values.size
        self.start = (inside - values.size) // ALIGNMENT * ALIGNMENT
        self.bytes[:] = 0xFF
        self.bytes[self.start : self.start + self.size] = values
        self.address = self.bytes.ctypes.data + self.start

    def read(self):
        end = self.start + self.size
        if not (self.bytes[: self.start] == 0xFF).all() or not (self.bytes[end:] == 0xFF).all():
            raise RuntimeError("written out of bounds")
        return self.bytes[self.start : end].copy()


# ---- What TVM generates ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Launch:
    """One launch of a kernel by the host's code."""

    kernel: str
    # ("buffer", number) of an argument of main or, after those, of its own buffers; ("map", TensorMap); ("value", int)
    arguments: list
    grid: list
    block: list
    cluster_depth: int = 1  # blocks along z that run at once


@dataclasses.dataclass
class TensorMap:
    """What the host encodes as a CUtensorMap for copies of tiles (TMA), the innermost dimension first."""

    buffer: int  # number, as in a Launch
    element_bytes: int
    sizes: list
    strides_bytes: list  # of all dimensions but the innermost
    box: list
    steps: list  # of the box, from one element that is copied to the next
    swizzle_bytes: int

    def encode(self, address):
        """Returns the emulator's TensorMap, in 128 bytes, for a buffer at an address."""
        rank = len(self.sizes)
        pad = [0] * (5 - rank)
        strides = [self.element_bytes, *self.strides_bytes]
        fields = (address, self.element_bytes, rank, self.swizzle_bytes, 0)
        lists = (strides, self.sizes, self.box, self.steps)
        packed = struct.pack("<Qiiii5q10i5B", *fields, *(value for each in lists for value in (*each, *pad)))
        return (ctypes.c_char * 128)(*packed.ljust(128, b"\0"))


def generate(module, target, pipeline=None):
    """Returns (CUDA C++ source, list of Launches, sizes in bytes of the buffers that main allocates)."""
    import tvm

    @tvm.instrument.pass_instrument
    class KeepHost:
        """Keeps the module as it is when the host's code has been separated from the kernels."""

        def run_before_pass(self, module, info):
            if info.name.endswith("MakePackedAPI"):
                self.module = module

    kept = KeepHost()
    with target, tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}, instruments=[kept]):
        built = tvm.tirx.build(module, target=target, pipeline=pipeline)
    sources = [imported.inspect_source("cuda") for imported in built.imports]
    launches, buffers = read_host(kept.module["main"])
    return "\n".join(sources), launches, buffers


def read_host(main):
    """Returns the (Launches, sizes in bytes of main's own buffers) of the host's function."""
    numbers = {parameter: i for i, parameter in enumerate(main.params)}
    launches, buffers = [], []

    def visit(statement):
        kind = type(statement).__name__
        if kind == "SeqStmt":
            for child in statement.seq:
                visit(child)
        elif kind == "Evaluate" and "tensormap_encode_tiled" in str(getattr(statement.value, "op", "")):
            variable, *_ = statement.value.args
            numbers[variable] = read_tensor_map(statement.value, numbers)
        elif kind == "DeclBuffer":
            numbers[statement.buffer] = numbers[statement.data.args[0]]
        elif kind == "AllocBuffer":
            buffer = statement.buffer
            numbers[buffer] = len(main.params) + len(buffers)
            elements = int(np.prod([int(size) for size in buffer.shape]))
            buffers.append(elements * getattr(torch, str(buffer.dtype)).itemsize)
        elif kind == "Evaluate" and "call_ffi_kernel" in str(getattr(statement.value, "op", "")):
            launches.append(read_launch(statement.value, numbers))
        if hasattr(statement, "body"):
            visit(statement.body)

    visit(main.body)
    return launches, buffers


def read_launch(call, numbers):
    """Returns the Launch that a host's call of a kernel makes; numbers: of the buffers."""
    tags = [str(tag) for tag in call.attrs["launch_params"]]
    name, *operands = call.args
    operands, sizes = operands[: -len(tags)], dict(zip(tags, map(int, operands[-len(tags) :])))
    return Launch(
        kernel=str(getattr(name, "value", name)),
        arguments=[
            ("buffer", numbers[operand.args[0]])
            if hasattr(operand, "args")
            else ("map", numbers[operand])
            if operand in numbers
            else ("value", int(operand))
            for operand in operands
        ],
        grid=[sizes.get(f"blockIdx.{axis}", 1) for axis in "xyz"],
        block=[sizes.get(f"threadIdx.{axis}", 1) for axis in "xyz"],
        cluster_depth=sizes.get("clusterCtaIdx.z", 1),
    )


def read_tensor_map(call, numbers):
    """Returns the TensorMap that a host's call of tensormap_encode_tiled() makes."""
    _, data, *rest = call.args
    rank = int(call.attrs["rank"])
    rest = list(map(int, rest))
    return TensorMap(
        buffer=numbers[data.args[0]],
        element_bytes=getattr(torch, str(call.attrs["descriptor_dtype"])).itemsize,
        sizes=rest[:rank],
        strides_bytes=rest[rank : 2 * rank - 1],
        box=rest[2 * rank - 1 : 3 * rank - 1],
        steps=rest[3 * rank - 1 : 4 * rank - 1],
        swizzle_bytes={0: 0, 1: 32, 2: 64, 3: 128}[int(call.attrs["swizzle"])],
    )


# ---- From CUDA C++ to a library for the CPU -------------------------------------------------------------------------


OPTIONS = ["-O1", "-w", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern"]


@functools.cache
def compile_source(source, kernels):
    """Returns the ctypes library of generated CUDA C++, with launch_NAME for each of the kernels."""
    launchers = "".join(
        f'extern "C" const char* launch_{name}'
        "(void** arguments, const int* grid, const int* block, int depth, int late)\n"
        f"{{ return emulator::launch({name}, arguments, grid, block, depth, late); }}\n"
        for name in kernels
    )
    dynamic = r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];"
    translated = re.sub(dynamic, r"\1* \2 = (\1*)emulator::block->shared;", source)
    translated = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", translated)  # the order that g++ wants
    text = f"{translate_assembly(translated)}\n{launchers}"
    directory = Path(directory_with_headers().name)
    file = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    file.write_text(text)
    compile_with_gcc("-shared", "-include", directory / HEADERS, "-o", file.with_suffix(".so"), file)
    library = ctypes.CDLL(str(file.with_suffix(".so")))
    for kernel in kernels:
        getattr(library, f"launch_{kernel}").restype = ctypes.c_char_p
    return library


@functools.cache
def directory_with_headers():
    """Returns the TemporaryDirectory of this process, with what each kernel includes: compiled once, for it is long."""
    directory = tempfile.TemporaryDirectory(prefix="cuda_emulator_")
    headers = Path(directory.name) / HEADERS
    names = ("<cuda_fp16.h>", "<cuda_bf16.h>", "<cuda.h>", f'"{HEADER}"')
    headers.write_text("".join(f"#include {name}\n" for name in names))
    compile_with_gcc("-x", "c++-header", "-o", f"{headers}.gch", headers)
    return directory


def compile_with_gcc(*arguments):
    include = Path(os.environ["CUDA_PATH"]) / "include"  # import_tvm() sets it where CUDA comes from pip alone
    done = subprocess.run(["g++", *OPTIONS, f"-I{include}", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ {arguments[-1]}: {done.stderr[:3000]}")

"""TVM's tuner; apart from benchmark.py because its processes fork from one that has computed nothing.

That one has imported TVM, and has no thread and no CUDA context. The file reads in the order of the data: the model's
graph -> its tasks -> candidates for a task -> building and measuring one -> worker processes -> the database -> the
loop over all of it. What benchmark.py calls: simplify(), prepare(), extract_tasks(), tune(), apply_database().

MetaSchedule (Shao et al., arXiv:2205.13603) gives the design spaces, the rules that make a sampled schedule whole, the
features and the cost model. Its own loop is replaced: its builder starts its processes anew for every batch, it waits
for the slowest of a batch, loses what it measured in its first round through the tasks when it is stopped, and its
sampler throws away 19 of 20 samples of a convolution for CUDA after 30 ms of work on each. And its design spaces for
CUDA lack what a network at batch 1 needs most: sums that are split between blocks of threads.
"""

import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import statistics
import time
import typing
import zlib

import numpy as np
import torch

ROUND = 16  # candidates of a task that are measured between two searches
POPULATION = 48  # valid candidates that the cost model ranks for them
PARENTS = 8  # best candidates of a design space so far, that new ones are mutated from
EXPLORED, PATIENCE = 4, 8  # a design space is given up after EXPLORED candidates or more: find_open_spaces()
RANDOM_SHARE = 0.25  # of the population: not mutated from anything
GREEDY = 0.9  # of a round: the cost model's favourites; the rest is drawn from the population at random
BUILD_TIMEOUT_S, MEASURE_TIMEOUT_S, SEARCH_TIMEOUT_S = 30.0, 20.0, 180.0
REPEATS, MIN_REPEAT_S = 3, 3e-3  # a measurement is the median of so many repeats, each at least so long
HOPELESS = 4  # a candidate that is so many times slower than the best of its task is not measured again
SEARCH_BUILDS = 4  # candidates that a worker builds in the time of a search, until both have been timed
REPORT_S = 0.5
JOBS_PER_WORKER = 200  # then it is replaced by a fresh fork: TVM and NVRTC leak
# Of a CUDA block (CUDA C++ Programming Guide, compute capabilities); virtual threads are MetaSchedule's.
WARP, MAX_THREADS, STATIC_SHARED_BYTES, MAX_VTHREADS = 32, 1024, 48 * 1024, 8
DRAWS = 10_000  # of random decisions, until some fit
# Of find_rewrites(). An H200 has 132 multiprocessors of 2048 threads: 2^20 sums are 4 for each thread.
SPLITS, SPLIT_SUM, SPLIT_OUTPUTS = (16, 8, 4, 2), 64, 2**20


class DatabaseError(Exception):
    """A tuning database that cannot be used, in one line."""


class WrongOutput(Exception):
    """A candidate computes something else than TVM's default schedule does."""


# ---- The graph ------------------------------------------------------------------------------------------------------


def simplify(exported):
    """Rewrite a decomposed ExportedProgram in place so that there is less to run and more to fuse.

    BatchNorm goes into the weights of the convolution before it, and pointwise operators behind matrix products.
    """
    aten, graph, signature = torch.ops.aten, exported.graph, exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stores = (exported.state_dict, exported.constants)

    def store_of(node):
        return next(store for store in stores if names[node.name] in store)

    def read(node):
        return store_of(node)[names[node.name]].double()

    def write(node, value):
        store, name = store_of(node), names[node.name]
        value = value.to(store[name].dtype)
        store[name] = torch.nn.Parameter(value, requires_grad=False) if name in signature.parameters else value

    for norm in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        convolution, gamma, beta, mean, variance, _, epsilon = norm.args
        if convolution.target != aten.convolution.default or convolution.args[6]:  # a transposed one
            continue
        weight, bias = convolution.args[1:3]
        constants = [weight, gamma, beta, *([] if bias is None else [bias])]
        if any(node is None or node.name not in names or len(node.users) != 1 for node in constants):
            continue
        if len(convolution.users) != 1:
            continue
        scale = read(gamma) / (read(variance) + epsilon).sqrt()
        write(beta, ((read(bias) if bias is not None else 0) - read(mean)) * scale + read(beta))
        write(weight, read(weight) * scale.reshape(-1, *[1] * (weight.meta["val"].ndim - 1)))
        convolution.args = (convolution.args[0], weight, beta, *convolution.args[3:])  # beta holds the bias now
        for output in list(norm.users):  # the other two are for training
            if output.args[1] == 0:
                output.replace_all_uses_with(convolution)
            graph.erase_node(output)
        graph.erase_node(norm)

    for clone in graph.find_nodes(op="call_function", target=aten.clone.default):
        if not clone.kwargs:  # not for another order in memory: dropout, which does nothing at inference
            clone.replace_all_uses_with(clone.args[0])
            graph.erase_node(clone)
    move_behind_products(graph)
    views = graph.find_nodes(op="call_function", target=aten.view.default)
    for node in views:
        source = node.args[0]
        if source in views:
            node.replace_input_with(source, source.args[0])
            source = source.args[0]
        if source.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(source)
        node.target = aten.reshape.default  # what it reads may have another order in memory now
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def move_behind_products(graph):
    """Move pointwise operators in front of the view or permutation that stands between them and a matrix product.

    A Linear layer's product has the shape (tokens, features). Bias, activation, layer scale and residual then fuse with
    it. What else they read is brought into the product's form, where that costs nothing.
    """
    aten = torch.ops.aten
    view, permute = aten.view.default, aten.permute.default
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
    behind = {node for product in products for node in graph.find_nodes(op="call_function", target=product)}

    def form(node):
        return node.meta["val"].shape

    def bring_back(other, moved):
        """-> `other` in the form that `moved` had before it, None where that would cost something."""
        source, given = moved.args
        if other.meta["val"].numel() == 1:
            return other
        if moved.target == view and form(other) == form(source)[-1:] == form(moved)[-1:]:
            return other
        if form(other) != form(moved):
            return None
        if other.target == moved.target and form(other.args[0]) == form(source) and other.args[1] == given:
            return other.args[0]
        if moved.target == view and other.meta["val"].is_contiguous():
            arguments, value = list(form(source)), other.meta["val"].view(form(source))
        elif moved.target == permute and other.target == aten.convolution.default:  # channels-last soon, as `source` is
            arguments = [given.index(axis) for axis in range(len(given))]
            value = other.meta["val"].permute(arguments).contiguous()
        else:
            return None
        with graph.inserting_after(other):
            brought = graph.call_function(moved.target, (other, arguments))
        brought.meta["val"] = value
        return brought

    def move(node):
        """-> whether `node` was moved in front of one of its operands."""
        for moved in node.all_input_nodes:
            if moved.target not in (view, permute) or len(moved.users) != 1 or moved.args[0] not in behind:
                continue
            others = [other for other in node.all_input_nodes if other is not moved]
            brought = [bring_back(other, moved) for other in others] if form(node) == form(moved) else [None]
            if None in brought:
                continue
            for other, as_before in zip(others, brought):
                node.replace_input_with(other, as_before)
            source, value = moved.args[0], node.meta["val"]
            node.replace_input_with(moved, source)
            node.meta["val"] = value.new_empty(form(source))
            with graph.inserting_after(node):
                after = graph.call_function(moved.target, (node, moved.args[1]))
            after.meta["val"] = value
            node.replace_all_uses_with(after, lambda user: user is not after)
            graph.erase_node(moved)
            return True
        return False

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target == view and node.args[0] in behind:
            behind.add(node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            while move(node):
                behind.add(node)
                behind.update(user for user in node.users if user.target == view)


# ---- The model's tasks ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """One kernel of a model, that is one distinct fused operator with its shapes and dtypes."""

    key: str  # MetaSchedule's structural hash of the module
    name: str
    calls: int  # per inference
    module: str  # the IRModule before scheduling, in TVM's JSON
    arguments: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape): inputs and weights, then outputs


def find_target(device):
    """-> TVM's target for "cpu" or "cuda:N", as JSON."""
    import tvm

    target = json.loads(str(tvm.target.Target.from_device(tvm.runtime.device(device))))
    # What MetaSchedule's rules ask for, and not every device says.
    if device == "cpu":
        target["num-cores"] = len(os.sched_getaffinity(0))
    else:
        target |= {"max_threads_per_block": MAX_THREADS, "thread_warp_size": WARP}
        target["max_shared_memory_per_block"] = STATIC_SHARED_BYTES
    return json.dumps(target)


def prepare(module, target):
    """Relax module -> the same with one TIR function for each distinct kernel, not yet scheduled.

    Operators on weights alone go into a function of their own, main_transform_params, which is run once.
    """
    import tvm
    from tvm import relax

    passes = [
        relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]}),  # what tensor cores need
        cancel_permutations(),
        relax.transform.LiftTransformParams(),
        *relax.pipeline.library_dispatch_passes(target),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),  # a reshape is no kernel: there is nothing to tune
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes)(module)


def cancel_permutations():
    """-> a pass that makes one of two permutations in a row, and nothing of one that changes nothing."""
    import tvm
    from tvm import relax
    from tvm.relax.dpl import is_op, rewrite_call, wildcard

    inner = is_op("relax.permute_dims")(wildcard())
    outer = is_op("relax.permute_dims")(inner)

    def axes_of(call):
        ndim = call.args[0].ty.ndim
        return [int(axis) for axis in call.attrs.axes] if call.attrs.axes else list(reversed(range(ndim)))

    def without_identity(source, axes):
        return source if axes == sorted(axes) else relax.op.permute_dims(source, axes)

    def of_two(call, matched):
        first = matched[inner]
        return without_identity(first.args[0], [axes_of(first)[axis] for axis in axes_of(call)])

    def of_one(call, matched):
        return without_identity(call.args[0], axes_of(call))

    @tvm.ir.transform.module_pass(opt_level=0)
    def cancel(module, _):
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                module.update_func(name, rewrite_call(inner, of_one, rewrite_call(outer, of_two, function)))
        return relax.transform.DeadCodeElimination(["main"])(module)

    return cancel


def default_schedule(module, target):
    """Schedule what has no schedule yet by TVM's default rules (none on the CPU: plain loops)."""
    import tvm
    from tvm.s_tir import dlight

    if target.kind.name == "llvm":
        return module
    rules = ("Matmul", "GEMV", "Reduction", "GeneralReduction", "Fallback")  # as in TVM's default pipeline for CUDA
    with target, tvm.transform.PassContext(opt_level=3):
        return dlight.ApplyDefaultSchedule(*(getattr(dlight.gpu, rule)() for rule in rules))(module)


def extract_tasks(module, target):
    """Prepared Relax module -> its Tasks; what runs once for the weights is left out."""
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks
    from tvm.s_tir.meta_schedule.utils import shash2hex

    of_inference = {name: f for name, f in module.functions.items() if name.name_hint != "main_transform_params"}
    module = relax.transform.DeadCodeElimination(["main"])(tvm.IRModule(of_inference))
    tasks = []
    for task in extract_tasks(module, target):
        main = task.mod["main"]
        if any(not isinstance(size, tvm.tirx.IntImm) for parameter in main.params for size in parameter.ty.shape):
            continue  # a shape that is not known before it runs
        arguments = tuple((str(p.ty.dtype), tuple(int(size) for size in p.ty.shape)) for p in main.params)
        tasks.append(Task(shash2hex(task.mod), task.task_name, int(task.weight), tvm.ir.save_json(task.mod), arguments))
    return tasks


# ---- Candidates -----------------------------------------------------------------------------------------------------
# A candidate is (space, decisions): the number of one of the task's design spaces, and what its sampling instructions
# are to return, in their order. A tile is a list of factors; everything else is an index into what can be chosen.


class Design:
    """What MetaSchedule knows of a task: its design spaces, the rules after sampling, the features."""

    def __init__(self, module, target):
        import tvm
        from tvm.s_tir import Schedule
        from tvm.s_tir import meta_schedule as ms

        self.target = tvm.target.Target(json.loads(target))
        self.module = tvm.ir.load_json(module)
        kind = self.target.kind.name
        if kind == "cuda" and "float16" in module:
            kind = "cuda-tensorcore"
        rules = {name: kind for name in ("sch_rules", "postprocs", "mutator_probs")}
        bf16 = kind == "cuda-tensorcore" and "bfloat16" in module
        if bf16:
            rules["sch_rules"] = rules_for_bf16()
        self.ways, self.spaces = [], []  # for each space: what rewrite_product() is given first, and the trace
        for ways in find_rewrites(self.module) if kind.startswith("cuda") else [0]:
            self.context = ms.TuneContext(
                rewrite_product(Schedule(self.module), ways).mod,
                target=self.target,
                space_generator=ms.space_generator.PostOrderApply(**rules),
                num_threads=1,
                rand_state=1,  # the same spaces in the same order in every process
            ).clone()
            schedules = self.context.generate_design_space()
            if bf16:
                for schedule in schedules:
                    pad_rows_for_tensor_cores(schedule)
            traces = [schedule.trace for schedule in schedules]
            self.spaces += traces
            self.ways += [ways] * len(traces)
        self.samplings = [sampling_instructions(trace) for trace in self.spaces]
        self.tensor_cores = [any(inst.kind.name == "Blockize" for inst in trace.insts) for trace in self.spaces]
        self.choices = [
            [find_choice(trace, inst) for inst in insts] for trace, insts in zip(self.spaces, self.samplings)
        ]
        for ways, tensor_cores, choices in zip(self.ways, self.tensor_cores, self.choices):
            if ways > 1 and not tensor_cores and isinstance(choices[0], Tile):
                choices[0] = choices[0]._replace(whole=True)  # a block has one part of the sum
        self.stages = [count_stages(trace) for trace in self.spaces]
        self.operands = [self.find_operands(i) for i in range(len(self.spaces))]
        self.extractor = ms.feature_extractor.PerStoreFeature()

    def realize(self, space, decisions, schedule=None, seed=1, verify=True):
        """-> (schedule with all rules applied, its decisions), or None where the target forbids it.

        A decision that is None is drawn by TVM. `schedule`: of the module before scheduling (default: a new one).
        `verify`: lower it to see what the target says, which is half of the work.
        """
        from tvm.s_tir import Schedule
        from tvm.s_tir.meta_schedule.postproc import VerifyGPUCode
        from tvm.s_tir.schedule import Trace

        given = {inst: value for inst, value in zip(self.samplings[space], decisions) if value is not None}
        schedule = schedule or Schedule(self.module, seed=seed, debug_mask=0, error_render_level="none")
        rewrite_product(schedule, self.ways[space])
        try:
            Trace(self.spaces[space].insts, given).apply_to_schedule(schedule, remove_postproc=True)
        except Exception:  # a decision that does not fit another one
            return None
        taken = [read_decision(schedule.trace, inst) for inst in sampling_instructions(schedule.trace)]
        schedule.enter_postproc()
        rules = self.context.space_generator.postprocs
        if not all(rule.apply(schedule) for rule in rules if verify or not isinstance(rule, VerifyGPUCode)):
            return None
        return schedule, taken

    def adapt(self, space, decisions):
        """-> the decisions of a candidate for another task as they fit this one, None where they do not.

        The first factor of a tile, the number of blocks or of steps, takes what differs in a tile's extent.
        """
        if space >= len(self.spaces) or len(decisions) != len(self.choices[space]):
            return None
        adapted = []
        for choice, decision in zip(self.choices[space], decisions):
            if isinstance(choice, Tile) != isinstance(decision, list):
                return None
            if isinstance(choice, Tile):
                first, rest = divmod(choice.extent, math.prod(decision[1:]))
                if len(decision) != choice.parts or rest or (choice.whole and first != choice.extent):
                    return None
                decision = [first, *decision[1:]]
            elif choice is not None and decision >= choice:
                return None
            adapted.append(decision)
        return adapted if self.fits(space, adapted) else None

    def find_operands(self, space):
        """-> what a CUDA block stages in shared memory: (bytes an element, a row of strides for each dimension) each.

        A row holds the dimension's strides along the tiled loops. Empty where that is not known: another target, or no
        operator with the loops that the design space tiles.
        """
        from tvm.s_tir import Schedule
        from tvm.sym import detect_linear_equation

        tiles = filter(is_tile, self.samplings[space])
        extents = [math.prod(read_decision(self.spaces[space], tile)) for tile in tiles]
        if self.target.kind.name != "cuda" or not extents:
            return []
        if self.tensor_cores[space]:
            # Whatever the operator was, it has been made a matrix product (m, n, k) in tiles of 16.
            if len(extents) != 3:
                return []
            fragment, (m, n, k) = 16 * 16 * 2, ((1, 0, 0), (0, 1, 0), (0, 0, 1))
            return [(fragment, [m, k]), (fragment, [n, k])]
        schedule = rewrite_product(Schedule(self.module), self.ways[space])
        for block in map(schedule.get, schedule.get_child_blocks(schedule.get_sblock("root"))):
            if [int(loop.dom.extent) for loop in block.iter_vars] == extents:
                loops = [loop.var for loop in block.iter_vars]
                operands = []
                for read in block.reads:
                    rows = [detect_linear_equation(index.min, loops)[:-1] for index in read.region]
                    if not all(rows):
                        return []  # an index that is not linear
                    operands.append((torch_dtype(read.source.ty.dtype).itemsize, [list(map(int, row)) for row in rows]))
                return operands
        return []

    def fits(self, space, decisions):
        """-> False where a CUDA block would have too many or too few threads, or not enough shared memory.

        TVM finds that out too, but after 30 ms of work, and 19 of 20 random candidates for a convolution fail. The
        rules for CUDA cut a spatial loop into five (block, virtual thread, thread, two inner ones; for tensor cores
        the second is the block's too, and a thread is a warp) and a reduction into three.
        """
        tiles = [decision for decision in decisions if isinstance(decision, list)]
        spatial = [tile for tile in tiles if len(tile) == 5]
        if not self.operands[space] or not spatial:
            return True
        threads = math.prod(tile[2] for tile in spatial)
        if self.tensor_cores[space]:
            threads, first = threads * WARP, 2
        else:
            first = 1
            if math.prod(tile[1] for tile in spatial) > MAX_VTHREADS:
                return False
        staged = [math.prod(tile[first if len(tile) == 5 else 1 :]) for tile in tiles]
        shared_bytes = sum(
            size * math.prod(1 + sum(stride * (n - 1) for stride, n in zip(row, staged)) for row in rows)
            for size, rows in self.operands[space]
        )
        return WARP <= threads <= MAX_THREADS and shared_bytes * self.stages[space] <= STATIC_SHARED_BYTES

    def features(self, schedule):
        """-> fp32 array (stores, features)."""
        from tvm.s_tir.meta_schedule import MeasureCandidate

        (features,) = self.extractor.extract_from(self.context, [MeasureCandidate(schedule, [])])
        return features.numpy().astype("float32")


design = functools.lru_cache(maxsize=None)(Design)  # a worker meets a task many times


def rules_for_bf16():
    """-> MetaSchedule's rules for CUDA's tensor cores, with bf16 in the place of fp16: TVM 0.27 has fp16 and int8 only.

    WMMA in tiles of 16 x 16 x 16 with sums in fp32, tiled as ScheduleRule::DefaultCUDATensorCore does for fp16.
    """
    from tvm.s_tir import TensorIntrin
    from tvm.s_tir.meta_schedule.schedule_rule import MultiLevelTilingTensorCore, ReuseType, ScheduleRule
    from tvm.s_tir.tensor_intrin import cuda

    def register(name, intrinsic):
        TensorIntrin.register(name, *intrinsic, override=True)
        return name

    def load(operand, transposed):
        intrinsic = cuda.get_wmma_load_intrin(16, 16, 16, "bfloat16", "shared.dyn", operand == "b", transposed)
        return register(f"wmma_load_16x16x16_bf16_{operand}{'_trans' * transposed}_shared_dyn", intrinsic)

    def compute(transposed):
        intrinsic = cuda.get_wmma_sync_intrin(16, 16, 16, "bfloat16", "float32", transposed)
        return register(f"wmma_sync_16x16x16_bf16bf16f32{'_trans' * transposed}", intrinsic)

    groups = [
        {
            "init": cuda.WMMA_FILL_16x16x16_F32_INTRIN,
            "load_a": load("a", False),
            "load_b": load("b", transposed),
            "compute": compute(transposed),
            "store": cuda.WMMA_STORE_16x16x16_F32_SHARED_DYN_INTRIN,
        }
        for transposed in (True, False)
    ]
    tiling = MultiLevelTilingTensorCore(
        groups,
        structure="SSSRRSRS",
        tile_binds=["blockIdx.y", "blockIdx.x", "threadIdx.y"],
        max_innermost_factor=4,
        vector_load_lens=[1, 2, 4, 8],
        reuse_read=ReuseType("must", [4], "shared.dyn"),
        reuse_write=ReuseType("must", [2], "shared.dyn"),
    )
    first, *others = ScheduleRule.create("cuda-tensorcore")
    return [first, tiling, *(rule for rule in others if not isinstance(rule, MultiLevelTilingTensorCore))]


def pad_rows_for_tensor_cores(schedule):
    """Pad the rows of what is staged in shared memory, against bank conflicts, as MetaSchedule does in fp16 only."""
    for inst in schedule.trace.insts:
        if inst.kind.name == "CacheRead" and "shared.dyn" in map(str, inst.attrs):  # without tensor cores: "shared"
            schedule.storage_align(inst.outputs[0], 0, axis=-2, factor=32, offset=8)


def find_product(schedule):
    """-> (block of a task's product, blocks after it), a matrix product or a convolution, or None where it has none."""
    blocks = [schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]
    reductions = [i for i, block in enumerate(blocks) if reduction_loops(block)]
    if len(reductions) != 1 or len(blocks[reductions[0]].reads) < 2:
        return None
    names = [block.name_hint for block in blocks[reductions[0] :]]
    product, *after = map(schedule.get_sblock, names)
    return product, after


def reduction_loops(block):
    return [loop for loop in block.iter_vars if loop.iter_type == loop.CommReduce]


def find_rewrites(module):
    """-> what rewrite_product() may gain something by for a task: "ways" to split its sum, 0 and 1 for not at all.

    At most two splits, down to SPLIT_SUM terms each, as long as there are no more than SPLIT_OUTPUTS sums in all. The
    task as it is comes first, so that a database of a version without rewriting keeps its meaning.
    """
    from tvm.s_tir import Schedule

    schedule = Schedule(module)
    found = find_product(schedule)
    if found is None:
        return [0]
    product, *after = [schedule.get(block) for block in (found[0], *found[1])]
    extents = [int(loop.dom.extent) for loop in product.iter_vars]
    terms = math.prod(int(loop.dom.extent) for loop in reduction_loops(product))
    outputs, last = math.prod(extents) // terms, extents[-1]
    ways = [n for n in SPLITS if last % n == 0 and terms // n >= SPLIT_SUM and outputs * n <= SPLIT_OUTPUTS]
    try:
        rewrite_product(schedule, 2 if ways else 1)
    except Exception:  # what is fused with the product is of a kind that cannot be inlined or moved
        return [0]
    read = [region.source for block in after for region in block.reads]
    read_twice = any(sum(map(block.writes[0].source.same_as, read)) > 1 for block in (product, *after))
    return [0] + [1] * read_twice + ways[:1] + ways[2:3]


def rewrite_product(schedule, ways):
    """Make one block of all that is fused after the schedule's product, and split its sum; -> the schedule.

    One block, because MetaSchedule leaves a kernel of its own to what reads the product twice, as GELU does. And its
    rules for CUDA give each output to one block of threads: a product with few outputs and a long sum, which is what a
    network has at batch 1, keeps few of the GPU's multiprocessors busy. `ways` > 1: so many parts of each sum, which a
    second kernel adds up when it does what is fused after the product. 0: the schedule is left as it is.
    """
    if ways == 0:
        return schedule
    product, after = find_product(schedule)
    for block in after[:-1]:
        schedule.compute_inline(block)
    if ways == 1:
        return schedule
    part, _ = schedule.split(schedule.get_loops(product)[-1], [ways, None])
    partial = schedule.rfactor(part, 0)
    *loops, part, _ = schedule.get_loops(partial)
    schedule.reorder(part, *loops)  # MetaSchedule tiles a block only if its loops are in the order of its indices
    if after:
        schedule.compute_at(product, schedule.get_loops(after[-1])[-1])
        schedule.set_scope(product, 0, "local")
    return schedule


def sampling_instructions(trace):
    return [inst for inst in trace.insts if inst.kind.name.startswith("Sample")]


def count_stages(trace):
    """-> how many copies of what is staged in shared memory a design space keeps: several where loads are pipelined."""
    for inst in trace.insts:
        if inst.kind.name == "Annotate" and str(inst.attrs[0]) == "software_pipeline_stage":
            return int(inst.inputs[1][-1]) + 1
    return 1


def is_tile(instruction):
    return instruction.kind.name == "SamplePerfectTile"


class Tile(typing.NamedTuple):
    """What a sampling instruction for a tile returns: `parts` factors of `extent`, the last one limited."""

    extent: int
    parts: int
    max_innermost: int
    whole: bool = False  # the first factor is all of it


def find_choice(trace, instruction):
    """-> what a sampling instruction can return: a Tile, a number of options, or None: only TVM knows."""
    if is_tile(instruction):
        parts, max_innermost = (int(str(attribute)) for attribute in instruction.attrs)
        return Tile(math.prod(read_decision(trace, instruction)), parts, max_innermost)
    return len(instruction.attrs[0]) if instruction.kind.name == "SampleCategorical" else None


def torch_dtype(name):
    return getattr(torch, str(name))


def read_decision(trace, instruction):
    decision = trace.decisions[instruction]
    return [int(factor) for factor in decision] if is_tile(instruction) else int(decision)


def search(module, target, trials, relatives, count, seed):
    """-> up to `count` new candidates of a task, the most promising first, as (space, decisions, features).

    `trials` is what was measured: (space, decisions, seconds or None where it failed, features or None where it was
    measured by an earlier run). `relatives`: the best (space, decisions) of other tasks, the likeliest first. Where
    they fit as they are, they are tried: a network has convolutions that differ in a stride or in what is fused with
    them, and in nothing else. Adapted to other extents they only take part; until there is a cost model, in front. The
    evolution keeps no state but that, so that any process can go on with any task.
    """
    task, rng = design(module, target), random.Random(seed)
    known = {candidate_key(space, decisions) for space, decisions, _, _ in trials}
    ranked = sorted((trial for trial in trials if trial[2]), key=lambda trial: trial[2])
    parents = [[trial[1] for trial in ranked if trial[0] == i][:PARENTS] for i in range(len(task.spaces))]
    population = []

    def add(space, decisions):
        known.add(candidate_key(space, decisions))
        # In fp32 fits() lets hardly anything pass that TVM refuses. Of candidates for tensor cores it is one in ten.
        verify = "float16" in module or not task.operands[space]
        realized = task.realize(space, decisions, seed=rng.randrange(1, 2**31), verify=verify)
        if realized is None:
            return
        schedule, taken = realized
        if taken != decisions and candidate_key(space, taken) in known:
            return  # what TVM drew was there
        known.add(candidate_key(space, taken))
        population.append((space, taken, task.features(schedule)))

    borrowed = []
    for space, decisions in relatives:
        adapted = task.adapt(space, decisions)
        if adapted is None or candidate_key(space, adapted) in known or len(population) >= POPULATION // 2:
            continue
        before = len(population)
        add(space, adapted)
        if adapted == decisions and len(borrowed) < count:
            borrowed += range(before, len(population))
    open_spaces = find_open_spaces(len(task.spaces), trials)
    to_draw_from = collections.deque(open_spaces)
    for _ in range(4 * POPULATION):
        if len(population) >= POPULATION or not to_draw_from:
            break
        space = to_draw_from.popleft()
        for _ in range(DRAWS):
            if parents[space] and rng.random() > RANDOM_SHARE:
                parent = parents[space][min(int(rng.expovariate(0.5)), len(parents[space]) - 1)]
                decisions = mutate(task.choices[space], parent, rng)
            else:
                decisions = random_decisions(task.choices[space], rng)
            if task.fits(space, decisions) and candidate_key(space, decisions) not in known:
                add(space, decisions)
                to_draw_from.append(space)  # not where nothing new can be drawn
                break
    scores = predict([(trial[3], trial[2]) for trial in trials if trial[3] is not None], population)
    favourites = sorted((i for i in range(len(population)) if i not in borrowed), key=lambda i: -scores[i])
    by_space = [[i for i in favourites if population[i][0] == space] for space in open_spaces]
    in_turns = [i for turn in itertools.zip_longest(*by_space) for i in turn if i is not None]
    chosen = borrowed + in_turns[: max(0, round(GREEDY * count) - len(borrowed))]
    rest = [i for i in in_turns if i not in chosen]
    chosen += rng.sample(rest, min(len(rest), count - len(chosen)))
    return [population[i] for i in chosen]


def find_open_spaces(count, trials):
    """-> the design spaces, of `count`, that are worth more trials: hardly explored, or nearly as good as the best.

    Each of them gets an equal share of a round: the cost model alone settles on the first space that looks good, and
    the other one may be three times faster once its tiles are right. The more candidates a space has had, the closer
    must its best one be.
    """
    measured = [[seconds or math.inf for space, _, seconds, _ in trials if space == i] for i in range(count)]
    best = min(itertools.chain(*measured), default=math.inf)

    def is_open(times):
        return len(times) < EXPLORED or min(times) <= best * (1 + PATIENCE / len(times))

    return [i for i, times in enumerate(measured) if is_open(times)]


def candidate_key(space, decisions):
    return json.dumps([space, decisions])


def predict(measured, population):
    """-> a score for each of `population`, higher for faster, by TVM's boosted trees trained on `measured`."""
    from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig, XGBModel

    best = min((seconds for _, seconds in measured if seconds), default=None)
    if best is None or len(measured) < ROUND or not population:
        return [0.0] * len(population)
    model = XGBModel(config=XGBConfig(nthread=1), num_warmup_samples=0)
    labels = np.array([best / seconds if seconds else 0.0 for _, seconds in measured], dtype="float32")
    # Below its public methods, which would extract the features of everything measured anew at each search.
    model._train([features for features, _ in measured], labels)
    return model._predict([features for _, _, features in population])


def random_decisions(choices, rng):
    return [random_decision(choice, rng) for choice in choices]


def random_decision(choice, rng):
    if isinstance(choice, Tile):
        if choice.whole:
            return [choice.extent] + [1] * (choice.parts - 1)
        return random_tile(choice.extent, choice.parts, choice.max_innermost, rng)
    return rng.randrange(choice) if choice else None


def random_tile(extent, parts, max_innermost, rng):
    """-> `parts` factors whose product is `extent`, the last at most `max_innermost`."""
    while True:
        factors = [1] * parts
        for prime in prime_factors(extent):
            factors[rng.randrange(parts)] *= prime
        if factors[-1] <= max_innermost:
            return factors


@functools.cache
def prime_factors(number):
    """-> its prime factors in ascending order, with repetition."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def mutate(choices, decisions, rng):
    """-> the decisions with one or two of them changed: a prime factor of a tile moves, a choice is drawn anew."""
    decisions = list(decisions)
    for _ in range(rng.randint(1, 2) if decisions else 0):
        i = rng.randrange(len(decisions))
        if not isinstance(choices[i], Tile):
            decisions[i] = random_decision(choices[i], rng)
        elif not choices[i].whole:
            decisions[i] = move_factor(decisions[i], choices[i].max_innermost, rng)
    return decisions


def move_factor(factors, max_innermost, rng):
    sources = [i for i, factor in enumerate(factors) if factor > 1]
    if not sources:
        return factors
    source = rng.choice(sources)
    target = rng.choice([i for i in range(len(factors)) if i != source])
    prime = rng.choice(prime_factors(factors[source]))
    moved = list(factors)
    moved[source] //= prime
    moved[target] *= prime
    return moved if moved[-1] <= max_innermost else factors


# ---- Building and measuring one candidate ---------------------------------------------------------------------------


def build_options(target):
    """-> TVM's options for building a tuned kernel, alone and in its model.

    Without storage rewriting on CUDA: TVM 0.27 lets a buffer of fp16 share the memory of one of fp32, and then refuses
    what MetaSchedule makes for tensor cores ("tvm_access_ptr element type must match the source buffer").
    """
    return {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": target.kind.name == "cuda"}


def build(module, target, candidate, path):
    """Compile one candidate (None: TVM's default schedule) into the shared library `path`."""
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    if candidate is None:
        compile_target = tvm.target.Target(json.loads(target))
        scheduled = default_schedule(tvm.ir.load_json(module), compile_target)
    else:
        task = design(module, target)
        compile_target = task.target
        realized = task.realize(*candidate)
        if realized is None:
            raise ValueError("the target forbids this candidate")
        schedule, _ = realized
        scheduled = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)
    with compile_target, tvm.transform.PassContext(opt_level=3, config=build_options(compile_target)):
        tvm.build(scheduled, target=compile_target).export_library(path)
    return path


def measure(arguments, path, reference_path, device, tolerance, best_s):
    """Run a built candidate -> its median seconds; WrongOutput where its outputs are not those of `reference_path`."""
    import tvm

    module, on = tvm.runtime.load_module(path), tvm.runtime.device(device)
    inputs, expected = run_reference(arguments, reference_path, device)
    buffers = [tensor.clone() for tensor in inputs]
    shared = [tvm.runtime.from_dlpack(tensor) for tensor in buffers]
    module["main"](*shared)
    on.sync()
    for output, reference in zip(buffers, expected):
        check_buffer(output, reference, tolerance)

    def seconds(calls, repeats):
        return module.time_evaluator("main", on, number=calls, repeat=repeats)(*shared).results

    (once,) = seconds(1, 1)
    if best_s and once > HOPELESS * best_s:
        return once
    return statistics.median(seconds(max(1, math.ceil(MIN_REPEAT_S / once)), REPEATS))


@functools.lru_cache(maxsize=4)
def run_reference(arguments, path, device):
    """-> (input buffers, buffers after TVM's default schedule ran on them); seeded noise, zeros for integers."""
    import tvm

    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for dtype, shape in arguments:
        dtype = torch_dtype(dtype)
        if dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype))
        else:
            inputs.append(torch.zeros(shape, device=device, dtype=dtype))
    outputs = [tensor.clone() for tensor in inputs]
    tvm.runtime.load_module(path)["main"](*(tvm.runtime.from_dlpack(tensor) for tensor in outputs))
    tvm.runtime.device(device).sync()
    return inputs, outputs


def check_buffer(output, reference, tolerance):
    """Raise WrongOutput unless ||output - reference|| <= tolerance ||reference||, both finite at the same places."""
    if not reference.is_floating_point():
        if not torch.equal(output, reference):
            raise WrongOutput("integers are off")
        return
    output, reference = output.double(), reference.double()
    if not torch.equal(output.isfinite(), reference.isfinite()):
        raise WrongOutput("not finite where it should be")
    output, reference = (torch.where(tensor.isfinite(), tensor, 0) for tensor in (output, reference))
    error, norm = (output - reference).norm().item(), reference.norm().item()
    if error > tolerance * norm:
        raise WrongOutput(f"rel_error {error / norm if norm else math.inf:.1e}")


# ---- Worker processes -----------------------------------------------------------------------------------------------


class Worker:
    """A forked process that does one job at a time and is replaced when it dies, hangs or has done many.

    The forking process must have no threads and no CUDA context.
    """

    def __init__(self, jobs=JOBS_PER_WORKER):
        self.jobs, self.process, self.label = jobs, None, None

    def submit(self, label, timeout_s, function, *args):
        """Begin function(*args), a module-level function; `label` is what result() gives back with the outcome."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, os.getpid()), daemon=True)
            self.process.start()
            theirs.close()
            self.left = self.jobs
        self.label, self.started = label, time.monotonic()
        self.deadline = self.started + timeout_s
        self.left -= 1
        with contextlib.suppress(BrokenPipeError):  # it has died already: result() says so
            self.connection.send((function, args))

    @property
    def busy(self):
        return self.label is not None

    def result(self):
        """-> (label, value, error) of the job, error being None where it succeeded; None while it runs."""
        label, value, error = self.label, None, None
        if self.connection.poll():
            try:
                value, error = self.connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join(5)
                error = f"the process ended with exit code {self.process.exitcode}"
                self.stop()
        elif time.monotonic() > self.deadline:
            error = "no result in time"
            self.stop()
        else:
            return None
        self.label = None
        if self.process is not None and (self.left <= 0 or error and not error.startswith(WrongOutput.__name__)):
            self.stop()  # a kernel that failed may have broken the CUDA context
        return label, value, error

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def call(timeout_s, function, *args):
    """-> function(*args), computed in a process of its own; RuntimeError."""
    worker = Worker()
    worker.submit("call", timeout_s, function, *args)
    while not (outcome := worker.result()):
        multiprocessing.connection.wait([worker.connection], timeout=0.2)
    worker.stop()
    _, value, error = outcome
    if error:
        raise RuntimeError(error)
    return value


def work(connection, parent):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives a tuner that was killed
    if os.getppid() != parent:
        os._exit(1)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*args), None))
        except Exception as error:
            connection.send((None, " ".join(f"{type(error).__name__}: {error}".split())[:300]))


# ---- The database ---------------------------------------------------------------------------------------------------
# PATH.journal has a line of JSON for every trial, written as it is measured: what an interrupted run goes on from.
# PATH.json.gz has the best record of each task: all that a tuned model is compiled from.


def database_path(path):
    return path.with_name(path.name + ".json.gz")


def journal_path(path):
    return path.with_name(path.name + ".journal")


def read_database(path, origin):
    """-> the database of a case, or None where there is none. DatabaseError: damaged, or of another `origin`.

    `origin` names the device and TVM's version: records are good for both together.
    """
    file = database_path(path)
    try:
        database = json.loads(gzip.decompress(file.read_bytes()))
        complete = all(record.keys() == set(RECORD) for record in database["records"])
        complete = complete and database.keys() == {"origin", "tune_time_s", "tune_trials", "asked_trials", "records"}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise DatabaseError(f"{file} is damaged; delete it to tune anew")
    check_origin(file, database["origin"], origin)
    return database


RECORD = ("task", "name", "space", "decisions", "seconds", "default_seconds")


def check_origin(file, found, expected):
    if found != expected:
        raise DatabaseError(f"{file} is of {found}, and this is {expected}; move it away to tune anew")


def read_journal(path, origin):
    """-> the trials of a case's journal, as dicts; a last line that was never finished is left out."""
    file = journal_path(path)
    try:
        lines = file.read_text().splitlines(keepends=True)
        first, *trials = [json.loads(line) for line in lines if line.endswith("\n")] or [{"origin": origin}]
        found = first["origin"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise DatabaseError(f"{file} is damaged; delete it to tune anew") from None
    check_origin(file, found, origin)
    return trials


class Journal:
    """Appends trials, each on the disk before the next; one process at a time."""

    def __init__(self, path, origin):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = journal_path(path).open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatabaseError(f"{journal_path(path)} is being written: another process tunes this case") from None
        self.trials = read_journal(path, origin)
        self.file.seek(0)
        whole, end, _ = self.file.read().rpartition(b"\n")
        self.file.truncate(len(whole + end))
        if not whole:
            self.append({"origin": origin})

    def append(self, line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def write_database(path, database):
    """Put the database in its place as a whole, in the same bytes for the same content."""
    file = database_path(path)
    unfinished = file.with_suffix(".new")
    unfinished.write_bytes(gzip.compress(json.dumps(database, separators=(",", ":")).encode(), mtime=0))
    unfinished.replace(file)


def read_siblings(path, origin):
    """-> the best (space, decisions) for each kernel's name in the databases of the model's other input shapes.

    A kernel has the same name at every batch size. What cannot be read is left out: it is not of this case.
    """
    model, _, precision = path.name.rsplit(".", 2)
    siblings = {}
    for file in sorted(path.parent.glob(f"{model}.*.{precision}.json.gz")):
        other = path.with_name(file.name.removesuffix(".json.gz"))
        if other == path or other.name.rsplit(".", 2)[0] != model:
            continue
        with contextlib.suppress(DatabaseError):
            for record in read_database(other, origin)["records"]:
                siblings.setdefault(record["name"], []).append((record["space"], record["decisions"]))
    return siblings


def apply_database(module, target, database):
    """Schedule a prepared Relax module by the best records, and by TVM's default rules where there is none.

    Raises DatabaseError where a record fits no kernel: it is not the database of this model as it is exported now.
    """
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.database import ScheduleFnDatabase
    from tvm.s_tir.meta_schedule.utils import shash2hex

    records, used = {record["task"]: record for record in database["records"]}, set()

    def schedule_by_record(schedule):
        module = tvm.IRModule(schedule.mod.functions)  # without its name, which the hash would see
        record = records.get(shash2hex(module))
        if record is None:
            return False
        task = Design(tvm.ir.save_json(module), str(target))
        if task.realize(record["space"], record["decisions"], schedule) is None:
            return False
        used.add(record["task"])
        return True

    with target, ScheduleFnDatabase(schedule_by_record), tvm.transform.PassContext(opt_level=3):
        module = relax.transform.MetaScheduleApplyDatabase()(module)
    if used != records.keys():
        unfit = f"{len(records) - len(used)} of {len(records)} records fit no kernel of the model"
        raise DatabaseError(f"{unfit} as it is exported here; delete the database to tune anew")
    return default_schedule(module, target)


def lowering(target):
    """-> the passes of TVM's default pipeline that come after scheduling."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as cpu
    from tvm.relax.backend.cuda import pipeline as cuda

    passes = {"cuda": cuda, "llvm": cpu}[target.kind.name]
    return tvm.transform.Sequential(passes.dataflow_lower_passes(target) + passes.finalize_passes(target))


# ---- The loop -------------------------------------------------------------------------------------------------------


class Progress:
    """How far one task has come."""

    def __init__(self, task):
        self.task = task
        self.default_s = None  # of TVM's default schedule, which is also what candidates are checked against
        self.reference = None  # path of its shared library
        self.trials = []  # (space, decisions, seconds or None where it failed, features or None)
        self.waiting = 0  # candidates on their way, or a search
        self.exhausted = False  # nothing new can be drawn, or there is nothing to check against
        self.history = []  # best seconds after each round

    @property
    def best(self):
        """The fastest trial, None where none has succeeded."""
        return min((trial for trial in self.trials if trial[2]), key=lambda trial: trial[2], default=None)

    @property
    def best_s(self):
        best = self.best
        return min(self.default_s or math.inf, best[2] if best else math.inf)

    def end_of_round(self):
        if math.isfinite(self.best_s):
            self.history.append(self.best_s)

    def urgency(self):
        """-> seconds per inference that another round may save: Ansor's estimate (Zheng et al., arXiv:2006.06762).

        As in TVM's own scheduler: a weighted mean of the slope over the last three rounds and of best / rounds.
        """
        best, rounds = self.history[-1], len(self.history)
        slope = (self.history[-4] - best) / 3 if rounds > 3 else best / rounds
        return self.task.calls * (0.2 * slope + 0.8 * best / rounds)


def tune(tasks, target, device, path, origin, tolerance, asked_trials, limit_s, workers, scratch, report):
    """Search until there are `asked_trials` for each task on average or `limit_s` have passed; write the database.

    target: TVM's target as JSON. device: "cpu" or "cuda:N". tolerance: largest relative error of a kernel. workers:
    processes that search and build. scratch: an existing directory for what they build. report: called with a line on
    how it goes. No thread and no CUDA context may be in the calling process.
    """
    journal = Journal(path, origin)
    database = read_database(path, origin)
    siblings = read_siblings(path, origin)
    progress = {task.key: Progress(task) for task in tasks}
    spent_s, done = restore(progress, database, journal.trials)
    budget = asked_trials * len(tasks)
    start, done_before, next_report = time.monotonic(), done, 0.0
    builders = [Worker() for _ in range(workers)]
    measurer = Worker(jobs=math.inf)
    to_build = collections.deque((state, None) for state in progress.values())
    to_measure = collections.deque()
    alone = device == "cpu"  # there, what is built disturbs what is measured: the two take turns
    numbers = itertools.count()
    draining = False
    job_s = {kind: collections.deque(maxlen=ROUND * workers) for kind in ("build", "search")}

    def hand_out_to(builder):
        """Give an idle builder a candidate to build or, where few are left, the task that promises most to search.

        Not before, because what is measured until then says which task it is, and makes its search a better one.
        """
        searching = sum(other.busy and other.label[0] == "search" for other in builders)
        if len(to_build) + ROUND * searching < few():
            state = most_urgent()
            if state is not None:
                state.waiting = ROUND
                relatives = [other.best[:2] for other in progress.values() if other is not state and other.best]
                random.Random(done).shuffle(relatives)
                relatives = siblings.get(state.task.name, []) + relatives
                arguments = (state.task.module, target, state.trials, relatives, ROUND, len(state.trials))
                builder.submit(("search", state, None), SEARCH_TIMEOUT_S, search, *arguments)
                return
        if to_build:
            state, candidate = to_build.popleft()
            file = os.path.join(scratch, f"{next(numbers)}.so")
            arguments = (state.task.module, target, candidate and candidate[:2], file)
            builder.submit(("build", state, candidate), BUILD_TIMEOUT_S, build, *arguments)

    def few():
        """-> how many candidates all builders finish in the time of a search, and one more for each."""
        if not job_s["search"]:
            return workers * (SEARCH_BUILDS + 1)
        return workers * (statistics.fmean(job_s["search"]) / statistics.fmean(job_s["build"]) + 1)

    def most_urgent():
        """-> the task to search next, None where none may be: each default schedule is measured first."""
        on_their_way = sum(state.waiting for state in progress.values())
        if done + on_their_way >= budget or not all(s.history or s.exhausted for s in progress.values()):
            return None
        open_states = [s for s in progress.values() if s.history and not s.waiting and not s.exhausted]
        return max(open_states, key=Progress.urgency, default=None)

    def record(state, candidate, seconds, error):
        nonlocal done
        line = {"task": state.task.key, "elapsed_s": round(spent_s + time.monotonic() - start, 3)}
        if candidate is None:
            state.default_s, state.exhausted = seconds, seconds is None
            line["default_seconds"] = seconds
        else:
            space, decisions, features = candidate
            state.trials.append((space, decisions, seconds, features))
            state.waiting -= 1
            done += 1
            line |= {"space": space, "decisions": decisions, "seconds": seconds, "trials": done}
        if error:
            line["error"] = error
        if candidate is None or state.waiting == 0:
            state.end_of_round()
        if all(other.default_s or other.exhausted for other in progress.values()):
            line["estimated_ms"] = round(estimate_ms(progress.values()), 4)
        journal.append(line)

    def take(worker, label, value, error):
        kind, state, candidate, *files = label
        if kind in job_s:
            job_s[kind].append(time.monotonic() - worker.started)
        if kind == "search":
            state.waiting = len(value or [])
            state.exhausted = not value
            if error:
                journal.append({"task": state.task.key, "error": f"search: {error}"})
            to_build.extend((state, found) for found in value or [])
        elif kind == "build" and not error:
            if candidate is None:
                state.reference = value
            to_measure.append((state, candidate, value))
        else:
            record(state, candidate, value, error)
            if kind == "measure" and candidate is not None:
                os.remove(files[0])

    try:
        while time.monotonic() - start < limit_s and done < budget:
            draining = alone and bool(to_measure) and (draining or len(to_measure) >= ROUND)
            for builder in builders:
                if not builder.busy and not (alone and (draining or measurer.busy)):
                    hand_out_to(builder)
            if to_measure and not measurer.busy and not (alone and any(builder.busy for builder in builders)):
                state, candidate, file = to_measure.popleft()
                best_s = state.best_s if math.isfinite(state.best_s) else None
                arguments = (state.task.arguments, file, state.reference, device, tolerance, best_s)
                measurer.submit(("measure", state, candidate, file), MEASURE_TIMEOUT_S, measure, *arguments)
            busy = [worker for worker in (*builders, measurer) if worker.busy]
            if not busy:
                break  # every task is exhausted
            multiprocessing.connection.wait([worker.connection for worker in busy], timeout=0.2)
            for worker in busy:
                if outcome := worker.result():
                    take(worker, *outcome)
            if time.monotonic() > next_report:
                report(describe(progress.values(), done, done_before, budget, time.monotonic() - start))
                next_report = time.monotonic() + REPORT_S
        ended = done >= budget or time.monotonic() - start < limit_s
        if not any(state.best_s < math.inf for state in progress.values()):
            raise RuntimeError("no kernel of the model could be built and measured by TVM's default rules")
        database = {
            "origin": origin,
            "tune_time_s": round(spent_s + time.monotonic() - start, 1),
            "tune_trials": done,
            "asked_trials": asked_trials if ended else 0,
            "records": [best_record(state) for state in progress.values() if improved(state)],
        }
        write_database(path, database)
    finally:
        for worker in (*builders, measurer):
            worker.stop()


def restore(progress, database, trials):
    """Put what was measured before into `progress`; -> (seconds that it took, number of trials).

    From both: the database may come from another checkout, with a journal that began after it.
    """
    records = database["records"] if database else []
    spent_s, done = (database["tune_time_s"], database["tune_trials"]) if database else (0.0, 0)
    for trial in [*records, *trials]:
        spent_s = max(spent_s, trial.get("elapsed_s", 0.0))
        done = max(done, trial.get("trials", 0))
        if "space" in trial and trial["task"] in progress:
            progress[trial["task"]].trials.append((trial["space"], trial["decisions"], trial["seconds"], None))
    return spent_s, done


def improved(state):
    return state.default_s is not None and state.best_s < state.default_s


def best_record(state):
    space, decisions, seconds, _ = state.best
    return dict(zip(RECORD, (state.task.key, state.task.name, space, decisions, seconds, state.default_s)))


def estimate_ms(states):
    """-> milliseconds of one inference: the sum of the kernels' best times so far, without those not yet measured."""
    return sum(state.task.calls * state.best_s for state in states if math.isfinite(state.best_s)) * 1e3


def describe(states, done, done_before, budget, elapsed_s):
    known = sum(math.isfinite(state.best_s) for state in states)
    rate = (done - done_before) / max(elapsed_s, 1e-3)
    text = f"{done} of {budget} trials, {rate:.1f} trials/s, estimated {estimate_ms(states):.3f} ms"
    return text if known == len(states) else f"{text} ({known} of {len(states)} tasks)"

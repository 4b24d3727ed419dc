"""A task's design spaces: MetaSchedule's sketches of a schedule, with decisions left open, and what fits the device.

A candidate is the number of one of its task's design spaces and the decisions on it (decisions.py). MetaSchedule (Shao
et al., arXiv:2205.13603) gives the design spaces, the rules that make a sampled schedule whole, and the features. Its
sampler throws away 19 of 20 samples of a convolution for CUDA after 30 ms of work on each: DesignSpace.fits() is in its
place. And its design spaces for CUDA lack what a network at batch 1 needs most, sums that are split between blocks of
threads: rewrites.py adds them. What no schedule of MetaSchedule's comes near to are templates (templates/find.py): they
are design spaces too, with numbers from FIRST_TEMPLATE on.
"""

import dataclasses
import functools
import math
import typing

import numpy as np
import torch

from tvm_items.decisions import (
    Tile,
    adapt_decision,
    find_choice,
    is_tile,
    read_decision,
    sampling_instructions,
)
from tvm_items.rewrites import AS_IT_IS, UNSPLIT, find_rewrites, rewrite_product
from tvm_items.target import MAX_BLOCK_SHARED_BYTES, MAX_BLOCK_THREADS, WARP_THREADS, load_target
from tvm_items.templates.find import find_templates
from tvm_items.tensor_cores import pad_rows_for_tensor_cores, rules_for_bf16

MAX_VIRTUAL_THREADS = 8  # of a CUDA block, in MetaSchedule's rules
SPATIAL_PARTS = 5  # factors of a spatial loop's tile in MetaSchedule's rules for CUDA
FRAGMENT_BYTES = 16 * 16 * 2  # what a warp's tensor core instruction reads of an operand, in fp16 or bf16


class StagedOperand(typing.NamedTuple):
    """What a CUDA block stages of one operand in shared memory."""

    element_bytes: int
    strides: list[list[int]]  # for each dimension of the operand, its strides along the tiled loops


@dataclasses.dataclass
class DesignSpace:
    """One of a task's design spaces."""

    split: int  # what rewrite_product() is given before the trace is applied
    trace: object  # tvm.s_tir.schedule.Trace
    samplings: list  # the trace's sampling instructions
    choices: list  # what each of them can return: find_choice()
    stages: int  # copies of what is staged in shared memory: several where loads are pipelined
    operands: list[StagedOperand]  # empty where they are not known
    tensor_cores: bool

    def fits(self, decisions):
        """Returns False where a CUDA block would have too many or too few threads, or not enough shared memory.

        TVM finds that out too, but after 30 ms of work, and 19 of 20 random candidates for a convolution fail. The
        rules for CUDA cut a spatial loop into five (block, virtual thread, thread, two inner ones; for tensor cores
        the second is the block's too, and a thread is a warp) and a reduction into three.
        """
        tiles = [decision for decision in decisions if isinstance(decision, list)]
        spatial = [tile for tile in tiles if len(tile) == SPATIAL_PARTS]
        if not self.operands or not spatial:
            return True
        threads = math.prod(tile[2] for tile in spatial)
        if self.tensor_cores:
            threads, first_staged = threads * WARP_THREADS, 2
        else:
            first_staged = 1
            if math.prod(tile[1] for tile in spatial) > MAX_VIRTUAL_THREADS:
                return False
        extents = [math.prod(tile[first_staged if len(tile) == SPATIAL_PARTS else 1 :]) for tile in tiles]
        staged_bytes = self.stages * sum(bytes_of_operand(operand, extents) for operand in self.operands)
        return WARP_THREADS <= threads <= MAX_BLOCK_THREADS and staged_bytes <= MAX_BLOCK_SHARED_BYTES


def bytes_of_operand(operand, extents):
    """Returns the bytes that a block stages of an operand, for so many iterations of each tiled loop at once."""
    sizes = [1 + sum(stride * (n - 1) for stride, n in zip(row, extents)) for row in operand.strides]
    return operand.element_bytes * math.prod(sizes)


class DesignSpaces:
    """A task's design spaces, by number, and what of MetaSchedule makes candidates of them: rules, and features.

    As a sequence they are those of MetaSchedule; `numbers` has all. module_json: the task's IRModule before scheduling.
    target_json: find_target()'s.
    """

    def __init__(self, module_json, target_json):
        import tvm

        self.target = load_target(target_json)
        self.module = tvm.ir.load_json(module_json)
        self.templates = {template.number: template for template in find_templates(self.module, self.target)}
        kind = self.target.kind.name
        if kind == "cuda" and "float16" in module_json:  # or bfloat16
            kind = "cuda-tensorcore"
        self.kind, self.is_bf16 = kind, "bfloat16" in module_json
        self.with_tensor_cores = kind == "cuda-tensorcore"

    @functools.cached_property
    def numbers(self):
        """The numbers of all design spaces."""
        return [*range(len(self)), *self.templates]

    @functools.cached_property
    def _spaces(self):
        """MetaSchedule's design spaces. They take a third of a second to generate, which a template does without."""
        from tvm.s_tir import Schedule
        from tvm.s_tir import meta_schedule as ms

        kind, found = self.kind, []
        rules = dict.fromkeys(("sch_rules", "postprocs", "mutator_probs"), kind)
        rewrites_rows = self.with_tensor_cores and self.is_bf16
        if rewrites_rows:
            rules["sch_rules"] = rules_for_bf16()
        for split in find_rewrites(self.module) if kind.startswith("cuda") else [AS_IT_IS]:
            self.context = ms.TuneContext(
                rewrite_product(Schedule(self.module), split).mod,
                target=self.target,
                space_generator=ms.space_generator.PostOrderApply(**rules),
                num_threads=1,
                rand_state=1,  # the same spaces in the same order in every process
            ).clone()
            try:
                schedules = self.context.generate_design_space()
            except Exception:  # MetaSchedule's rules cannot take every function: several reductions, as of an attention
                continue
            if rewrites_rows:
                for schedule in schedules:
                    pad_rows_for_tensor_cores(schedule)
            found += [self._read_space(schedule.trace, split) for schedule in schedules]
        self.extractor = ms.feature_extractor.PerStoreFeature()
        return found

    def __len__(self):
        return len(self._spaces)

    def __getitem__(self, number):
        return self.templates.get(number) or self._spaces[number]

    def _read_space(self, trace, split):
        from tvm.s_tir import Schedule

        samplings = sampling_instructions(trace)
        choices = [find_choice(trace, instruction) for instruction in samplings]
        tensor_cores = any(instruction.kind.name == "Blockize" for instruction in trace.insts)
        if split > UNSPLIT and not tensor_cores and isinstance(choices[0], Tile):
            choices[0] = choices[0]._replace(is_whole=True)  # a block has one part of the sum
        extents = [math.prod(read_decision(trace, tile)) for tile in filter(is_tile, samplings)]
        if self.target.kind.name != "cuda" or not extents:
            operands = []
        elif tensor_cores:
            operands = find_operands_of_tensor_cores(extents)
        else:
            operands = find_operands(rewrite_product(Schedule(self.module), split), extents)
        return DesignSpace(split, trace, samplings, choices, count_stages(trace), operands, tensor_cores)

    def realize(self, number, decisions):
        """Returns (scheduled IRModule, decisions) of a candidate, or None where the target forbids it.

        number: of the design space; None too where there is none of that number. A decision that is None is drawn by
        TVM.
        """
        if number in self.templates:
            return (self[number].realize(decisions), decisions) if self.fits_template(number, decisions) else None
        if number not in self.numbers:
            return None
        applied = self._apply(number, decisions)
        return applied and (applied[0].mod, applied[1])

    def _apply(self, number, decisions, seed=1, verify=True):
        """Returns (MetaSchedule's schedule with all rules applied, its decisions), or None where the target forbids it.

        verify: lower it to see what the target says, which is half of the work. seed: for what TVM draws.
        """
        from tvm.s_tir import Schedule
        from tvm.s_tir.meta_schedule.postproc import VerifyGPUCode
        from tvm.s_tir.schedule import Trace

        space = self[number]
        given = {inst: decision for inst, decision in zip(space.samplings, decisions) if decision is not None}
        schedule = Schedule(self.module, seed=seed, debug_mask=0, error_render_level="none")
        rewrite_product(schedule, space.split)
        try:
            Trace(space.trace.insts, given).apply_to_schedule(schedule, remove_postproc=True)
            made = [read_decision(schedule.trace, inst) for inst in sampling_instructions(schedule.trace)]
            schedule.enter_postproc()
            rules = self.context.space_generator.postprocs
            if not all(rule.apply(schedule) for rule in rules if verify or not isinstance(rule, VerifyGPUCode)):
                return None
        except Exception:  # a decision that does not fit another one
            return None
        return schedule, made

    def fits_template(self, number, decisions):
        """Returns whether decisions are a template's, each among its options, and the device can run what they make."""
        choices = self[number].choices
        return (
            len(decisions) == len(choices)
            and all(isinstance(decision, int) for decision in decisions)
            and all(0 <= decision < count for decision, count in zip(decisions, choices))
            and self[number].fits(decisions)
        )

    def sample(self, number, decisions, seed):
        """Returns (decisions, features) of a candidate that fits, or None where the target forbids it.

        seed: for decisions that are None, which TVM draws. features: what a cost model of the design space's kind sees,
        as an fp32 array: of MetaSchedule's schedules (stores, features), of a template its decisions in one row.
        """
        from tvm.s_tir.meta_schedule import MeasureCandidate

        if number in self.templates:
            return decisions, np.array([decisions], "float32")
        # In fp32 fits() lets hardly anything pass that TVM refuses. Of candidates for tensor cores it is one in ten.
        verify = self.with_tensor_cores or not self[number].operands
        applied = self._apply(number, decisions, seed, verify)
        if applied is None:
            return None
        schedule, made = applied
        (features,) = self.extractor.extract_from(self.context, [MeasureCandidate(schedule, [])])
        return made, features.numpy().astype("float32")

    def adapt(self, number, decisions, loosely=False):
        """Returns the decisions of a candidate for another task as they fit this one, None where they do not.

        number: of the design space, in both tasks. adapt_decision() says what changes, and what `loosely` means.
        """
        if not (number in self.templates or number in self.numbers) or len(decisions) != len(self[number].choices):
            return None
        space = self[number]
        adapted = [adapt_decision(choice, decision, loosely) for choice, decision in zip(space.choices, decisions)]
        if None in adapted:
            return None
        fits = self.fits_template(number, adapted) if number in self.templates else space.fits(adapted)
        return adapted if fits else None


cached_design_spaces = functools.lru_cache(maxsize=None)(DesignSpaces)  # a worker meets a task many times


def count_stages(trace):
    """Returns how many copies of what is staged in shared memory a design space keeps: several where it pipelines."""
    for inst in trace.insts:
        if inst.kind.name == "Annotate" and str(inst.attrs[0]) == "software_pipeline_stage":
            return int(inst.inputs[1][-1]) + 1
    return 1


def find_operands_of_tensor_cores(extents):
    """Returns the StagedOperands of a design space for tensor cores; `extents` are those of its tiled loops.

    Whatever the operator was, it has been made a matrix product (m, n, k) in tiles of 16. Empty where it has not.
    """
    if len(extents) != 3:
        return []
    m, n, k = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    return [StagedOperand(FRAGMENT_BYTES, [m, k]), StagedOperand(FRAGMENT_BYTES, [n, k])]


def find_operands(schedule, extents):
    """Returns the StagedOperands of the operator whose loops have the `extents` that a design space tiles.

    Empty where there is no such operator in the schedule, or where one of its indices is not linear in its loops.
    """
    from tvm.sym import detect_linear_equation

    for block in map(schedule.get, schedule.get_child_blocks(schedule.get_sblock("root"))):
        if [int(loop.dom.extent) for loop in block.iter_vars] == extents:
            loops = [loop.var for loop in block.iter_vars]
            operands = []
            for read in block.reads:
                rows = [detect_linear_equation(index.min, loops)[:-1] for index in read.region]
                if not all(rows):
                    return []
                element_bytes = getattr(torch, str(read.source.ty.dtype)).itemsize
                operands.append(StagedOperand(element_bytes, [list(map(int, row)) for row in rows]))
            return operands
    return []

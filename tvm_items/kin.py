"""What a library has for a model's tasks: schedules of the same kernels, and of their kin.

Kin is what computes the same on other extents, or the same product with other operators fused behind it. The idea is
Transfer-Tuning's (arXiv:2201.05587).
"""

import collections
import itertools
import math
import re
import typing

from tvm_items.records import describe_argument, parse_argument
from tvm_items.templates.find import FIRST_TEMPLATE

MAX_KNOWN, MAX_KIN = 4, 32  # schedules for a task; of kin, which may not fit, more than will be measured
BEHIND = 1.1  # times what a twin takes: with more, a task tries its kin before anything else
# The operators that make a schedule what it is, whatever is fused with them: words of the names that TVM gives tasks.
PRODUCTS = {"matmul", "dense", "conv1d", "conv2d", "conv3d"}
MAIN_OPERATORS = PRODUCTS | {"attention", "norm", "softmax"}


class Start(typing.NamedTuple):
    """What a library has for a task: (space, decisions) each, the likeliest first."""

    known: list  # of the same kernel
    kin: list  # of its kin, to be adapted
    is_behind: bool = False  # whether a twin, kin on the same extents, takes clearly less time than what is known


def find_starts(tasks, library, arch, searches):
    """Returns {task's key: Start} for those of the Tasks that a Library has something for.

    arch: the architecture of this device: records of others that have it too go before the rest. searches: whether the
    tasks will be searched; if not, one whose kernel is known on this device gets that schedule and no others. A
    template's parameters mean the same for every product, of matrices or a convolution, in all dtypes: what is best for
    the kin of one operator and what templates are best for other products come in turns.
    """
    of_task, of_operator, templates = collections.defaultdict(list), collections.defaultdict(list), []
    for kernel in (*library.kernels.values(), *library.others):
        if kernel["space"] is not None:
            operator = read_operator(kernel["name"], kernel["arguments"])
            of_task[kernel["task"]].append(kernel)
            of_operator[operator].append(kernel)
            if kernel["space"] >= FIRST_TEMPLATE and operator.words[0] in PRODUCTS:
                templates.append(kernel)
    own = {id(kernel) for kernel in library.kernels.values()}

    def rank_of_origin(kernel):
        return (id(kernel) not in own, kernel["arch"] != arch)

    starts = {}
    for task in tasks:
        arguments = [describe_argument(*argument) for argument in task.arguments]
        here = library.kernels.get(task.key)
        if here and not searches:
            starts[task.key] = Start(schedules([here]), [])
            continue

        def rank(kernel, name=task.name, arguments=arguments):
            return (*distance(name, arguments, kernel), rank_of_origin(kernel))

        operator = read_operator(task.name, arguments)
        known = schedules(sorted(of_task[task.key], key=rank_of_origin))[:MAX_KNOWN]
        kin = schedules(k for k in sorted(of_operator[operator], key=rank) if k["task"] != task.key)
        if operator.words[0] in PRODUCTS:
            near = schedules(k for k in sorted(templates, key=rank) if k["task"] != task.key)
            kin = alternate(kin, [schedule for schedule in near if schedule not in kin])
        if known or kin:
            starts[task.key] = Start(known, kin[:MAX_KIN], here is not None and is_behind(here, of_operator[operator]))
    return starts


def is_behind(kernel, kernels):
    """Returns whether one of the Kernels, which have the same operator, is a twin of another one that is much faster.

    That is the same in fp16 and bf16, or with one operator fused more or less. TF32 and IEEE fp32 have the same dtypes.
    """

    def is_twin(other):
        different_form, steps, differences = distance(kernel["name"], kernel["arguments"], other)
        same_arithmetic = kernel["case"].endswith(".tf32") == other["case"].endswith(".tf32")
        return not different_form and steps == 0 and differences == 1 and same_arithmetic

    return any(BEHIND * other["seconds"] < kernel["seconds"] and is_twin(other) for other in kernels)


def alternate(ones, others):
    """Returns the elements of two lists in turns, and then what is left of the longer one."""
    pairs = itertools.zip_longest(ones, others)
    return [element for pair in pairs for element in pair if element is not None]


def schedules(kernels):
    """Returns the (space, decisions) of Kernels, each once; none of TVM's default schedule."""
    found = []
    for kernel in kernels:
        schedule = (kernel["space"], kernel["decisions"])
        if kernel["space"] is not None and schedule not in found:
            found.append(schedule)
    return found


def read_words(name):
    """Returns the operators in a task's name: ["matmul", "cast", "add"] of fused_matmul1_cast3_add4.

    The numbers are TVM's, which gives every function another name.
    """
    return [re.sub(r"\d+$", "", word) for word in name.removeprefix("fused_").split("_")]


class Operator(typing.NamedTuple):
    """What two tasks must have in common to be kin."""

    dtypes: tuple[str, ...]  # of the first input and the output; bf16 counts as fp16, which has the same schedules
    words: tuple[str, ...]  # one of the MAIN_OPERATORS, else the names of all that is fused


def read_operator(name, arguments):
    """Returns the Operator of a task.

    What is fused with one of the MAIN_OPERATORS does not count. arguments: of describe_argument() each: inputs, then
    the output.
    """
    words, dtypes = read_words(name), (parse_argument(text)[0] for text in (arguments[:1] + arguments[-1:]))
    main = next((word for word in words if word in MAIN_OPERATORS), None)
    return Operator(tuple(dtype.replace("bfloat", "float") for dtype in dtypes), (main,) if main else tuple(words))


def distance(name, arguments, kernel):
    """Returns how far a Kernel is from a task in its extents and, second, in dtype and epilogue: smaller is nearer.

    In the extents that is the sum of |log2(one / other)| over the dimensions of both operands and the output; where
    these have other dimensions, over their sizes, and behind all others.
    """
    mine, theirs = (collections.Counter(read_words(text)) for text in (name, kernel["name"]))
    steps, same_form, same_dtypes = 0.0, True, True
    for one, other in zip(ends(arguments), ends(kernel["arguments"])):
        (dtype, one), (other_dtype, other) = (parse_argument(text) for text in (one, other))
        same_dtypes &= dtype == other_dtype
        if len(one) != len(other):
            one, other, same_form = [math.prod(one)], [math.prod(other)], False
        steps += sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in zip(one, other))
    differing = (mine - theirs) + (theirs - mine)
    return not same_form, round(steps, 3), differing.total() + (not same_dtypes)


def ends(arguments):
    """Returns of a task's arguments the first two, which a product multiplies, and the output, which is the last."""
    return [*arguments[:2], *arguments[-1:]]

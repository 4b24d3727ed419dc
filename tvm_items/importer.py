"""From PyTorch to TVM: torch.export, and TVM's importer to Relax with the dtypes that PyTorch computes in."""

import contextlib
import functools
import operator
import os
import unittest.mock

import torch

from tvm_items.attention import SDPA, convert_attention, decompose_attention
from tvm_items.attention_in_pieces import join_attention
from tvm_items.complex_numbers import make_real
from tvm_items.converters import CONVERTERS
from tvm_items.exported_graph import (
    clamp_integers_at_both_ends,
    combine_booleans,
    compute_constants_once,
    count_from_the_front,
    count_indices_from_the_front,
    count_upwards,
    cut_windows,
    drop_empty_parts,
    drop_numbers_from_output,
    keep_statistics_in_fp32,
    shorten_convolutions,
    sort_largest,
    sort_plainly,
    subtract_integers_by_adding,
)
from tvm_items.in_place import check_writes, convert_index_copy, drop_writes_of_the_same, keep_writes
from tvm_items.known_values import fix_inputs, fold_known_values, fold_what_tvm_lacks, has_unknown_sizes, known_values
from tvm_items.loops import loops_over_all_places
from tvm_items.masks import masks_of_ones_left_out, watch_masks
from tvm_items.selected_rows import compute_all_rows

aten = torch.ops.aten


def export_for_tvm(model, inputs, whole_attention=False):
    """Returns the model's decomposed torch.export.ExportedProgram for `inputs`, {name: tensor} for its forward.

    On the CPU: TVM 0.27 folds BatchNorm's buffers into constants and can hash those on the host only. Attention as
    matrix products: the decomposition of PyTorch's fused one for the CPU fails for gpt2 at batch size 2. With
    `whole_attention` it stays one operator where attention.py has it as one task. Where sizes depend on values, those
    that are known are taken for constants. Only a draft gets past an `if` on other values (BART clamps what overflows
    in fp16); it follows one branch and asserts the rest, which TVM does not know. Where a trace with masks may be of
    another function than eager PyTorch's, the one without is taken (masks.py). Raises the last NotImplementedError
    of the four, as that says what does not work, else what the first of them does.
    """
    model, inputs = model.cpu(), {name: tensor.cpu() for name, tensor in inputs.items()}
    table = torch.export.default_decompositions()
    table[aten.roll.default] = decompose_roll
    if whole_attention:
        table[SDPA] = decompose_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        error = of_other_meaning = None
        for export in (export_plainly, export_with_known_values, export_without_masks, export_draft):
            try:
                with watch_masks() as watch:
                    exported = export(model, inputs, table)
            except Exception as export_error:
                if error is None or isinstance(export_error, NotImplementedError):  # what is known not to work
                    error = export_error
            else:
                if not has_unknown_sizes(exported):
                    drop_writes_of_the_same(exported)
                    check_writes(exported)
                    if not watch.may_differ():
                        return exported
                    of_other_meaning = of_other_meaning or exported
    if of_other_meaning:  # the check of its output will say so
        return of_other_meaning
    raise error or ValueError("the sizes of its tensors depend on values of its inputs")


def decompose_roll(tensor, shifts, dims=()):
    """Returns torch.roll() as slices that change places, as Swin's windows are shifted.

    PyTorch decomposes it into a choice of rows by their numbers, which TVM fuses with nothing: two launches for an
    image.
    """
    if not dims:
        return decompose_roll(tensor.flatten(), shifts, (0,)).view(tensor.shape)
    for shift, dim in zip(shifts, dims):
        size = tensor.shape[dim]
        if size and shift % size:
            front = size - shift % size
            tensor = torch.cat([tensor.narrow(dim, front, size - front), tensor.narrow(dim, 0, front)], dim)
    return tensor


def decompose(exported, table):
    """Returns a program decomposed by a table, which changes where the program writes into its inputs."""
    keep_writes(exported, table)
    if table[SDPA] is decompose_attention:
        join_attention(exported)
    return exported.run_decompositions(table)


def export_plainly(model, inputs, table):
    return decompose(torch.export.export(model, (), inputs), table)


def export_with_known_values(model, inputs, table, masks=False):
    # The library's own checks of values, which eager PyTorch has passed, are traced as ones on unknown numbers.
    without_checks = unittest.mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    model, inputs = fix_inputs(model, inputs, masks)
    with known_values(model), without_checks, loops_over_all_places(model):
        exported = export_plainly(model, inputs, table)
    fold_known_values(exported)
    if has_unknown_sizes(exported):
        compute_all_rows(exported)
    return exported


def export_without_masks(model, inputs, table):
    """Returns a program that has no masks where all of them let everything through, as the harness's own do.

    Eager PyTorch leaves such masks out. What is traced keeps them, for whatever they may be, and there some models of
    transformers 5.17 make masks of a shape that they cannot use, or masks that say something else than none does.
    """
    with masks_of_ones_left_out():
        return export_with_known_values(model, inputs, table, masks=True)


def export_draft(model, inputs, table):
    """Returns a program that follows one branch at an `if` on values, without the assertions that it was that one.

    Raises ValueError where a size or an index would stay at the value that it has in `inputs`.
    """
    exported = decompose(torch.export.draft_export(model, (), inputs), table)
    for assertion in exported.graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        condition = assertion.args[0]
        if condition.target == operator.eq and is_whole_number(condition.args[0]):
            raise ValueError("a size or an index depends on values of its inputs")
        exported.graph.erase_node(assertion)
    exported.graph.eliminate_dead_code()
    return exported


def is_whole_number(node):
    """Returns whether a node is a number that was read out of a tensor of whole numbers; of booleans is none."""
    is_read = getattr(node, "target", None) == aten._local_scalar_dense.default
    return is_read and node.args[0].meta["val"].dtype != torch.bool


def import_to_relax(exported):
    """Returns (Relax module, list of weights as TVM tensors) of a decomposed ExportedProgram.

    What TVM 0.27's importer refuses or gets wrong is rewritten in the program first, which changes it.
    """
    from torch.onnx._internal.fx.passes import InsertTypePromotion
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    compute_constants_once(exported)
    fold_what_tvm_lacks(exported)
    make_real(exported)
    subtract_integers_by_adding(exported.graph)
    count_indices_from_the_front(exported)
    clamp_integers_at_both_ends(exported.graph)
    sort_largest(exported.graph)
    sort_plainly(exported.graph)
    count_upwards(exported.graph)
    combine_booleans(exported.graph)
    cut_windows(exported.graph)
    drop_empty_parts(exported.graph)
    drop_numbers_from_output(exported)
    # TVM refuses the logarithm of an integer tensor, and a sum of booleans and integers breaks its code generator:
    # PyTorch's own pass for its ONNX exporter makes the casts explicit.
    InsertTypePromotion(exported.graph_module).run()
    keep_statistics_in_fp32(exported)
    count_from_the_front(exported.graph)
    shorten_convolutions(exported.graph)
    converters = CONVERTERS | {
        "scaled_dot_product_attention.default": convert_attention,
        "index_copy.default": convert_index_copy,
    }
    with operators_in_input_dtype():
        module = from_exported_program(
            exported, keep_params_as_input=True, custom_convert_map=converters, run_ep_decomposition=False
        )
    module, weights = relax.frontend.detach_params(module)
    return module, weights["main"]


# ---- Dtypes --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def operators_in_input_dtype():
    """Makes TVM's importer give operators their inputs' dtype while it lasts, as PyTorch does.

    TVM 0.27 gives convolutions and matrix products fp32 results whatever the inputs are, and then cannot add a bias in
    fp16 or bf16. BatchNorm's results it calls fp16 and lowers to fp32, which the next operators may not go with; other
    normalizations, powers and, on CUDA, averages over a grid of a given size it does not have in bf16. Sums, averages,
    normalizations and powers are still computed in fp32, then rounded: PyTorch does so too.
    """
    from tvm import relax

    op, nn = relax.op, relax.op.nn
    wrappers = {(op.linear_algebra, "matmul"): rounded_to_input_dtype}
    for name in ("conv1d", "conv2d", "conv3d", "conv1d_transpose", "conv2d_transpose"):
        wrappers[nn, name] = rounded_to_input_dtype
    wrappers[nn, "batch_norm"] = functools.partial(computed_in_fp32, dtypes=("float16", "bfloat16"), outputs=3)
    in_fp32 = "layer_norm", "group_norm", "instance_norm", "adaptive_avg_pool2d"
    for module, name in ((op, "power"), *((nn, name) for name in in_fp32)):
        wrappers[module, name] = functools.partial(computed_in_fp32, dtypes=("bfloat16",))
    for name in ("asin", "acos", "asinh", "acosh", "atanh"):  # CUDA code generation has them in fp32 only
        wrappers[op, name] = functools.partial(computed_in_fp32, dtypes=("float16", "bfloat16"))
    with contextlib.ExitStack() as stack:
        for (module, name), wrapper in wrappers.items():
            stack.enter_context(unittest.mock.patch.object(module, name, wrapper(getattr(module, name))))
        yield


def rounded_to_input_dtype(operator):
    """Returns the Relax operator with its fp32 result rounded to the dtype of its first argument."""
    from tvm import relax

    @functools.wraps(operator)
    def call(x, *args, **kwargs):
        result = operator(x, *args, **kwargs)
        return result if x.ty.dtype == "float32" else relax.op.astype(result, x.ty.dtype)

    return call


def computed_in_fp32(operator, dtypes, outputs=1):
    """Returns the Relax operator for arguments in one of `dtypes`: they are cast to fp32, and each result back."""
    from tvm import relax

    def dtype_of(value):  # None of an expression that has no type yet
        return getattr(value.ty, "dtype", None)

    def cast(value):
        is_to_be_cast = isinstance(value, relax.Expr) and dtype_of(value) != "float32"
        return relax.op.astype(value, "float32") if is_to_be_cast else value

    @functools.wraps(operator)
    def call(*args, **kwargs):
        found = [dtype_of(value) for value in (*args, *kwargs.values()) if isinstance(value, relax.Expr)]
        dtype = next((each for each in dtypes if each in found), None)
        if dtype is None:
            return operator(*args, **kwargs)
        results = operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
        if outputs == 1:
            return relax.op.astype(results, dtype)
        return relax.Tuple([relax.op.astype(relax.TupleGetItem(results, i), dtype) for i in range(outputs)])

    return call

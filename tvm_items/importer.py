"""From PyTorch to TVM: torch.export, what is rewritten in the exported graph, and TVM's importer to Relax."""

import contextlib
import functools
import unittest.mock

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

aten = torch.ops.aten


def export_for_tvm(model, inputs):
    """Returns the model's decomposed torch.export.ExportedProgram for `inputs`, {name: tensor} for its forward.

    On the CPU: TVM 0.27 folds BatchNorm's buffers into constants and can hash those on the host only. Attention as
    matrix products: the decomposition of PyTorch's fused one for the CPU fails for gpt2 at batch size 2. Only a draft
    gets past an `if` on values (BART clamps what overflows in fp16); it follows one branch and asserts the rest, which
    TVM does not know.
    """
    arguments = model.cpu(), (), {name: tensor.cpu() for name, tensor in inputs.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        try:
            return torch.export.export(*arguments).run_decompositions()
        except GuardOnDataDependentSymNode:
            exported = torch.export.draft_export(*arguments).run_decompositions()
    for assertion in exported.graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        exported.graph.erase_node(assertion)
    exported.graph.eliminate_dead_code()
    return exported


def import_to_relax(exported):
    """Returns (Relax module, list of weights as TVM tensors) of a decomposed ExportedProgram.

    What TVM 0.27's importer refuses or gets wrong is rewritten in the program first, which changes it.
    """
    from torch.onnx._internal.fx.passes import InsertTypePromotion
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    subtract_integers_by_adding(exported.graph)
    # TVM refuses the logarithm of an integer tensor, and a sum of booleans and integers breaks its code generator:
    # PyTorch's own pass for its ONNX exporter makes the casts explicit.
    InsertTypePromotion(exported.graph_module).run()
    count_from_the_front(exported.graph)
    converters = {"convert_element_type.default": convert_element_type, "any.default": convert_any}
    with operators_in_input_dtype():
        module = from_exported_program(
            exported, keep_params_as_input=True, custom_convert_map=converters, run_ep_decomposition=False
        )
    module, weights = relax.frontend.detach_params(module)
    return module, weights["main"]


# ---- What is rewritten in the exported graph ------------------------------------------------------------------------


def subtract_integers_by_adding(graph):
    """Makes number - tensor of integers a sum, in place: PyTorch's type promotion pass cannot subtract there.

    XLNet does so with its mask.
    """
    for node in graph.find_nodes(op="call_function", target=aten.sub.Tensor):
        number, tensor = node.args
        if not isinstance(number, torch.fx.Node) and not tensor.meta["val"].is_floating_point() and not node.kwargs:
            with graph.inserting_before(node):
                negative = graph.call_function(aten.neg.default, (tensor,))
            negative.meta["val"] = -tensor.meta["val"]
            node.target, node.args = aten.add.Tensor, (negative, number)


def count_from_the_front(graph):
    """Replaces negative indices of select() and negative axes of squeeze(), in place.

    With a negative index, as in hidden[:, -1], the kernel would read in front of the tensor. With a negative axis
    ConvertLayout, which tvm_tune uses, runs out of memory.
    """
    for node in graph.nodes:
        if node.target == aten.select.int and node.args[2] < 0:
            source, dim, index = node.args
            node.args = (source, dim, index + source.meta["val"].shape[dim])
        elif node.target == aten.squeeze.dims:
            source, dims = node.args
            node.args = (source, [dim % source.meta["val"].ndim for dim in dims])


# ---- What TVM's importer does not know ------------------------------------------------------------------------------
# A converter gets a node of the exported graph and TVM's importer, and returns the node's value as a Relax variable.


def convert_element_type(node, importer):
    """Converts the cast that PyTorch's type promotion pass inserts."""
    from tvm import relax

    dtype = str(node.kwargs["dtype"]).removeprefix("torch.")
    return importer.block_builder.emit(relax.op.astype(importer.env[node.args[0]], dtype))


def convert_any(node, importer):
    """Converts any() of a whole tensor, by which T5 sees overflow in fp16.

    Axis by axis: TVM's default schedule gives a reduction to a scalar one thread of the GPU.
    """
    from tvm import relax

    largest = relax.op.astype(importer.env[node.args[0]], "int32")
    for _ in node.args[0].meta["val"].shape:
        largest = importer.block_builder.emit(relax.op.max(largest, axis=-1))
    return importer.block_builder.emit(relax.op.astype(largest, "bool"))


@contextlib.contextmanager
def operators_in_input_dtype():
    """Makes TVM's importer give operators their inputs' dtype while it lasts, as PyTorch does.

    TVM 0.27 gives convolutions and matrix products fp32 results whatever the inputs are, and then cannot add a bias in
    fp16 or bf16. BatchNorm's results it calls fp16 and lowers to fp32, which the next operators may not go with; other
    normalizations, and powers, it does not have in bf16. Sums, normalizations and powers are still computed in fp32,
    then rounded: PyTorch does so too.
    """
    from tvm import relax

    op, nn = relax.op, relax.op.nn
    wrappers = {(op.linear_algebra, "matmul"): rounded_to_input_dtype}
    for name in ("conv1d", "conv2d", "conv3d", "conv1d_transpose", "conv2d_transpose"):
        wrappers[nn, name] = rounded_to_input_dtype
    wrappers[nn, "batch_norm"] = functools.partial(computed_in_fp32, dtypes=("float16", "bfloat16"), outputs=3)
    for module, name in ((op, "power"), (nn, "layer_norm"), (nn, "group_norm"), (nn, "instance_norm")):
        wrappers[module, name] = functools.partial(computed_in_fp32, dtypes=("bfloat16",))
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

    def cast(value):
        return relax.op.astype(value, "float32") if isinstance(value, relax.Expr) else value

    @functools.wraps(operator)
    def call(*args, **kwargs):
        # Of the last tensor: the first may be an expression that has no type yet.
        *_, tensor = (value for value in (*args, *kwargs.values()) if isinstance(value, relax.Expr))
        dtype = tensor.ty.dtype
        if dtype not in dtypes:
            return operator(*args, **kwargs)
        results = operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
        if outputs == 1:
            return relax.op.astype(results, dtype)
        return relax.Tuple([relax.op.astype(relax.TupleGetItem(results, i), dtype) for i in range(outputs)])

    return call

"""The Relax module, made better to tune: one TIR function for each distinct fused operator, channels last."""

from tvm_items.graph import simplify
from tvm_items.importer import import_to_relax
from tvm_items.reductions import fuse_around_reductions
from tvm_items.templates.product_task import ALLOW_TF32


def tuned_module(exported, target, allow_tf32=False):
    """Returns (prepared Relax module, the model's weights as TVM tensors) of a decomposed ExportedProgram.

    The module has a function for each task, not yet scheduled: prepare() says more. The program is changed. allow_tf32:
    whether products in fp32 may be computed on tensor cores, with operands rounded to TF32.
    """
    simplify(exported)
    module, weights = import_to_relax(exported)
    module = prepare(module, target)
    return (mark_tf32(module) if allow_tf32 else module), weights


def mark_tf32(module):
    """Returns a module whose TIR functions say that TF32 may be used: see find_templates() in templates/find.py."""
    import tvm

    functions = {
        name: function.with_attr(ALLOW_TF32, True) if isinstance(function, tvm.tirx.PrimFunc) else function
        for name, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def prepare(module, target):
    """Returns the Relax module with one TIR function for each distinct fused operator, not yet scheduled.

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
        fuse_around_reductions(),
        relax.transform.RewriteDataflowReshape(),  # a reshape launches nothing: there is nothing to tune
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes)(module)


def cancel_permutations():
    """Returns a pass that makes one of two permutations in a row, and nothing of one that changes nothing."""
    import tvm
    from tvm import relax
    from tvm.relax.dpl import is_op, rewrite_call, wildcard

    inner = is_op("relax.permute_dims")(wildcard())
    outer = is_op("relax.permute_dims")(inner)

    def merge_two(call, matched):
        first = matched[inner]
        first_axes = axes_of(first)
        return permute(first.args[0], [first_axes[axis] for axis in axes_of(call)])

    def drop_identity(call, matched):
        return permute(call.args[0], axes_of(call))

    @tvm.ir.transform.module_pass(opt_level=0)
    def cancel(module, _):
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                merged = rewrite_call(outer, merge_two, function)
                module.update_func(name, rewrite_call(inner, drop_identity, merged))
        return relax.transform.DeadCodeElimination(["main"])(module)

    return cancel


def axes_of(permutation):
    """Returns the axes of a call of permute_dims, which without any reverses them all."""
    if permutation.attrs.axes:
        return [int(axis) for axis in permutation.attrs.axes]
    return list(reversed(range(permutation.args[0].ty.ndim)))


def permute(source, axes):
    """Returns the Relax expression `source` with its axes in this order: itself where that is theirs."""
    from tvm import relax

    return source if axes == sorted(axes) else relax.op.permute_dims(source, axes)

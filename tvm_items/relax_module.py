"""The Relax module, made better to tune: one TIR function for each distinct fused operator, channels last."""

from tvm_items.channels_last import LAYOUTS, cancel_permutations, clear_the_way, widen_channels
from tvm_items.gates import fuse_gates
from tvm_items.graph import simplify
from tvm_items.importer import import_to_relax
from tvm_items.in_place import fuse_into_writes
from tvm_items.reductions import fuse_around_reductions, size_of
from tvm_items.relax_rewrites import axes_of, multiply_transposed, mutate_functions, name_of, permute, weights_of
from tvm_items.residuals import fuse_into_epilogues
from tvm_items.target import is_ampere_or_later
from tvm_items.tf32 import mark_tf32, round_operands


def tuned_module(exported, target, allow_tf32=False):
    """Returns (prepared Relax module, the model's weights as TVM tensors) of a decomposed ExportedProgram.

    The module has a function for each task, not yet scheduled: prepare() says more. The program is changed. allow_tf32:
    whether products in fp32 may be computed on tensor cores, with operands rounded to TF32, where the target has those.
    """
    has_templates = is_ampere_or_later(target)
    simplify(exported, with_gates=has_templates)
    module, weights = import_to_relax(exported)
    return prepare(module, target, allow_tf32 and has_templates), weights


def prepare(module, target, allow_tf32):
    """Returns the Relax module with one TIR function for each distinct fused operator, not yet scheduled.

    Operators on weights alone go into a function of their own, main_transform_params, which is run once. allow_tf32:
    whether products in fp32 are computed with operands rounded to TF32.
    """
    import tvm
    from tvm import relax

    passes = [
        clear_the_way(),
        relax.transform.ConvertLayout(LAYOUTS),
        widen_channels(allow_tf32),
        cancel_permutations(),
        relax.transform.EliminateCommonSubexpr(),
        read_weights_along_terms(target),
        *([round_operands()] if allow_tf32 else []),
        relax.transform.LiftTransformParams(),
        *relax.pipeline.library_dispatch_passes(target),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        *([fuse_gates()] if is_ampere_or_later(target) else []),
        fuse_around_reductions(),
        *([fuse_into_epilogues()] if is_ampere_or_later(target) else []),
        fuse_into_writes(),
        relax.transform.RewriteDataflowReshape(),  # a reshape launches nothing: there is nothing to tune
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        module = tvm.transform.Sequential(passes)(module)
    return mark_tf32(module) if allow_tf32 else module


def read_weights_along_terms(target):
    """Returns a pass that lets some products read their weight as Linear layers have it, (columns, terms).

    Those of Linear layers of 16 bits with, say, BERT's 30522 columns: lines of the transposed weight would not begin at
    multiples of 16 bytes, as TMA and wide copies want them. And on CUDA those of a single row, as a decode step has:
    there a product takes the time to read its weight, and a thread that reads along the terms has a part of one sum
    only (templates/gemv.py).
    """
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Reader(PyExprMutator):
        def __init__(self, module):
            super().__init__(module)
            self.weights = set(weights_of(module["main"]))

        def visit_call_(self, call):
            weight = self.find_weight(call)
            if weight is None:
                return super().visit_call_(call)
            source = self.visit_expr(call.args[0])
            return self.builder_.call_te(
                multiply_transposed, source, weight, call.ty.dtype, primfunc_name_hint="matmul"
            )

        def find_weight(self, call):
            """Returns the Relax variable of such a weight, (columns, terms), None where the call is of another kind."""
            if name_of(call) != "relax.matmul" or not isinstance(call.args[1], relax.Var):
                return None
            right = call.args[1]
            permutation = self.lookup_binding(right)
            is_linear = name_of(permutation) == "relax.permute_dims"
            if right.ty.ndim != 2 or (is_linear and axes_of(permutation) != [1, 0]):
                return None
            if not is_linear and right not in self.weights:
                return None
            terms, columns = map(int, right.ty.shape)
            is_odd = is_linear and columns % 8 != 0 and right.ty.dtype in ("float16", "bfloat16")
            is_for_one_row = target.kind.name == "cuda" and size_of(call.args[0]) == terms
            if terms % 8 or not (is_odd or is_for_one_row):
                return None
            return permutation.args[0] if is_linear else self.builder_.emit(permute(right, [1, 0]))

    return mutate_functions(Reader)

"""TF32: operands of products are rounded where they are made, instead of each time that a kernel reads them.

Tensor cores leave out the last 13 bits of an operand in fp32, so that it has to be rounded first. sm_90 has no
instruction for that: it takes two for each element that a thread reads, and a convolution reads each of them often.
Weights are rounded once, before the first inference. What only products read is rounded by the kernel that makes it.
"""

import collections
import math

from tvm_items.reductions import blocks_of
from tvm_items.relax_rewrites import (
    convolution_like,
    multiply_transposed,
    mutate_functions,
    name_of,
    permute,
    weights_of,
)
from tvm_items.templates.expressions import rounded_to_tf32
from tvm_items.templates.gemv import MAX_ROWS
from tvm_items.templates.product_task import ALLOW_TF32, ROUNDED

PRODUCTS = frozenset(f"relax.{name}" for name in "matmul nn.conv1d nn.conv2d nn.conv3d".split())
COPIES = {"relax.permute_dims", "relax.nn.pad"}  # of images, into the layout of a product: a kernel of their own
# What is elementwise behind one of these fuses with it.
BEGINNINGS = PRODUCTS | COPIES | {"relax.nn.layer_norm", "relax.nn.rms_norm"}
ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in "add subtract multiply divide maximum minimum tanh sigmoid clip".split()
    + "nn.relu nn.gelu nn.gelu_tanh nn.silu".split()
)
RESHAPE = "relax.reshape"
ROUNDING = "round_operand"


def round_operands():
    """Returns a pass over Relax modules that rounds weights of products, and what nothing but products reads.

    The latter only behind a product, a norm or a copy, with elementwise operators between, so that the rounding fuses
    with that. Weights lie along the terms, as tensor cores read them in TF32: (columns, terms), of convolutions OHWI.
    """
    import tvm
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @tvm.ir.transform.module_pass(opt_level=0)
    def round_all(module, _):
        (weights, results), rounded = find_operands(module["main"]), {}

        @mutator
        class Rounder(PyExprMutator):
            def visit_var_binding_(self, binding):
                super().visit_var_binding_(binding)
                if binding.var in results:
                    self.set_var_remap(binding.var, self.round(self.visit_expr(binding.var)))

            def visit_call_(self, call):
                visited = super().visit_call_(call)
                if name_of(call) not in PRODUCTS:
                    return visited
                axes = axes_along_terms(call) if call.args[1] in weights else None
                left = self.weight_or(call.args[0], visited.args[0])
                right = self.weight_or(call.args[1], visited.args[1], axes)
                if axes is None:
                    return relax.Call(visited.op, [left, right], visited.attrs, visited.ty_args)
                if name_of(call) == "relax.matmul":
                    dtype = call.ty.dtype
                    return self.builder_.call_te(multiply_transposed, left, right, dtype, primfunc_name_hint="matmul")
                return convolution_like(call, left, right, kernel_layout="OHWI")

            def weight_or(self, before, after, axes=None):
                """Returns what takes the place of `after`, an argument that was `before`: a rounded weight, or itself.

                axes: in which order the weight then has its axes; None: as they are.
                """
                if before not in weights:
                    return after
                key = before, axes and tuple(axes)
                if key not in rounded:
                    rounded[key] = self.round(after if axes is None else self.builder_.emit(permute(after, axes)))
                return rounded[key]

            def round(self, value):
                return self.builder_.emit_te(round_to_tf32, value, primfunc_name_hint=ROUNDING)

        return mutate_functions(Rounder)(module)

    return round_all


def axes_along_terms(call):
    """Returns the order of a weight's axes, of a product's second operand, in which it lies along the terms.

    None where it stays as it is: in products with a few rows, which have another template, in convolutions of groups,
    and where lines would not begin at multiples of 16 bytes.
    """
    weight = call.args[1].ty
    if name_of(call) == "relax.matmul":
        rows = math.prod(map(int, call.ty.shape)) // int(call.ty.shape[-1])
        return [1, 0] if weight.ndim == 2 and not int(weight.shape[0]) % 4 and rows > MAX_ROWS else None
    if name_of(call) == "relax.nn.conv2d" and call.attrs.kernel_layout == "HWIO" and call.attrs.groups == 1:
        return None if int(weight.shape[2]) % 4 else [3, 0, 1, 2]
    return None


def find_operands(function):
    """Returns what round_operands() rounds in a Relax function: {variables that are weights}, {other variables}."""
    from tvm import relax

    values = {b.var: b.value for block in function.body.blocks for b in block.bindings}
    from_weights = set(weights_of(function))
    uses = collections.defaultdict(list)
    for variable, value in values.items():
        read = relax.analysis.free_vars(value)
        for each in read:
            uses[each].append((variable, name_of(value)))
        if read and from_weights.issuperset(read):
            from_weights.add(variable)
    for returned in relax.analysis.free_vars(function.body.body):
        uses[returned].append((None, None))

    def feeds_products(variable):
        """Returns whether nothing reads a variable but products, and reshapes that feed products."""
        return bool(uses[variable]) and all(
            name in PRODUCTS or (name == RESHAPE and feeds_products(result)) for result, name in uses[variable]
        )

    def is_fused(variable):
        """Returns whether what is elementwise behind a variable fuses with the kernel that makes it."""
        value = values.get(variable)
        return name_of(value) in BEGINNINGS or (
            name_of(value) in ELEMENTWISE and any(len(uses[a]) == 1 and is_fused(a) for a in value.args)
        )

    weights, results = set(), set()
    for value in values.values():
        if name_of(value) not in PRODUCTS:
            continue
        for operand in value.args:
            if str(operand.ty.dtype) != "float32":
                continue
            if operand in from_weights:
                weights.add(operand)
                continue
            while name_of(values.get(operand)) == RESHAPE:
                operand = values[operand].args[0]
            if feeds_products(operand) and is_fused(operand):
                results.add(operand)
    return weights, results


def round_to_tf32(x):
    """Returns the tensor expression of x, fp32, rounded to TF32."""
    from tvm import te

    return te.compute(x.shape, lambda *place: rounded_to_tf32(x[place]), name=ROUNDING)


def mark_tf32(module):
    """Returns a module whose TIR functions have the attributes ALLOW_TF32 and ROUNDED.

    module: what round_operands() has changed, with fused functions in TIR and main_transform_params.
    """
    import tvm

    transforms = [name for name in module.functions if name.name_hint == "main_transform_params"]
    rounding = {name for name, function in module.functions.items() if makes_rounded(function)}
    rounded = rounded_results(module[transforms[0]], rounding, set())[1] if transforms else []
    main = module["main"]
    weights = {weight for weight, is_rounded in zip(weights_of(main), rounded) if is_rounded}
    calls, _ = rounded_results(main, rounding, weights)
    functions = {}
    for name, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            function = function.with_attr(ALLOW_TF32, True)
            every_call = zip(*calls.get(name, ()), strict=True)
            if numbers := [number for number, are_rounded in enumerate(every_call) if all(are_rounded)]:
                function = function.with_attr(ROUNDED, numbers)
        functions[name] = function
    return tvm.IRModule(functions, attrs=module.attrs)


def rounded_results(function, rounding, rounded):
    """Returns which values of a Relax function are rounded, as two results.

    The first is {TIR function: [[whether an argument is rounded, …] of a call, …]}, the second, where the function
    returns a tuple, [whether a field is rounded, …]. rounding: the TIR functions that round what they make. rounded:
    the variables that are when it begins.
    """
    import tvm

    rounded, calls, fields = set(rounded), {}, []
    for block in function.body.blocks:
        for binding in block.bindings:
            if name_of(binding.value) == "relax.call_tir":
                name, arguments = binding.value.args[:2]
                calls.setdefault(name, []).append([argument in rounded for argument in arguments.fields])
                if name in rounding:
                    rounded.add(binding.var)
            elif isinstance(binding.value, tvm.relax.Tuple):
                fields = [field in rounded for field in binding.value.fields]
            else:  # another name for it, or another shape
                source = binding.value.args[0] if name_of(binding.value) == RESHAPE else binding.value
                if source in rounded:
                    rounded.add(binding.var)
    return calls, fields


def makes_rounded(function):
    """Returns whether the last thing that a function does, one of TIR, is to round what its last parameter gets.

    Or the last but one, before it copies that into another shape.
    """
    blocks = blocks_of(function)
    written = list(function.params)[-1]
    for block in reversed(blocks):
        if not block.writes[0].source.same_as(written):
            return False
        if block.name_hint.startswith(ROUNDING):
            return True
        if not block.name_hint.startswith("T_reshape"):
            return False
        written = block.reads[0].source
    return False

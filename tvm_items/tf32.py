"""TF32: operands of products are rounded where they are made, instead of each time that a kernel reads them.

Tensor cores leave out the last 13 bits of an operand in fp32, so that it has to be rounded first. sm_90 has no
instruction for that: it takes two for each element that a thread reads, and a convolution reads each of them often.
Weights are rounded once, before the first inference. What only products read is rounded by the kernel that makes it.
"""

from tvm_items.reductions import blocks_of
from tvm_items.templates.product_task import ALLOW_TF32, ROUNDED

IS_PRODUCT = frozenset(("relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d"))
ELEMENTWISE = "add subtract multiply divide maximum minimum tanh sigmoid clip nn.relu nn.gelu nn.gelu_tanh nn.silu"
IS_ELEMENTWISE = frozenset(f"relax.{name}" for name in ELEMENTWISE.split())  # they fuse with a product before them
ROUNDING = "round_operand"


def round_operands():
    """Returns a pass over Relax modules that rounds weights of products, and what nothing but products reads.

    The latter only behind a product, with elementwise operators between, so that the rounding fuses with that.
    """
    import tvm
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @tvm.ir.transform.module_pass(opt_level=0)
    def round_all(module, _):
        operands, rounded = find_operands(module["main"]), {}

        @mutator
        class Rounder(PyExprMutator):
            def visit_call_(self, call):
                visited = super().visit_call_(call)
                if name_of(call) not in IS_PRODUCT:
                    return visited
                arguments = [self.round(*pair) for pair in zip(call.args, visited.args)]
                return tvm.relax.Call(visited.op, arguments, visited.attrs, visited.ty_args)

            def round(self, before, after):
                """Returns what takes the place of an argument, which was `before` in the function as it is."""
                if before not in operands:
                    return after
                if before not in rounded:
                    rounded[before] = self.builder_.emit_te(round_to_tf32, after, primfunc_name_hint=ROUNDING)
                return rounded[before]

        changed = Rounder(module)
        changed.builder_.update_func(module.get_global_var("main"), changed.visit_expr(module["main"]))
        return changed.builder_.get()

    return round_all


def find_operands(function):
    """Returns the set of variables of a Relax function that round_operands() rounds."""
    from tvm import relax

    values = {b.var: b.value for block in function.body.blocks for b in block.bindings}
    weights = set(list(function.params)[int(function.attrs["num_input"]) :])
    uses = {}
    for variable, value in values.items():
        read = relax.analysis.free_vars(value)
        for each in read:
            uses.setdefault(each, []).append(value)
        if read and weights.issuperset(read):
            weights.add(variable)

    def is_behind_product(variable):
        value = values.get(variable)
        name = name_of(value)
        return name in IS_PRODUCT or (
            name in IS_ELEMENTWISE and any(len(uses.get(a, ())) == 1 and is_behind_product(a) for a in value.args)
        )

    operands = set()
    for value in values.values():
        if name_of(value) in IS_PRODUCT:
            for operand in value.args:
                is_read_by_products = all(name_of(use) in IS_PRODUCT for use in uses.get(operand, ()))
                if str(operand.ty.dtype) == "float32" and (
                    operand in weights or (is_read_by_products and is_behind_product(operand))
                ):
                    operands.add(operand)
    return operands


def name_of(value):
    """Returns the name of the operator that a Relax expression calls, None where it calls none."""
    return getattr(getattr(value, "op", None), "name", None)


def round_to_tf32(x):
    """Returns the tensor expression of x, fp32, rounded to TF32's 10 bits: to nearest, ties away from zero."""
    from tvm import te, tirx

    def round_one(*place):
        bits = tirx.reinterpret("uint32", x[place]) + tirx.const(0x1000, "uint32")
        rounded = tirx.reinterpret("float32", bits & tirx.const(0xFFFFE000, "uint32"))
        return tirx.Select(tirx.isfinite(x[place]), rounded, x[place])

    return te.compute(x.shape, round_one, name=ROUNDING)


def mark_tf32(module):
    """Returns a module whose TIR functions have the attributes ALLOW_TF32 and ROUNDED.

    module: what round_operands() has changed, with fused functions in TIR and main_transform_params.
    """
    import tvm

    transforms = [name for name in module.functions if name.name_hint == "main_transform_params"]
    rounded = rounded_results(module, module[transforms[0]], set())[1] if transforms else []
    main = module["main"]
    weights = list(main.params)[int(main.attrs["num_input"]) :]
    calls, _ = rounded_results(module, main, {weight for weight, is_rounded in zip(weights, rounded) if is_rounded})
    functions = {}
    for name, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            function = function.with_attr(ALLOW_TF32, True)
            every_call = zip(*calls.get(name, ()), strict=True)
            if numbers := [number for number, are_rounded in enumerate(every_call) if all(are_rounded)]:
                function = function.with_attr(ROUNDED, numbers)
        functions[name] = function
    return tvm.IRModule(functions, attrs=module.attrs)


def rounded_results(module, function, rounded):
    """Returns which values of a Relax function are rounded, as two results.

    The first is {TIR function: [[whether an argument is rounded, …] of a call, …]}, the second, where the function
    returns a tuple, [whether a field is rounded, …]. rounded: the variables that are when it begins.
    """
    import tvm

    rounded, calls, fields = set(rounded), {}, []
    for block in function.body.blocks:
        for binding in block.bindings:
            if name_of(binding.value) == "relax.call_tir":
                name, arguments = binding.value.args[:2]
                calls.setdefault(name, []).append([argument in rounded for argument in arguments.fields])
                if makes_rounded(module[name]):
                    rounded.add(binding.var)
            elif isinstance(binding.value, tvm.relax.Tuple):
                fields = [field in rounded for field in binding.value.fields]
            elif binding.value in rounded:  # another name for it
                rounded.add(binding.var)
    return calls, fields


def makes_rounded(function):
    """Returns whether the last thing that a TIR function does is to round what it writes into its last parameter."""
    blocks = blocks_of(function)
    if not blocks or not blocks[-1].name_hint.startswith(ROUNDING):
        return False
    (written,) = blocks[-1].writes
    return written.source.same_as(list(function.params)[-1])

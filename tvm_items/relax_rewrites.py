"""What passes over Relax share: rewriting functions, joining calls, permutations, products and other convolutions."""

import collections

CALL, WRITE = "relax.call_tir", "relax.call_tir_inplace"  # of a TIR function, and of one that writes into an argument


def mutate_functions(mutator_class):
    """Returns a pass that rewrites each Relax function of a module by a PyExprMutator, and drops what is unused.

    A variable that is by then another one is replaced by that.
    """
    import tvm
    from tvm import relax

    @tvm.ir.transform.module_pass(opt_level=0)
    def mutate(module, _):
        mutator = mutator_class(module)
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                mutator.builder_.update_func(name, mutator.visit_expr(function))
        passes = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination(["main"])]
        return tvm.transform.Sequential(passes)(mutator.builder_.get())

    return mutate


def bindings_of(function):
    return [binding for block in function.body.blocks for binding in block.bindings]


def weights_of(function):
    """Returns those parameters of a Relax function that are weights, and no inputs."""
    return list(function.params)[int(function.attrs["num_input"]) :]


def name_of(value):
    """Returns the name of the operator that a Relax expression calls, None where it calls none."""
    return getattr(getattr(value, "op", None), "name", None)


def find_calls(function, operators=(CALL,)):
    """Returns {variable: call of a TIR function by one of the operators} for a Relax function, in its order."""
    return {binding.var: binding.value for binding in bindings_of(function) if name_of(binding.value) in operators}


def find_readers(function):
    """Returns {variable: the variables whose values read it} for a Relax function, a defaultdict of lists."""
    from tvm import relax

    readers = collections.defaultdict(list)
    for binding in bindings_of(function):
        for read in relax.analysis.free_vars(binding.value):
            readers[read].append(binding.var)
    return readers


def join_calls(module, groups, calls, last_first=False):
    """Returns a Relax module in whose `main` the calls of each group are one, of one TIR function.

    groups: lists of variables in their order, of which the last is what a group gives. calls: find_calls()'s.
    last_first: whether its name and its parameters begin with those of the group's last call.
    """
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder(module)
    joined = {group[-1]: call_as_one(builder, group, calls, last_first) for group in groups}
    builder.update_func(module.get_global_var("main"), with_values(module["main"], joined))
    passes = [relax.transform.DeadCodeElimination(["main"]), relax.transform.FuseTIR()]
    return tvm.transform.Sequential(passes)(builder.get())


def call_as_one(builder, group, calls, last_first):
    """Adds a function of the calls in a group, of which FuseTIR makes one TIR function, and returns a call of it."""
    from tvm import relax

    in_order = group[-1:] + group[:-1] if last_first else group
    outside = dict.fromkeys(argument for var in in_order for argument in calls[var].args[1] if argument not in group)
    inside = {argument: relax.Var(f"argument_{i}", argument.ty) for i, argument in enumerate(outside)}
    name = "fused_" + "_".join(calls[var].args[0].name_hint.removeprefix("fused_") for var in in_order)
    with builder.function(name, list(inside.values()), attrs={"Primitive": True}, private=True):
        with builder.dataflow():
            for var in group:
                before = calls[var]
                arguments = relax.Tuple([inside[argument] for argument in before.args[1]])
                call = relax.Call(before.op, [before.args[0], arguments], before.attrs, before.ty_args)
                inside[var] = builder.emit_output(call) if var == group[-1] else builder.emit(call)
        function = builder.emit_func_output(inside[group[-1]])
    return relax.Call(function, list(outside))


def with_values(function, values):
    """Returns a Relax function with other values for some of its variables: {variable: expression}."""
    from tvm import relax

    def replaced(binding):
        return relax.VarBinding(binding.var, values[binding.var]) if binding.var in values else binding

    blocks = [type(block)([replaced(binding) for binding in block.bindings]) for block in function.body.blocks]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def multiply_transposed(source, weight, dtype):
    """Returns the tensor expression of source (…, terms) times the transpose of weight (columns, terms), in a dtype."""
    from tvm import te

    term = te.reduce_axis((0, weight.shape[1]), name="k")
    return te.compute(
        [*source.shape[:-1], weight.shape[0]],
        lambda *place: te.sum(source[(*place[:-1], term)].astype(dtype) * weight[place[-1], term].astype(dtype), term),
        name="matmul",
    )


def convolution_like(call, source, weight, **changed):
    """Returns a convolution of other operands, with the attributes of a call but for those that are `changed`."""
    from tvm import relax

    names = ("strides", "padding", "dilation", "groups", "data_layout", "kernel_layout", "out_dtype")
    attributes = {name: getattr(call.attrs, name) for name in names} | changed
    return getattr(relax.op.nn, name_of(call).removeprefix("relax.nn."))(source, weight, **attributes)


def axes_of(permutation):
    """Returns the axes of a call of permute_dims, which without any reverses them all."""
    if permutation.attrs.axes:
        return [int(axis) for axis in permutation.attrs.axes]
    return list(reversed(range(permutation.args[0].ty.ndim)))


def permute(source, axes):
    """Returns the Relax expression `source` with its axes in this order: itself where that is theirs."""
    from tvm import relax

    return source if axes == sorted(axes) else relax.op.permute_dims(source, axes)

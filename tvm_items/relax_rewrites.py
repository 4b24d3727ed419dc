"""What passes over Relax share: rewriting functions, permutations, and products by a transposed weight."""


def mutate_functions(mutator_class):
    """Returns a pass that rewrites each Relax function of a module by a PyExprMutator, and drops what is unused."""
    import tvm
    from tvm import relax

    @tvm.ir.transform.module_pass(opt_level=0)
    def mutate(module, _):
        mutator = mutator_class(module)
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                mutator.builder_.update_func(name, mutator.visit_expr(function))
        return relax.transform.DeadCodeElimination(["main"])(mutator.builder_.get())

    return mutate


def multiply_transposed(source, weight, dtype):
    """Returns the tensor expression of source (…, terms) times the transpose of weight (columns, terms), in a dtype."""
    from tvm import te

    term = te.reduce_axis((0, weight.shape[1]), name="k")
    return te.compute(
        [*source.shape[:-1], weight.shape[0]],
        lambda *place: te.sum(source[(*place[:-1], term)].astype(dtype) * weight[place[-1], term].astype(dtype), term),
        name="matmul",
    )


def axes_of(permutation):
    """Returns the axes of a call of permute_dims, which without any reverses them all."""
    if permutation.attrs.axes:
        return [int(axis) for axis in permutation.attrs.axes]
    return list(reversed(range(permutation.args[0].ty.ndim)))


def permute(source, axes):
    """Returns the Relax expression `source` with its axes in this order: itself where that is theirs."""
    from tvm import relax

    return source if axes == sorted(axes) else relax.op.permute_dims(source, axes)

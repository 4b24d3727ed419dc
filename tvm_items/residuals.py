"""What a residual passes through before a product adds it: part of that product's epilogue, as T5's clamp is."""

from tvm_items.gates import is_product
from tvm_items.reductions import blocks_of, is_elementwise, is_reshape, reduced_axes, size_of
from tvm_items.relax_rewrites import find_calls, find_readers, join_calls


def fuse_into_epilogues():
    """Returns a pass over Relax modules that joins elementwise operators on one tensor to the products that add it.

    TVM's FuseOps puts what follows a product behind it, but nothing in front of what else its epilogue reads. Only
    where all that is left to read the operators' result are such products: then it is written no more.
    """
    import tvm

    @tvm.transform.module_pass(opt_level=0)
    def fuse(module, _):
        calls, readers = find_calls(module["main"]), find_readers(module["main"])

        def find_paths(var):
            """Returns the calls behind `var` up to each product that adds it, None where something else reads it."""
            paths = []
            for reader in readers[var]:
                if reader not in calls:
                    return None
                behind = [[]]
                if not is_residual(module, calls[reader], var):
                    behind = find_paths(reader) if is_view(module[calls[reader].args[0]]) else None
                if behind is None:
                    return None
                paths += [[reader, *path] for path in behind]
            return paths or None

        groups = {}  # one for each product: with two residuals it keeps one apart
        for var, call in calls.items():
            if is_of_one_tensor(module[call.args[0]], call, var):
                groups |= {path[-1]: [var, *path] for path in find_paths(var) or ()}
        return join_calls(module, list(groups.values()), calls, last_first=True)

    return fuse


def is_of_one_tensor(function, call, var):
    """Returns whether a call of a TIR function computes a tensor that is elementwise another one, and numbers."""
    tensors = [size for size in map(size_of, call.args[1]) if size != 1]
    if tensors != [size_of(var)] or tensors[0] <= 1:
        return False
    return is_elementwise(function) and not is_view(function)


def is_view(function):
    """Returns whether a TIR function only reshapes, which alone launches nothing."""
    return bool(blocks_of(function)) and is_reshape(function)


def is_residual(module, call, argument):
    """Returns whether a call is of a product whose epilogue alone reads an argument, as large as what it gives."""
    function, arguments = module[call.args[0]], list(call.args[1])
    if not is_product(function) or arguments.count(argument) != 1 or size_of(argument) != size_of(call):
        return False
    parameter, blocks = function.params[arguments.index(argument)], blocks_of(function)
    last = max(number for number, block in enumerate(blocks) if reduced_axes(block))
    return not any(region.source.same_as(parameter) for block in blocks[: last + 1] for region in block.reads)

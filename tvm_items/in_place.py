"""What a model writes into its inputs, as a decode step does into its cache: in place in TVM too.

torch.export makes such a write a function with a new tensor, and says which input that is to become. Here it is a
kernel again that writes one position of the input and leaves the rest where it is.
"""

import torch

from tvm_items.attention import constant_value
from tvm_items.reductions import is_without_reduction
from tvm_items.relax_rewrites import WRITE, find_calls, find_readers, join_calls

aten = torch.ops.aten
INDEX_COPY = aten.index_copy.default
OPAQUE = 8  # TVM's OpPatternKind of a function that FuseOps leaves alone


def writes_into_inputs(exported):
    """Returns whether a decomposed torch.export.ExportedProgram changes what it is given."""
    return bool(exported.graph_signature.user_inputs_to_mutate)


def keep_writes(exported, table):
    """Lets no write into an input be decomposed, of a program not yet decomposed by `table`, which changes."""
    writes = exported.graph.find_nodes(op="call_function", target=aten.index_copy_.default)
    if any(node.args[0].op == "placeholder" for node in writes):
        table.pop(INDEX_COPY, None)


def drop_writes_of_the_same(exported):
    """Drops from a decomposed program, in place, what it writes into an input and is there already: it times ones.

    TVP does so with its images and a mask that keeps all of them.
    """
    nodes = {node.name: node for node in exported.graph.nodes}
    specs, output = exported.graph_signature.output_specs, exported.graph.output_node()
    for name, target in exported.graph_signature.user_inputs_to_mutate.items():
        written = nodes[name]
        if written.target != aten.mul.Tensor or written.args[0].name != target:
            continue
        factor = written.args[1]
        factor = constant_value(factor) if isinstance(factor, torch.fx.Node) else torch.tensor(factor)
        if factor is not None and (factor == 1).all():
            place = next(i for i, spec in enumerate(specs) if spec.target == target)
            del specs[place]
            output.args = (output.args[0][:place] + output.args[0][place + 1 :],)
            written.replace_all_uses_with(written.args[0])
            exported.graph.erase_node(written)


def check_writes(exported):
    """Raises NotImplementedError unless all that a decomposed program writes into its inputs is written in place."""
    nodes = {node.name: node for node in exported.graph.nodes}
    for name, target in exported.graph_signature.user_inputs_to_mutate.items():
        if nodes[name].target != INDEX_COPY or nodes[name].args[0].name != target:
            raise NotImplementedError(f"what is written into {target} is not written at one position of it")
        if len(nodes[name].args[0].users) > 1:
            raise NotImplementedError(f"{target} is read beside what is written into it")


def convert_index_copy(node, importer):
    """Converts the write of one position along the third of four dimensions to a kernel that does it in place."""
    from tvm import relax

    cache, axis, position, new = node.args
    shape = tuple(cache.meta["val"].shape)
    if len(shape) != 4 or axis % 4 != 2 or position.meta["val"].numel() != 1 or cache.op != "placeholder":
        raise NotImplementedError(f"a copy to places along axis {axis} of {shape}")
    cache, position, new = (importer.env[argument] for argument in (cache, position, new))
    builder = importer.block_builder
    kernel = builder.add_func(define_write(shape, cache.ty.dtype), "write_position")
    return builder.emit(relax.op.call_tir_inplace(kernel, [cache, position, new], [0], cache.ty))


def define_write(shape, dtype):
    """Returns the TIR function (cache, position, new) that sets cache[:, :, position[0]] to new[:, :, 0]."""
    from tvm.script import tirx as T

    batch, heads, context, size = map(T.int64, shape)  # as Relax's are: FuseTIR wants the same

    @T.prim_func(s_tir=True)
    def write_position(
        cache: T.Buffer((batch, heads, context, size), dtype),
        position: T.Buffer((T.int64(1),), "int64"),
        new: T.Buffer((batch, heads, T.int64(1), size), dtype),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE})
        for i, j, k in T.grid(batch, heads, size):
            with T.sblock("write"):
                b, h, d = T.axis.remap("SSS", [i, j, k])
                T.reads(position[0], new[b, h, 0, d])
                T.writes(cache[b, h, position[0], d])
                cache[b, h, position[0], d] = new[b, h, 0, d]

    return write_position


def fuse_into_writes():
    """Returns a pass over Relax modules: what is written into an input is computed by the kernel that writes it.

    FuseOps leaves such a kernel alone. Only what has no reduction goes into it, and is not read elsewhere.
    """
    import tvm

    @tvm.transform.module_pass(opt_level=0)
    def fuse(module, _):
        main = module["main"]
        writes = find_calls(main, [WRITE])
        if not writes:
            return module
        calls = find_calls(main) | writes
        readers = find_readers(main)
        pairs = [[write.args[1][2], var] for var, write in writes.items()]
        groups = [
            [new, var]
            for new, var in pairs
            if new in calls and len(readers[new]) == 1 and is_without_reduction(module[calls[new].args[0]])
        ]
        return join_calls(module, groups, calls)

    return fuse


def with_fixed_inputs(module):
    """Returns a Relax module whose inputs count as weights, which stay where they are from call to call.

    A CUDA graph takes only kernels all of whose buffers do, and here every layer has one that writes into an input.
    """
    module["main"] = module["main"].with_attr("num_input", 0)
    return module

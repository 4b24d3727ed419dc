"""Tiles of a product's operands in shared memory: how they lie there, and the asynchronous copies that fill them."""

import dataclasses
import functools

from tvm_items.templates.product_task import Operand

CHUNK_BYTES = 16  # the most that one asynchronous copy takes, and a row of what ldmatrix loads


@dataclasses.dataclass
class Tile:
    """What a block of threads stages of an operand for one step: `outputs` rows or columns, and `terms`.

    What lies behind one another in memory makes a line of the tile; one of more than 128 bytes, which is all banks, is
    cut, and the tile has panels of so many. Chunks of 16 bytes change places within a line, so that the threads of a
    warp, which read the same chunk of neighbouring lines, find them in different banks. Lines of 128 bytes lie as TMA
    and wgmma have them with their swizzle of 128 bytes.
    """

    operand: Operand
    dtype: str
    outputs: int
    terms: int

    @property
    def element_bytes(self):
        return self.operand.element_bytes

    @property
    def chunk(self):
        """The elements of a chunk."""
        return CHUNK_BYTES // self.element_bytes

    @property
    def lines(self):
        return self.outputs if self.operand.along_terms else self.terms

    @property
    def line(self):
        """The elements of a line."""
        return self.terms if self.operand.along_terms else self.outputs

    @property
    def elements(self):
        return self.outputs * self.terms

    def place(self, line, chunk):
        """Returns where in the tile, in elements, a chunk of a line lies; line, chunk: expressions."""
        chunks = min(self.line // self.chunk, 8)
        panel, chunk = chunk // chunks, chunk % chunks
        if self.dtype == "float32" and not self.operand.along_terms:
            moved = chunk ^ (line % 4 * 2 % chunks)  # four lines of eight elements are read at once
        else:  # several lines may have 128 bytes
            moved = chunk ^ (line // (8 // chunks) % chunks)
        return (panel * self.lines + line) * chunks * self.chunk + moved * self.chunk


def copy_tile(tile, buffers, shared, start, thread, threads, batch, first_output, first_term):
    """Emits the copy of a tile from global to shared memory by all threads of a block; what is out of bounds is 0.

    buffers: {parameter: buffer}. shared: a buffer; start: where in it the tile lies. thread: the thread's number, of
    `threads`. batch, first_output, first_term: where in the operand the tile begins. They are expressions, but for
    `threads`, an int.
    """
    from tvm.tirx.script.builder import ir as build

    chunks = tile.line // tile.chunk
    total = tile.lines * chunks
    rounds, rest = divmod(total, threads)

    def copy(i):
        number = thread + i * threads
        if threads % chunks == 0:
            line, chunk = thread // chunks + i * (threads // chunks), thread % chunks
        else:
            line, chunk = number // chunks, number % chunks
        copy_chunk(tile, buffers, shared, start, batch, first_output, first_term, line, chunk)

    if rounds:
        with build.unroll(rounds) as i:  # by TVM: the CUDA compiler finds less in common in these addresses
            copy(i)
    if rest:
        with build.If(thread < rest), build.Then():
            copy(rounds)


def copy_chunk(tile, buffers, shared, start, batch, first_output, first_term, line, chunk):
    """Emits the copy of one chunk of a tile; copy_tile() has what is given."""
    from tvm import tirx
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    operand = tile.operand
    vector = min(operand.vector, tile.chunk)
    vector_bytes = vector * tile.element_bytes
    _, outputs, terms = operand.axes
    for piece in range(0, tile.chunk, vector):
        along = chunk * tile.chunk + piece
        output, term = (line, along) if operand.along_terms else (along, line)
        output, term = first_output + output, first_term + term
        load, condition = operand.access(buffers, batch, output, term)
        conditions = [condition] if condition is not None else []
        if outputs.extent % tile.outputs:
            conditions.append(output < outputs.extent)
        if terms.extent % tile.terms:
            conditions.append(term < terms.extent)
        inside = functools.reduce(tirx.And, conditions) if conditions else None
        place = start + tile.place(line, chunk) + piece
        if vector_bytes < 4:  # too small for an asynchronous copy
            value = load if inside is None else T.if_then_else(inside, load, tirx.const(0, tile.dtype))
            build.buffer_store(shared, value, [place])
            continue
        size = []  # of what is copied, where the rest is to become 0
        if inside is not None:
            size.append(tirx.Select(inside, tirx.const(vector_bytes, "uint32"), tirx.const(0, "uint32")))
        kind = "cg" if vector_bytes == CHUNK_BYTES else "ca"
        copy = T.ptx[f"cp.async.{kind}.shared.global"]
        build.evaluate(copy(T.address_of(shared[place]), T.address_of(load), vector_bytes, *size))

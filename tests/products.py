"""A task that tests of design spaces and of the search share."""


def make_product(rows):
    """A matrix product (rows, 128) x (128, 64), and after it what reads a result twice, as a TIR module."""
    import tvm
    from tvm import te

    shapes = {"x": (rows, 128), "w": (128, 64), "b": (64,)}
    x, w, b = (te.placeholder(shape, name=name) for name, shape in shapes.items())
    k = te.reduce_axis((0, 128), name="k")
    matmul = te.compute((rows, 64), lambda i, j: te.sum(x[i, k] * w[k, j], axis=k), name="matmul")
    biased = te.compute((rows, 64), lambda i, j: matmul[i, j] + b[j], name="biased")
    scaled = te.compute((rows, 64), lambda i, j: te.exp(biased[i, j] * -0.01), name="scaled")
    output = te.compute((rows, 64), lambda i, j: biased[i, j] * scaled[i, j], name="output")
    return tvm.IRModule({"main": te.create_prim_func([x, w, b, output])})

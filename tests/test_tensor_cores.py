"""Tensor cores in bf16."""

from conftest import H200
from tvm_items.spaces import DesignSpaces


def test_bf16_has_the_tensor_core_schedules_of_fp16(tvm):
    from tvm import te

    def make_spaces(dtype):
        x, w = te.placeholder((256, 256), name="x", dtype=dtype), te.placeholder((256, 512), name="w", dtype=dtype)
        matmul = tvm.topi.nn.matmul(x, w, out_dtype="float32")
        output = tvm.topi.cast(matmul, dtype)
        return DesignSpaces(tvm.ir.save_json(tvm.IRModule({"main": te.create_prim_func([x, w, output])})), H200)

    fp16, bf16 = make_spaces("float16"), make_spaces("bfloat16")
    assert [space.split for space in bf16] == [space.split for space in fp16]
    assert [space.stages for space in bf16] == [space.stages for space in fp16]
    assert all(space.tensor_cores for space in bf16)
    for number, space in enumerate(bf16):
        # 2 x 2 warps of 2 x 2 tiles, loads of 4 elements; how wide the result is stored differs in its options.
        tiles = [[4, 1, 2, 2, 1], [8, 1, 2, 2, 1], [space.choices[2].extent // 4, 2, 2]]
        decisions = [*tiles, 0, 2, 2] + [0] * (len(space.choices) - 6)
        scripts = [spaces.realize(number, decisions)[0].script() for spaces in (fp16, bf16)]
        renamed = scripts[1].replace("bfloat16", "float16").replace("_bf16_", "_f16_")
        assert renamed == scripts[0] and "tvm_mma_sync" in renamed

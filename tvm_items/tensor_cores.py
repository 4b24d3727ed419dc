"""Tensor cores in bf16: MetaSchedule of TVM 0.27 has rules for fp16 and int8 only."""


def rules_for_bf16():
    """Returns MetaSchedule's schedule rules for CUDA's tensor cores, with bf16 in the place of fp16.

    WMMA in tiles of 16 x 16 x 16 with sums in fp32, tiled as ScheduleRule::DefaultCUDATensorCore does for fp16.
    """
    from tvm.s_tir.meta_schedule.schedule_rule import MultiLevelTilingTensorCore, ReuseType, ScheduleRule

    tiling = MultiLevelTilingTensorCore(
        [register_intrinsics(transposed) for transposed in (True, False)],
        structure="SSSRRSRS",
        tile_binds=["blockIdx.y", "blockIdx.x", "threadIdx.y"],
        max_innermost_factor=4,
        vector_load_lens=[1, 2, 4, 8],
        reuse_read=ReuseType("must", [4], "shared.dyn"),
        reuse_write=ReuseType("must", [2], "shared.dyn"),
    )
    first, *others = ScheduleRule.create("cuda-tensorcore")
    return [first, tiling, *(rule for rule in others if not isinstance(rule, MultiLevelTilingTensorCore))]


def register_intrinsics(transposed):
    """Registers the WMMA instructions of a product whose second operand is `transposed` or not; returns their names."""
    from tvm.s_tir.tensor_intrin import cuda

    suffix = "_trans" * transposed
    return {
        "init": cuda.WMMA_FILL_16x16x16_F32_INTRIN,
        "load_a": register_load("a", False),
        "load_b": register_load("b", transposed),
        "compute": register(
            f"wmma_sync_16x16x16_bf16bf16f32{suffix}",
            cuda.get_wmma_sync_intrin(16, 16, 16, "bfloat16", "float32", transposed),
        ),
        "store": cuda.WMMA_STORE_16x16x16_F32_SHARED_DYN_INTRIN,
    }


def register_load(operand, transposed):
    """Registers the instruction that loads a fragment of operand "a" or "b" from shared memory; returns its name."""
    from tvm.s_tir.tensor_intrin import cuda

    intrinsic = cuda.get_wmma_load_intrin(16, 16, 16, "bfloat16", "shared.dyn", operand == "b", transposed)
    return register(f"wmma_load_16x16x16_bf16_{operand}{'_trans' * transposed}_shared_dyn", intrinsic)


def register(name, intrinsic):
    """Registers a tensor intrinsic, a (description, implementation) of it in TIR, and returns its name."""
    from tvm.s_tir import TensorIntrin

    TensorIntrin.register(name, *intrinsic, override=True)
    return name


def pad_rows_for_tensor_cores(schedule):
    """Pads the rows of what is staged in shared memory, against bank conflicts, as MetaSchedule does in fp16 only."""
    for instruction in schedule.trace.insts:
        # Without tensor cores they are staged in "shared".
        if instruction.kind.name == "CacheRead" and "shared.dyn" in map(str, instruction.attrs):
            schedule.storage_align(instruction.outputs[0], 0, axis=-2, factor=32, offset=8)

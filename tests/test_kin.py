"""Which schedules of a library a task begins with."""

from tvm_items.kin import Start, distance, find_starts, read_operator
from tvm_items.library import Library
from tvm_items.tasks import Task


def make_task(name, *shapes, key="task", dtype="float16"):
    return Task(key, name, 1, "", tuple((dtype, shape) for shape in shapes))


def make_kernel(number, name, *shapes, dtype="float16", **fields):
    """A Kernel whose decisions are its number, which tests know it by."""
    arguments = [f"{dtype}[{','.join(map(str, shape))}]" for shape in shapes]
    kernel = {"task": f"hash {number}", "name": name, "arguments": arguments, "space": 0, "decisions": [number]}
    return kernel | {"arch": "sm_90", "device": "NVIDIA H200", "tvm": "1", "seconds": 1e-5, "case": "m.fp16"} | fields


def find(task, kernels=(), others=(), searches=True, arch="sm_90"):
    """Returns ([numbers of what is known], [numbers of kin]) that the task begins with."""
    start = find_start(task, kernels, others, searches, arch)
    return tuple([decisions[0] for _, decisions in schedules] for schedules in (start.known, start.kin))


def find_start(task, kernels=(), others=(), searches=True, arch="sm_90"):
    library = Library({kernel["task"]: kernel for kernel in kernels}, list(others), {})
    return find_starts([task], library, arch, searches).get(task.key, Start([], []))


X, W, BIAS, Y = (128, 768), (768, 3072), (3072,), (128, 3072)
PRODUCT = make_task("fused_matmul2_cast4_add6", X, W, BIAS, Y)


def test_tasks_are_kin_whose_operator_and_dtypes_are_the_same():
    operator = read_operator("fused_matmul2_cast4_add6", ["float16[1,2]", "float16[2,3]", "float16[1,3]"])
    assert operator == read_operator("matmul", ["float16[7,2]", "float16[2,3]", "float16[7,3]"])
    assert operator == read_operator("matmul", ["bfloat16[7,2]", "bfloat16[2,3]", "bfloat16[7,3]"])
    assert operator != read_operator("matmul", ["float32[7,2]", "float32[2,3]", "float32[7,3]"])
    assert operator != read_operator("fused_conv2d_cast_add", ["float16[1]", "float16[1]", "float16[1]"])
    assert read_operator("fused_reshape1_add", ["float16[1]"]) == read_operator("fused_reshape_add7", ["float16[2]"])
    assert read_operator("fused_reshape1_add", ["float16[1]"]) != read_operator("reshape", ["float16[1]"])


def test_the_nearest_kin_comes_first():
    kernels = [
        make_kernel(1, "fused_matmul_cast_add", (512, 768), W, BIAS, (512, 3072)),  # 4 times the rows, twice counted
        make_kernel(2, "fused_matmul1_cast_add_gelu", X, W, BIAS, Y),  # another epilogue
        make_kernel(3, "fused_matmul1_cast_add_gelu_add", X, W, BIAS, Y, Y),  # even more of one
        make_kernel(4, "fused_matmul9_cast_add", (197, 768), W, BIAS, (197, 3072)),
        make_kernel(5, "matmul", (1, 128, 768), W, (1, 128, 3072)),  # three dimensions
        make_kernel(6, "fused_matmul_cast_add", X, W, BIAS, Y, dtype="bfloat16"),  # the schedules of fp16
        make_kernel(9, "fused_matmul_cast_add", X, W, BIAS, Y, dtype="float32"),
        make_kernel(7, "softmax", X, Y),
        make_kernel(8, "fused_matmul_cast_add", (64, 768), W, BIAS, (64, 3072), space=None),  # TVM's default
    ]
    assert find(PRODUCT, kernels) == ([], [2, 6, 3, 4, 1, 5])
    assert distance(PRODUCT.name, ["float16[1,8]"], make_kernel(0, "matmul", (4, 8))) == (False, 4.0, 2)


def test_what_is_known_here_is_all_that_is_needed_without_a_search():
    known = make_kernel(1, PRODUCT.name, X, W, BIAS, Y, task=PRODUCT.key)
    kin = make_kernel(2, PRODUCT.name, (64, 768), W, BIAS, (64, 3072))
    assert find(PRODUCT, [known, kin], searches=False) == ([1], [])
    assert find(PRODUCT, [known | {"space": None}, kin], searches=False) == ([], [])
    assert find(PRODUCT, [known, kin]) == ([1], [2])
    assert find(PRODUCT, [known | {"name": "", "arguments": []}, kin]) == ([1], [2])  # its hash is what counts
    assert find(PRODUCT, [kin], searches=False) == ([], [2])
    assert find(PRODUCT) == ([], [])


def test_other_devices_come_after_this_one_and_those_of_another_architecture_last():
    def kernels_of(key):
        return [
            make_kernel(number, PRODUCT.name, X, W, BIAS, Y, task=key or f"hash {number}", device=device, arch=arch)
            for number, device, arch in ((1, "NVIDIA A100", "sm_80"), (2, "NVIDIA H200", "sm_90"))
        ]

    own = make_kernel(3, PRODUCT.name, X, W, BIAS, Y, device="NVIDIA H100")
    assert find(PRODUCT, [own], kernels_of(None)) == ([], [3, 2, 1])
    assert find(PRODUCT, [own], kernels_of(PRODUCT.key)) == ([2, 1], [3])
    assert find(PRODUCT, [], kernels_of(PRODUCT.key), searches=False) == ([2, 1], [])  # to be measured, not used as is
    assert find(PRODUCT, [own], kernels_of(PRODUCT.key), arch="sm_80") == ([1, 2], [3])


def test_what_takes_longer_than_its_twin_is_behind():
    known = make_kernel(1, PRODUCT.name, X, W, BIAS, Y, task=PRODUCT.key)
    twin = make_kernel(2, PRODUCT.name, X, W, BIAS, Y, dtype="bfloat16", seconds=8e-6, case="m.bf16")
    assert find_start(PRODUCT, [known, twin]).is_behind
    assert not find_start(PRODUCT, [known, twin], searches=False).is_behind
    for other in (
        twin | {"seconds": 9.5e-6},
        twin | {"case": "m.tf32"},
        twin | {"name": "fused_matmul2_cast4"},
        make_kernel(2, PRODUCT.name, (64, 768), W, BIAS, (64, 3072), seconds=5e-6),
    ):
        start = find_start(PRODUCT, [known, other])
        assert start.kin and not start.is_behind
    assert not find_start(PRODUCT, [twin]).is_behind  # it has nothing yet


def test_templates_of_other_products_come_in_turns_with_kin():
    images, window = (1, 56, 56, 64), (1, 1, 64, 64)
    convolution = make_task("fused_conv2d_add_relu", images, window, images)
    kernels = [
        make_kernel(1, "fused_conv2d3_add_relu", (1, 28, 28, 64), window, (1, 28, 28, 64)),
        make_kernel(2, "fused_conv2d4_add_relu", (1, 14, 14, 64), window, (1, 14, 14, 64), space=101),
        make_kernel(3, PRODUCT.name, (3136, 64), (64, 64), (3136, 64), space=101),
        make_kernel(4, PRODUCT.name, X, W, Y, space=100),
        make_kernel(5, PRODUCT.name, (3136, 64), (64, 64), (3136, 64)),  # MetaSchedule's: of another number of loops
        make_kernel(6, "attention", (1, 128, 36, 64), (1, 128, 12, 64), space=110),
        make_kernel(7, PRODUCT.name, X, W, Y, space=100, dtype="float32"),  # in TF32
    ]
    assert find(convolution, kernels) == ([], [1, 3, 2, 4, 7])
    assert find(PRODUCT, kernels) == ([], [4, 7, 3, 2, 5])

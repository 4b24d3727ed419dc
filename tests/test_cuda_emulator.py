"""The emulator of CUDA: it runs kernels of several launches, and finds what a GPU would not forgive."""

import json

import pytest
import torch

from conftest import H200
from cuda_emulator import Launch, emulate, run
from products import make_product
from tvm_items.tasks import default_schedule

COPY = 'asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(to), "l"(x + threadIdx.x) : "memory");'
COMMIT, WAIT = 'asm volatile("cp.async.commit_group;" : : );', 'asm volatile("cp.async.wait_group 0;" : : : "memory");'


def run_kernel(body, threads=32):
    """Returns what a kernel of one block makes of y, in a late and in an early run; x holds 0, 1, 2, …"""
    source = f'extern "C" __global__ void kernel(float* x, float* y) {{ extern __shared__ float tile[]; {body} }}'
    launch = Launch("kernel", [("buffer", 0), ("buffer", 1)], [1, 1, 1], [threads, 1, 1])
    arguments = [torch.arange(threads).float(), torch.zeros(threads)]
    return [y.tolist() for _, y in run(source, [launch], [], arguments)]


def test_a_task_of_several_launches(tvm):
    target = tvm.target.Target(json.loads(H200))
    arguments = [torch.randn(shape) for shape in ((32, 128), (128, 64), (64,), (32, 64))]
    x, w, b, _ = arguments
    product = x @ w + b
    for values in emulate(default_schedule(make_product(rows=32), target), target, arguments):
        torch.testing.assert_close(values[-1], product * torch.exp(product * -0.01), rtol=1e-4, atol=1e-4)
        assert torch.equal(values[0], x)


def test_what_is_not_waited_for_differs_between_a_late_and_an_early_run(tvm):
    load = f"unsigned to = __cvta_generic_to_shared(tile + threadIdx.x); {COPY} {COMMIT}"
    store = "__syncthreads(); y[threadIdx.x] = tile[31 - threadIdx.x];"
    copied = [float(31 - i) for i in range(32)]
    assert run_kernel(f"{load} {WAIT} {store}") == [copied, copied]
    late, early = run_kernel(f"{load} {store}")
    assert early == copied and late != copied
    late, early = run_kernel(f"{load} {WAIT} {store.replace('__syncthreads();', '')}")
    assert early != copied  # a thread has read what another one has not loaded yet


def test_tensor_cores_multiply(tvm):
    """One mma.sync, with A and B in the registers where the PTX ISA says that they lie; B moves columns."""
    body = """
        int g = threadIdx.x / 4, t = threadIdx.x % 4;
        float d[4] = {1, 1, 1, 1};
        unsigned a[4], b[2];
        for (int i = 0; i < 4; i++) a[i] = __float_as_uint((g + i % 2 * 8) * 100.0f + t + i / 2 * 4);
        for (int i = 0; i < 2; i++) b[i] = __float_as_uint(t + i * 4 == g ? 1.0f : 0.0f);
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        y[threadIdx.x] = d[3];
    """
    expected = [(lane // 4 + 8) * 100.0 + lane % 4 * 2 + 1 + 1 for lane in range(32)]
    assert run_kernel(body) == [expected, expected]


@pytest.mark.parametrize(
    "body, says",
    [
        ("if (threadIdx.x < 16) __syncwarp();", "wait for one another"),
        ("y[32 + threadIdx.x] = 0;", "outside of the arguments"),
        ("y[threadIdx.x] = x[32 + threadIdx.x];", "outside of the arguments"),
        ("y[-1 - (int)threadIdx.x] = 0;", "out of bounds"),
        ('unsigned v; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(232448));', "shared memory"),
        ('asm volatile("sin.approx.f32 %0, %1;" : "=f"(y[0]) : "f"(x[0]));', "does not know"),
    ],
)
def test_what_is_wrong_is_said(tvm, body, says):
    with pytest.raises((RuntimeError, ValueError), match=says):
        run_kernel(body)

"""TVM's target: what it is told of the device, and what a block of threads may have there."""

import json
import os

# Of a CUDA block (CUDA C++ Programming Guide, compute capabilities).
WARP_THREADS, MAX_BLOCK_THREADS, MAX_BLOCK_SHARED_BYTES = 32, 1024, 48 * 1024
ALL_LANES = 0xFFFFFFFF  # of a warp: the mask of the threads that take part in a shuffle

# Of dynamic shared memory a block may have more than that by compute capability, where it asks for it (same guide,
# "maximum amount of shared memory per thread block").
MAX_SHARED_KIB = {"80": 163, "86": 99, "87": 163, "89": 99, "90": 227, "100": 227, "103": 227, "120": 99, "121": 99}


def max_shared_bytes(target):
    """Returns the bytes of dynamic shared memory that a block of threads may have on a CUDA tvm.target.Target."""
    return MAX_SHARED_KIB.get(compute_capability(target), 48) * 1024


def compute_capability(target):
    """Returns the compute capability of a CUDA tvm.target.Target, such as "90"."""
    return str(target.attrs["arch"]).removeprefix("sm_").rstrip("af")


def is_ampere_or_later(target):
    """Returns whether a tvm.target.Target is a GPU with cp.async, and with tensor cores for bf16 and TF32."""
    return target.kind.name == "cuda" and int(compute_capability(target)) >= 80


def find_target(device):
    """Returns TVM's target for "cpu" or "cuda:N", as JSON, with what MetaSchedule's rules ask for.

    For CUDA it asks the driver: a process that has called it can fork none that uses CUDA.
    """
    import tvm

    target = json.loads(str(tvm.target.Target.from_device(tvm.runtime.device(device))))
    # Not every device says these.
    if device == "cpu":
        target["num-cores"] = len(os.sched_getaffinity(0))
    else:
        target |= {"max_threads_per_block": MAX_BLOCK_THREADS, "thread_warp_size": WARP_THREADS}
        target["max_shared_memory_per_block"] = MAX_BLOCK_SHARED_BYTES
    return json.dumps(target)


def load_target(target_json):
    """Returns the tvm.target.Target of find_target()'s JSON."""
    import tvm

    return tvm.target.Target(json.loads(target_json))

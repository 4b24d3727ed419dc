"""TVM's target: what it is told of the device, and what a block of threads may have there."""

import json
import os

# Of a CUDA block (CUDA C++ Programming Guide, compute capabilities).
WARP_THREADS, MAX_BLOCK_THREADS, MAX_BLOCK_SHARED_BYTES = 32, 1024, 48 * 1024


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

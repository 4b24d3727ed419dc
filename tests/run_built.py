"""Runs each kernel that run_templates.py or build_published.py has built into a directory once: for test_sanitizer.py.

    python tests/run_built.py DIRECTORY

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each buffer is an allocation of its own, exactly as large as it must be: then
compute-sanitizer sees what goes beyond it. Whether the outputs are right is run_templates.py's to say.
"""

import json
import sys
from pathlib import Path

import torch

from tvm_items.imports import import_tvm

MANIFEST = "built.json"  # in that directory: each candidate's name, decisions, arguments and path


def main(directory):
    import_tvm("fp32")
    import tvm

    candidates = json.loads((Path(directory) / MANIFEST).read_text())
    for name, candidate, arguments, library in candidates:
        tensors = [torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda:0") for dtype, shape in arguments]
        tvm.runtime.load_module(library)["main"](*map(tvm.runtime.from_dlpack, tensors))
        torch.cuda.synchronize()
        print(f"{name} {candidate} ran", flush=True)
    return not candidates


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Importing TVM: the modules that an item needs, and where TVM finds CUDA and this project's code generation.

Importing Python modules is not compiling: it is done before an item's time is taken, and all of it here.
"""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import unittest.mock
from pathlib import Path

import torch

from harness.case import PRECISIONS
from tvm_items.kernels import call_nvrtc, compile_kernels


def import_tvm(precision):
    """Imports what TVM needs to compile a model in `precision`, a key of PRECISIONS.

    Where CUDA comes from pip alone, TVM and NVRTC are pointed at the wheels' library and headers.
    """
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory, load_nvidia_dynamic_lib

    os.environ["TVM_NUM_THREADS"] = str(torch.get_num_threads())  # of itself TVM takes half of the cores
    with contextlib.suppress(RuntimeError):  # a system-wide CUDA is found by the dynamic linker
        load_nvidia_dynamic_lib("cudart")
    cccl = find_nvidia_header_directory("cccl")
    if cccl and Path(cccl).name == "cccl" and "CUDA_PATH" not in os.environ:  # the wheels' layout: <root>/include/cccl
        os.environ["CUDA_PATH"] = str(Path(cccl).parents[1])
        os.environ["TVM_CUDA_NVRTC_EXTRA_OPTS"] = f"-I{cccl} {os.environ.get('TVM_CUDA_NVRTC_EXTRA_OPTS', '')}"
    # The last two are imported lazily by torch.export and by import_to_relax().
    for module in ("tvm.relax.frontend.torch", "torch.export._trace", "torch.onnx._internal.fx.passes"):
        importlib.import_module(module)
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_kernels, override=True)
    if not isinstance(nvrtc.nvrtcCompileProgram, functools.partial):  # once
        nvrtc.nvrtcCompileProgram = functools.partial(call_nvrtc, nvrtc.nvrtcCompileProgram)
    if PRECISIONS[precision].dtype != torch.float32:
        import_tensor_core_intrinsics()


def import_tvm_for_tuning(precision):
    """Imports what TVM needs to compile and to tune a model in `precision`, a key of PRECISIONS.

    MetaSchedule looks at the intrinsics for tensor cores at every precision.
    """
    import_tvm(precision)
    import_tensor_core_intrinsics()


def import_tensor_core_intrinsics():
    """Imports the instructions of tensor cores, as TVM's schedules use them; TVM would do so while it compiles.

    It asks for the call stack hundreds of times there, and each time inspect looks for the source text of every frame:
    minutes in a process that has imported transformers. TVM copes where that text is None.
    """
    with unittest.mock.patch.object(inspect, "stack", call_stack):
        importlib.import_module("tvm.s_tir.tensor_intrin")


def call_stack(context=0):
    """Returns what inspect.stack() does, without the source text."""
    frame, frames = sys._getframe(1), []
    while frame:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames

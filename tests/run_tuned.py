"""Compiles a tuned case with the published schedules and runs it once: for test_sanitizer.py.

    python tests/run_tuned.py results/tuning/NVIDIA_H200 microsoft--resnet-50.pixel_values=1x3x224x224.fp32

Each of TVM's buffers is an allocation of its own and exactly as large as it must be, so that compute-sanitizer sees
what goes beyond it. PYTORCH_NO_CUDA_MEMORY_CACHING=1 does the same for the inputs. Eager PyTorch, which the output is
checked against, runs on the CPU: its kernels are not what is looked at. Any GPU of the schedules' kind will do.
"""

import sys
from pathlib import Path

import torch
import tvm
from tvm import relax

import benchmark
from conftest import make_case
from harness.architectures import builtin_config
from harness.case import PRECISIONS, arithmetic
from harness.reference import compute_reference
from harness.weights import load_on_device
from tvm_items import executable
from tvm_items.library import CASES, read_lines
from tvm_items.records import TunedCase
from tvm_items.tuning import tuned_name


def find_case(directory, tuned):
    """Returns the Case of a TunedCase, a dict, whose library lies in `directory`, beside those of other devices."""
    name, shapes, precision = tuned["case"].rsplit(".", 2)
    name = name.replace("--", "/")
    case = make_case(
        builtin_config(name),
        model_name=name,
        batch_size=int(shapes.partition("=")[2].partition("x")[0]),
        precision=precision,
        device="cuda:0",
        device_name=tuned["device"],
        tuning_dirs=(directory.parent,),
    )
    assert tuned_name(case) == tuned["case"]
    return case


def main(directory, name):
    directory = Path(directory).resolve()
    (tuned,) = [tuned for tuned in read_lines(directory / CASES, TunedCase) if tuned["case"] == name]
    case = find_case(directory, tuned)
    benchmark.import_compiler("tvm_tune", [case.precision])
    executable.virtual_machine = lambda module, case: relax.VirtualMachine(
        module, tvm.runtime.device(case.device), memory_cfg="naive"
    )
    with arithmetic(case.precision) as dtype, torch.no_grad():
        reference = compute_reference(case, "fp32", "host")
        model, inputs = load_on_device(case, dtype)
        run = benchmark.tvm_tuned(model, inputs, case)
        columns = reference.check(PRECISIONS[case.precision].tolerance, benchmark.run_once(run, case.device))
    print(f"{name}: {columns['status']}, rel_error {columns['rel_error']:.1e}")
    return columns["status"] != "ok"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

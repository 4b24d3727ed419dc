"""The reference: what eager PyTorch computes on a case's inputs; the outputs of every item are checked against it."""

import dataclasses
import typing

import torch

from harness.case import PRECISIONS, arithmetic
from harness.check import output_arrays, relative_error
from harness.decode import cache_arrays, run_chain
from harness.inputs import change_inputs
from harness.processes import WorkerError, report
from harness.weights import load_on_device

USUAL_ORIGIN = "fp32 on the device"


class Reference(typing.NamedTuple):
    """The outputs of eager PyTorch, as lists of fp32 NumPy arrays."""

    origin: str  # precision and place, for the row's column `reference`
    outputs: list
    changed_outputs: list  # of run_on_changed_inputs()

    def check(self, tolerance, first, last=None, changed=None):
        """Returns the row's columns rel_error, status, error and reference.

        first, last: the outputs of the first run and of the last timed one. A replayed CUDA graph, for example, must
        give what the first run gave. changed: those of run_on_changed_inputs(), which a callable that keeps a result
        instead of computing it cannot give. Each is a list of arrays, or None where there was no such run. The worst
        counts.
        """
        errors = {"in the first run": relative_error(first, self.outputs)}
        is_stale = False
        if last is not None:
            errors["in the last timed run"] = relative_error(last, self.outputs)
        if changed is not None:
            error = relative_error(changed, self.changed_outputs)
            errors["once the inputs had changed in place"] = error
            # Of a model that hardly depends on its inputs, an old result may be within the tolerance of the new one.
            is_stale = 2 * relative_error(changed, self.outputs) < error
        when, rel_error = max(errors.items(), key=lambda item: item[1])
        if is_stale:
            error = "the output stays what it was once the inputs had changed in place"
        else:
            error = "" if rel_error <= tolerance else f"rel_error {rel_error:.2e} is above {tolerance:g} {when}"
        status = "wrong" if error else "ok"
        return {"rel_error": rel_error, "status": status, "error": error, "reference": self.origin}


@torch.no_grad()
def compute_reference(case, precision, place):
    """Returns the case's Reference in a precision, None where the memory of the case's device is too small for it.

    place: "device", or "host" for the CPU and its memory.
    """
    report("computing")
    try:
        with arithmetic(precision) as dtype:
            on_place = dataclasses.replace(case, device="cpu") if place == "host" else case
            model, inputs = load_on_device(on_place, dtype)
            outputs = output_arrays(model(**inputs)) + cache_arrays(inputs)
            changed = run_on_changed_inputs(lambda: output_arrays(model(**inputs)), inputs, case)
            return Reference(f"{precision} on the {place}", outputs, changed)
    except torch.OutOfMemoryError:  # PyTorch raises it for a device's memory, never for the host's
        return None


def run_on_changed_inputs(run, inputs, case):
    """Returns the arrays that run() gives once the inputs, {name: tensor}, have changed in place.

    Of a case that decodes, those of a chain of steps, one after another, and of the cache that they leave.
    """
    if case.phase == "decode":
        logits = [array for arrays in run_chain(run, inputs, case) for array in arrays]
        return logits + cache_arrays(inputs)
    change_inputs(inputs, case)
    return run()


class References:
    """Has references computed, and keeps those of the latest model and batch size: precisions can share one in fp32."""

    def __init__(self, call):
        """call: a function (function, *arguments) -> what that returns in a process of its own; raises WorkerError."""
        self.call, self.of, self.kept = call, None, {}

    def find(self, case):
        """Returns the case's Reference, or the WorkerError that says why there is none.

        It is in fp32 on the device; where the device's memory is too small, on the host; and where that fails too, in
        memory or in time, in the case's own precision on the device.
        """
        attempts = [("fp32", "device"), ("fp32", "host")]
        if PRECISIONS[case.precision].dtype != torch.float32:
            attempts.append((case.precision, "device"))
        for precision, place in attempts:
            found = self.compute(case, precision, place)
            if isinstance(found, Reference) or (found is not None and place == "device"):
                break
        return found or WorkerError("no reference to check against: the device's memory is too small")

    def compute(self, case, precision, place):
        """Returns what compute_reference() does, or the WorkerError that it ended with; each is computed once."""
        if self.of != (case.model_name, case.batch_size):
            self.of, self.kept = (case.model_name, case.batch_size), {}
        if (precision, place) not in self.kept:
            try:
                self.kept[precision, place] = self.call(compute_reference, case, precision, place)
            except WorkerError as error:
                self.kept[precision, place] = WorkerError(f"no reference to check against: {error}")
        return self.kept[precision, place]

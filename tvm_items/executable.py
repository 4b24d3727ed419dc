"""From a Relax module to what is timed: compiled, bound to its arguments, and kept on the disk for a second start."""

import functools
import json

from tvm_items.in_place import with_fixed_inputs, writes_into_inputs
from tvm_items.lowering import rules_that_decline, tir_pipeline

LIBRARY, WEIGHTS, INPUT_NAMES = "model.so", "weights.params", "inputs.json"


def compile_and_bind(module, weights, exported, inputs, target, case, pipeline, options):
    """Returns a Relax module as a callable without arguments that runs one inference, with an attribute `save`.

    module, weights: import_to_relax()'s or tuned_module()'s, of the ExportedProgram `exported`. inputs: {name: PyTorch
    tensor}. pipeline: a pass over Relax modules, or the name of one of TVM's. options: of TVM's PassContext. On CUDA
    the whole model becomes one CUDA graph. save(directory) keeps what load_saved() needs.
    """
    options = {"relax.backend.use_cuda_graph": case.device != "cpu", **options}
    if writes_into_inputs(exported):
        module = with_fixed_inputs(module)
    executable = compile_module(module, target, pipeline, options)
    vm = virtual_machine(executable, case)
    weights = on_device(weights, case)
    if any(name.name_hint == "main_transform_params" for name in module.functions):
        weights = list(vm["main_transform_params"](weights))
    input_names = list(exported.example_inputs[1])  # in the order of the compiled function's arguments
    run = functools.partial(bind_arguments(vm, input_names, inputs, weights))  # TVM's functions have no attributes
    run.save = functools.partial(save, executable, input_names, weights)
    return run


def compile_module(module, target, pipeline, options):
    """Returns the executable of a Relax module for a tvm.target.Target; the rest is as in compile_and_bind()."""
    import tvm

    with tvm.transform.PassContext(opt_level=3, config=options), rules_that_decline():
        return tvm.compile(module, target, relax_pipeline=pipeline, tir_pipeline=tir_pipeline())


def virtual_machine(executable, case):
    """Returns a tvm.relax.VirtualMachine that runs an executable, or a loaded library of one, on the case's device."""
    import tvm
    from tvm import relax

    return relax.VirtualMachine(executable, tvm.runtime.device(case.device))


def passes_after_scheduling(target):
    """Returns the rest of TVM's default pipeline for a module that is scheduled already, as one pass."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as cpu
    from tvm.relax.backend.cuda import pipeline as cuda

    passes = {"cuda": cuda, "llvm": cpu}[target.kind.name]
    lowering = passes.dataflow_lower_passes(target) + passes.finalize_passes(target)
    # Reshapes are found before scheduling; a template with one input is a function that this pass cannot look at.
    return tvm.transform.Sequential([each for each in lowering if each.info.name != "RewriteDataflowReshape"])


def on_device(weights, case):
    """Returns copies of TVM tensors on the case's device."""
    import tvm

    return [tvm.runtime.tensor(weight, tvm.runtime.device(case.device)) for weight in weights]


def bind_arguments(vm, input_names, inputs, weights):
    """Returns the virtual machine's `main` as a callable without arguments that runs one inference.

    input_names: in the order of main's arguments. inputs: {name: PyTorch tensor}, whose memory is shared: a change in
    place is seen by the next call. weights: TVM tensors on the device. vm["main"](x, *weights) would hand over every
    weight on every call.
    """
    import tvm

    arguments = [tvm.runtime.from_dlpack(inputs[name]) for name in input_names]
    vm.save_function("main", "inference", *arguments, *weights)
    return vm["inference"]


def export_library(module, path):
    """Writes what TVM has compiled as a shared library; raises FileNotFoundError where no C++ compiler can link it."""
    from tvm.support import cc

    if cc.get_cc() is None:  # TVM itself would say that it expected a str
        raise FileNotFoundError("Failed to find C compiler")
    module.export_library(path)


def save(executable, input_names, weights, directory):
    """Writes a compiled model with its weights into an existing directory, as a deployment would. Needs g++."""
    import tvm

    export_library(executable, str(directory / LIBRARY))
    on_host = {str(number): weight.copyto(tvm.cpu()) for number, weight in enumerate(weights)}
    tvm.runtime.save_param_dict_to_file(on_host, str(directory / WEIGHTS))
    (directory / INPUT_NAMES).write_text(json.dumps(list(input_names)))


def load_saved(inputs, case, directory):
    """Returns what bind_arguments() does, from the files that save() wrote. inputs: {name: PyTorch tensor}."""
    import tvm

    weights = tvm.runtime.load_param_dict_from_file(str(directory / WEIGHTS))
    weights = on_device([weights[str(number)] for number in range(len(weights))], case)
    vm = virtual_machine(tvm.runtime.load_module(str(directory / LIBRARY)), case)
    return bind_arguments(vm, json.loads((directory / INPUT_NAMES).read_text()), inputs, weights)

"""From a Relax module to what is timed: compiled, on the device, and bound to its arguments."""


def compile_with_tvm(module, target, case, pipeline, options):
    """Returns the virtual machine of a compiled Relax module, on the case's device.

    pipeline: a pass over Relax modules, or the name of one of TVM's. options: of TVM's PassContext. On CUDA the whole
    model becomes one CUDA graph.
    """
    import tvm
    from tvm import relax

    options = {"relax.backend.use_cuda_graph": case.device != "cpu", **options}
    with tvm.transform.PassContext(opt_level=3, config=options):
        executable = tvm.compile(module, target, relax_pipeline=pipeline)
    return relax.VirtualMachine(executable, tvm.runtime.device(case.device))


def passes_after_scheduling(target):
    """Returns the rest of TVM's default pipeline for a module that is scheduled already, as one pass."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as cpu
    from tvm.relax.backend.cuda import pipeline as cuda

    passes = {"cuda": cuda, "llvm": cpu}[target.kind.name]
    return tvm.transform.Sequential(passes.dataflow_lower_passes(target) + passes.finalize_passes(target))


def on_device(weights, case):
    """Returns copies of TVM tensors on the case's device."""
    import tvm

    return [tvm.runtime.tensor(weight, tvm.runtime.device(case.device)) for weight in weights]


def bind_arguments(vm, exported, inputs, weights):
    """Returns the virtual machine's `main` as a callable without arguments that runs one inference.

    exported: the ExportedProgram that was compiled. inputs: {name: PyTorch tensor}, whose memory is shared: a change in
    place is seen by the next call. weights: TVM tensors. vm["main"](x, *weights) would hand over every weight on every
    call.
    """
    import tvm

    _, keywords = exported.example_inputs  # in the order of the compiled function's arguments
    arguments = [tvm.runtime.from_dlpack(inputs[name]) for name in keywords]
    vm.save_function("main", "inference", *arguments, *weights)
    return vm["inference"]

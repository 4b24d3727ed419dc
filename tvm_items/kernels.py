"""From CUDA C++, which TVM generates, to machine code: NVRTC on every core, as fp32 arithmetic and without warnings."""

import functools
import os
import re

from harness import processes


def compile_kernels(source):
    """Compiles the CUDA C++ of all of a model's kernels to one cubin, as TVM's own callback does, but on every core.

    TVM hands NVRTC all kernels as one program, which keeps one core busy for most of the compile time. Kernels do not
    call one another: they are dealt out to programs that compile at once and are linked again. In processes, because
    NVRTC's front end holds a lock.
    """
    from tvm.support import nvcc

    programs = split_into_programs(mend(source), len(os.sched_getaffinity(0)))
    arch = find_arch(source)
    compile_program = functools.partial(nvcc.compile_cuda, target_format="cubin", arch=arch, options=["-rdc=true"])
    return link(processes.map_in_forks(compile_program, [(program,) for program in programs]), arch)


def find_arch(source):
    """Returns the architecture to compile CUDA C++ for on the current target, such as "sm_90".

    "sm_90a" where the source has instructions that only Hopper has: a target's name is that of the device, "sm_90". TVM
    says "9.0" for a target and "9.0.a" for the device itself, which it looks at where there is no current target.
    """
    import tvm
    from tvm.support import nvcc

    major, minor, *_ = nvcc.get_target_compute_version(tvm.target.Target.current(allow_none=True)).split(".")
    return f"sm_{major}{minor}{'a' if 'wgmma.' in source else ''}"


def split_into_programs(source, limit):
    """Returns CUDA C++ programs, at most `limit`, that have the source's kernels among them, long ones spread out."""
    preamble, *kernels = re.split(r'(?=^extern "C" __global__)', source, flags=re.MULTILINE)
    # Helpers of fp16 arithmetic, which every program gets: without `static` the linker would meet each many times.
    preamble = re.sub(r"^(?=(__host__ )?__device__ )", "static ", preamble, flags=re.MULTILINE)
    count = min(len(kernels), limit)
    kernels.sort(key=len)
    return [preamble + "".join(kernels[i::count]) for i in range(count)]


def link(cubins, arch):
    """Links cubins of relocatable device code for `arch`, such as "sm_90", to one.

    Raises RuntimeError with what the linker says, such as which kernel takes more shared memory than there is.
    """
    from cuda.bindings import nvjitlink

    linker = nvjitlink.create(1, [f"-arch={arch}"])
    try:
        for cubin in cubins:
            nvjitlink.add_data(linker, nvjitlink.InputType.CUBIN, bytes(cubin), len(cubin), "kernels")
        nvjitlink.complete(linker)
    except nvjitlink.nvJitLinkError as error:  # which names a number: what is wrong stands in the log
        log = bytearray(nvjitlink.get_error_log_size(linker))
        nvjitlink.get_error_log(linker, log)
        raise RuntimeError(log.decode(errors="replace").strip("\0\n ")) from error
    linked = bytearray(nvjitlink.get_linked_cubin_size(linker))
    nvjitlink.get_linked_cubin(linker, linked)
    nvjitlink.destroy(linker)
    return linked


def compile_candidate(source):
    """Compiles the CUDA C++ of one task's candidate to a cubin, in this process.

    A tuner has a core for each candidate, not for each kernel of a model.
    """
    from tvm.support import nvcc

    return nvcc.compile_cuda(mend(source), target_format="cubin", arch=find_arch(source))


def mend(source):
    """Returns TVM's CUDA C++ less what NVRTC refuses, and less what it takes long for.

    In a vectorised loop TVM declares the condition of a `where` as a vector of the result's type.
    """
    conditions_of_their_type = re.sub(r"^( *)\w+(?= v_\w+ = make_ushort2\()", r"\1ushort2", source, flags=re.MULTILINE)
    return without_type_traits(conditions_of_their_type)


def without_type_traits(source):
    """Returns the CUDA C++ without <cuda/std/type_traits>, which TVM always includes, where nothing in it is used.

    NVRTC takes about a second for that header, more than for most kernels.
    """
    pattern = r"^ *#include <cuda/std/type_traits>\n *namespace std {.*?^ *}\n"
    without = re.sub(pattern, "", source, flags=re.MULTILINE | re.DOTALL)
    return source if re.search(r"(?<!cuda::)\bstd::", without) else without


def call_nvrtc(compile_program, program, _, options):
    """Calls NVRTC's `compile_program` without the --use_fast_math that TVM always adds: it is not fp32 arithmetic.

    By it a power is 2^(y log2 x), NaN for every negative x (GPT-2's x**3, Llama's x**2), and a tanh has 11 bits. And
    without warnings, which are of NVIDIA's own headers and would stand in front of the error in a row's one line. What
    TVM writes for infinity in bf16 is defined: no header has it.
    """
    options = [option for option in options if option != b"--use_fast_math"]
    options += [b"--disable-warnings", b"-Dinff=__int_as_float(0x7f800000)"]
    return compile_program(program, len(options), options)

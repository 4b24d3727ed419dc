"""The device: what it is, what it holds, and whether it kept still while something was timed."""

import contextlib
import gc
import os
import time
import typing
from pathlib import Path

import numpy as np
import pynvml
import torch

from harness.errors import UserError
from harness.processes import report

OUTLIER_SHARE, DRIFT, CLOCK_DROP = 0.01, 0.02, 0.05  # above these a row gets a warning: see disturbances()
OTHERS_SHARE, STEAL_SHARE, MIN_CPU_S = 0.03, 0.01, 0.05  # and above these: see cpu_disturbances()


def synchronize(device):
    """Waits until the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def describe_device(choice):
    """Returns the CSV's columns on the device of that choice, plus `device` ("cpu" or "cuda:N").

    choice: "auto", "cpu", "cuda" or "cuda:N". Raises UserError where there is no such device. To be called in a process
    of its own: a process that has asked CUDA anything cannot fork one that uses it.
    """
    report("looking for the device")
    count = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and count == 0):
        threads = torch.get_num_threads()
        return {"device": "cpu", "device_name": f"{cpu_name()}, {threads} threads", "cpu_threads": threads}
    kind, _, index = choice.partition(":")
    if choice != "auto" and (kind != "cuda" or not (index.isdecimal() or choice == "cuda")):
        raise UserError(f"--device takes auto, cuda, cuda:N or cpu, not {choice!r}")
    if count == 0:
        raise UserError(
            f"--device {choice}: no CUDA device is visible to PyTorch {torch.__version__}; use --device cpu"
        )
    if int(index or 0) >= count:
        raise UserError(f"--device {choice}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    device = f"cuda:{int(index or 0)}"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "cuda_version": torch.version.cuda,
        "driver_version": Gpu(device).driver_version(),
    }


def cpu_name():
    """Returns the processor's name as the kernel knows it, or its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


def host_memory_bytes():
    """Returns the memory that this machine, or the control group that this process is in, has for all of its processes.

    Documentation/admin-guide/cgroup-v2.rst of Linux: memory.max; version 1 has memory.limit_in_bytes.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


class CpuTimes(typing.NamedTuple):
    """Seconds since some start: of the clock, and of CPU time on the CPUs that this process may run on."""

    wall_s: float
    busy_s: float  # of all processes and of the kernel
    steal_s: float  # taken by the hypervisor for other machines
    own_s: float  # of this process, all its threads

    @classmethod
    def read(cls):
        """Returns the CpuTimes of now, None where the kernel does not tell them (man 5 proc: /proc/stat)."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
            cpus = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            ticks = [list(map(int, row[1:9])) for row in rows if row and row[0] in cpus]
            user, nice, system, _, _, irq, softirq, steal = (sum(column) for column in zip(*ticks, strict=True))
            tick_s = 1 / os.sysconf("SC_CLK_TCK")
            busy_s = (user + nice + system + irq + softirq) * tick_s
            return cls(time.monotonic(), busy_s, steal * tick_s, time.process_time())
        return None


CLOCK_LIMITS = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "temperature",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "temperature",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}


class Gpu:
    """NVML's view of one CUDA device; what the driver or the device does not offer reads as None.

    Of the device "cpu" there is nothing but `cpu_times` in its state(), which no other device has.
    """

    def __init__(self, device):
        self.device, self.handle = device, None
        if device != "cpu":
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid  # CUDA_VISIBLE_DEVICES renumbers, UUIDs stay
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def ask(self, function, *args):
        """Returns what an NVML function says of the device, or None."""
        with contextlib.suppress(pynvml.NVMLError):
            return function(self.handle, *args) if self.handle else None

    def driver_version(self):
        return pynvml.nvmlSystemGetDriverVersion() if self.handle else None

    def state(self):
        """Returns energy_mj (since the driver was loaded), sm_clock_mhz, limits (names), processes (their number).

        And cpu_times, CpuTimes or None.
        """
        reasons = self.ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return {
            "energy_mj": self.ask(pynvml.nvmlDeviceGetTotalEnergyConsumption),
            "sm_clock_mhz": self.ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "limits": {text for bit, text in CLOCK_LIMITS.items() if reasons & bit},
            "processes": len(self.ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or ()),
            "cpu_times": CpuTimes.read() if self.device == "cpu" else None,
        }


def disturbances(times_ms, before, after):
    """Returns what says that the machine did not keep still while `times_ms` was measured, as a list of short texts.

    times_ms: array of milliseconds, in the order in which they were measured. before, after: Gpu.state() at both ends.
    An outlier lies further from the median than 10 standard deviations, taken as 1.4826 x the median absolute deviation
    (that of a normal distribution), plus 5 % of the median.
    """
    found = []
    median = np.median(times_ms)
    deviations = np.abs(times_ms - median)
    outliers = np.mean(deviations > 10 * 1.4826 * np.median(deviations) + 0.05 * median)
    if outliers > OUTLIER_SHARE:
        found.append(f"{outliers:.1%} of the runs are outliers")
    first, second = np.array_split(times_ms, 2)
    if len(second) and abs(drift := np.median(second) / np.median(first) - 1) > DRIFT:
        found.append(f"the second half is {drift:+.1%} against the first")
    if limits := before["limits"] | after["limits"]:
        found.append(f"GPU clock limited by {' and '.join(sorted(limits))}")
    if before["sm_clock_mhz"] and after["sm_clock_mhz"] < (1 - CLOCK_DROP) * before["sm_clock_mhz"]:
        found.append(f"SM clock fell from {before['sm_clock_mhz']} to {after['sm_clock_mhz']} MHz")
    if max(before["processes"], after["processes"]) > 1:
        found.append("another process was on the GPU")
    if before["cpu_times"] and after["cpu_times"]:
        found += cpu_disturbances(before["cpu_times"], after["cpu_times"], len(os.sched_getaffinity(0)))
    return found


def cpu_disturbances(before, after, cpus):
    """Returns what others took of the CPU time of `cpus` CPUs between two CpuTimes, as a list of short texts.

    The kernel counts in ticks, a hundredth of a second each as a rule: a few of them are no disturbance.
    """
    wall_s, busy_s, steal_s, own_s = (end - start for start, end in zip(before, after, strict=True))
    others_s, found = busy_s - own_s, []
    if others_s > max(OTHERS_SHARE * wall_s * cpus, MIN_CPU_S):
        found.append(f"other processes used {others_s / wall_s:.1f} of {cpus} CPUs")
    if steal_s > max(STEAL_SHARE * wall_s * cpus, MIN_CPU_S):
        found.append(f"the hypervisor took {steal_s / wall_s / cpus:.0%} of the CPU time")
    return found


def process_memory_bytes(device):
    """Returns the device memory in use as the CUDA driver counts it; on the CPU this process's peak resident set.

    The driver's count is the same for PyTorch's allocator and for TVM's. It is of the whole device: only a difference
    between two readings belongs to this process, and only while no other one allocates.
    """
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak_memory(device):
    """Frees what nothing refers to any more; on the CPU the peak of process_memory_bytes() starts anew.

    Returns whether it does: where the kernel does not allow or know that, as in some sandboxes, there is no peak.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc
        return "VmHWM:" in Path("/proc/self/status").read_text()
    return False

"""What the machine gives this process."""

import ctypes
import math
import os
import platform
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may use: its affinity mask, cut by the container's CPU quota.

    The quota is read from cgroup v2 (`cpu.max`) or v1 (`cpu.cfs_*`); half a core counts as one.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS has no affinity masks
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """CPU quota in cores, infinite if there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    return int(quota) / int(period) if quota.isdigit() else math.inf


def available_memory(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int | None:
    """Bytes this machine can still give, cut by the container's limit; None if nothing tells.

    The limit is read from cgroup v2 (`memory.max`) or v1; what it counts of cached files that
    nobody uses is not counted against it.
    """
    amounts = []
    with suppress(OSError):  # not Linux
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE):
            amounts.append(int(found[1]) * 1024)
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # not that version, or "max"
            left = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            words = (cgroup / limit).with_name("memory.stat").read_text().split()
            facts = dict(zip(words[::2], words[1::2], strict=True))
            amounts.append(max(0, left + int(facts.get(cached, 0))))
    return min(amounts, default=None)


def cpu_model() -> str:
    """The name of the CPU, such as "Intel(R) Xeon(R) Gold 6430"."""
    with suppress(OSError):  # not Linux
        found = re.search(r"^model name\s*: (.+)", CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def count_gpus() -> int:
    """GPUs that torch, were it imported, would find and could use.

    Asks NVIDIA's driver itself, since torch takes seconds to ask it. The driver is also who knows
    what every form of CUDA_VISIBLE_DEVICES means: indices, UUIDs, MIG devices, nothing.
    """
    driver, count = _gpu_driver(), ctypes.c_int()
    found = driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def gpu_memory() -> int | None:
    """Bytes of memory of the smallest GPU that torch could use; None if the driver does not say.

    That of a MIG device is its own part of the card's.
    """
    sizes = []
    if driver := _gpu_driver():
        for number in range(count_gpus()):
            device, size = ctypes.c_int(), ctypes.c_size_t()
            if (
                driver.cuDeviceGet(ctypes.byref(device), number) == 0
                and driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
            ):
                sizes.append(size.value)
    return min(sizes, default=None)


def _gpu_driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, ready to be asked; None if there is none with which torch could work."""
    cuda = _torch_cuda()
    if cuda is None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return None
    version = ctypes.c_int()
    usable = (
        driver.cuDriverGetVersion(ctypes.byref(version)) == 0
        and version.value // 1000 >= cuda  # 13020 is 13.2; any 13.x serves what 13.y was built for
        and driver.cuInit(0) == 0
    )
    return driver if usable else None


def has_gpu() -> bool:
    """Whether there is a GPU that torch could use."""
    return count_gpus() > 0


def _torch_cuda() -> int | None:
    """The major version of CUDA that the installed torch was built for; None for a CPU build."""
    spec = find_spec("torch")  # finds, and does not import
    if spec is None or spec.origin is None:
        return None
    facts = Path(spec.origin).with_name("version.py").read_text("utf-8")
    match = re.search(r"^cuda\b.*= *['\"](\d+)", facts, re.MULTILINE)
    return int(match[1]) if match else None

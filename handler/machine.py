"""What the machine gives this process."""

import ctypes
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


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
    """CPU quota in cores, infinite where there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    return int(quota) / int(period) if quota.isdigit() else math.inf


def has_gpu() -> bool:
    """Whether torch, were it imported, would find a GPU that it can use.

    Asks NVIDIA's driver itself, which honours CUDA_VISIBLE_DEVICES; torch takes seconds to ask it.
    """
    cuda = _torch_cuda()
    if cuda is None:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return False
    version, count = ctypes.c_int(), ctypes.c_int()
    return (
        driver.cuDriverGetVersion(ctypes.byref(version)) == 0
        and version.value // 1000 >= cuda  # 13020 is 13.2; any 13.x serves what 13.y was built for
        and driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


def _torch_cuda() -> int | None:
    """The major version of CUDA that the installed torch was built for; None for a CPU build."""
    spec = find_spec("torch")  # finds, and does not import
    if spec is None or spec.origin is None:
        return None
    facts = Path(spec.origin).with_name("version.py").read_text("utf-8")
    match = re.search(r"^cuda\b.*= *['\"](\d+)", facts, re.MULTILINE)
    return int(match[1]) if match else None

"""A CUDA driver that is none: it answers what handler/machine.py asks, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests import skip

SOURCE = """
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
"""


def make_driver(folder: Path, *, version: int, init: int, count: int) -> Path:
    """libcuda.so.1 in `folder`; skips the test if nothing compiles it."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        skip("no compiler to make a driver with")
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    values = (f"-DVERSION={version}", f"-DINIT={init}", f"-DCOUNT={count}")
    subprocess.run([compiler, "-shared", "-fPIC", *values, source, "-o", library], check=True)
    return library

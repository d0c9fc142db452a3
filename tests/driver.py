"""A CUDA driver that is none: it answers what handler/machine.py asks, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests import skip

SOURCE = """
#include <stddef.h>
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int number) { *device = 7 + number; return number >= COUNT; }
int cuDeviceTotalMem_v2(size_t *bytes, int device)
{ *bytes = (size_t)MEMORY * (device - 6); return UNTOLD; }
"""


def make_driver(
    folder: Path, *, version: int, init: int, count: int, memory: int | None = 80 * 2**30
) -> Path:
    """libcuda.so.1 in `folder`; skips the test if nothing compiles it.

    The first GPU has `memory` bytes, the second twice as many, and so on; None: it does not tell.
    """
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        skip("no compiler to make a driver with")
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    values = [f"-DVERSION={version}", f"-DINIT={init}", f"-DCOUNT={count}"]
    values += [f"-DMEMORY={memory or 0}", f"-DUNTOLD={int(memory is None)}"]
    subprocess.run([compiler, "-shared", "-fPIC", *values, source, "-o", library], check=True)
    return library

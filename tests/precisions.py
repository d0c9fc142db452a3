"""What this machine computes in: tests of a precision are marked with it, and run only if it does.

@pytest.mark.parametrize(("precision", "off"), each(fp32=1e-4, bf16=0.05))
"""

import re
from typing import Any

import openvino
import pytest

from handler.machine import CPUINFO, available_cores, cpu_model

# What a CPU says of itself (Linux, x86 and arm64), by the names that people know it by.
FLAGS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "BF16": {"avx512_bf16", "amx_bf16", "bf16"},
    "AMX": {"amx_tile"},
    "NEON": {"asimd"},
    "SVE": {"sve"},
}


def each(**tolerances: Any) -> list[Any]:
    """Parameters (precision, tolerance), each marked with its precision."""
    return [
        pytest.param(name, tolerance, marks=pytest.mark.precision(name), id=name)
        for name, tolerance in tolerances.items()
    ]


def capabilities() -> list[str]:
    """What OpenVINO says that the CPU computes in, even if the environment does not allow it."""
    return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def computes_in(precision: str) -> bool:
    """Whether the CPU computes in it, within what the environment allows."""
    if precision == "bf16":
        from handler.openvino_engine import has_bf16  # imports torch, which takes seconds

        return has_bf16()
    return precision == "fp32" or precision.upper() in capabilities()


def describe_machine() -> str:
    """One line: the CPU, its cores and instruction set, and what OpenVINO says of it."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""  # macOS has none
    found = re.search(r"^(?:flags|Features)\s*: (.+)", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    known = [name for name, any_of in FLAGS.items() if flags & any_of]
    return (
        f"CPU: {cpu_model()}, cores: {available_cores()}, "
        f"instructions: {' '.join(known) or 'unknown'}, OpenVINO: {' '.join(capabilities())}"
    )

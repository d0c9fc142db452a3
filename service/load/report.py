"""The load generator's output: a table for people, the JSON line, and a plot."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from handler.machine import available_cores, cpu_model
from service.load.images import ImageRequest
from service.load.measurement import Measurement
from service.plots import plot
from service.tables import counted, text_line

HEADINGS = ("load", "req/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "refused", "failed", "own CPU")
WIDTHS = (11, *[9] * (len(HEADINGS) - 1))  # known before a figure is: each line is printed at once
LIBRARIES = ("aiohttp", "pillow")


@dataclass(frozen=True)
class Report:
    """The content of the JSON line."""

    url: str
    form: str
    per_request: int  # images
    images: int
    image_bytes: int  # of a body, on average
    machine: dict[str, Any]
    versions: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)


def make_report(url: str, form: str, per_request: int, images: Sequence[ImageRequest]) -> Report:
    """The conditions of this run; the measurements are added one by one."""
    return Report(
        url=url,
        form=form,
        per_request=per_request,
        images=len(images),
        image_bytes=sum(len(image.body) for image in images) // len(images),
        machine=machine(),
        versions={name: version(name) for name in LIBRARIES},
    )


def heading() -> str:
    """The first line of the table."""
    return text_line(HEADINGS, WIDTHS)


def row(run: Measurement) -> str:
    """A line of the table, and one more for each kind of failure."""
    load = f"{run.rate:g}/s" if run.rate else counted(run.concurrency, "client")
    times = (run.p50_ms, run.p90_ms, run.p95_ms, run.p99_ms)
    cells = (load, run.throughput_rps, *times, run.refused, run.failed)
    line = text_line((*cells, f"{run.generator_cpu_percent:.0f}%"), WIDTHS)
    return "\n".join([line, *(f"{count:13} x {kind}" for kind, count in run.failures.items())])


def plot_runs(runs: Sequence[Measurement], path: Path) -> None:
    """Throughput against latency, a point for each load."""
    with plot(path, 7, 4.5) as axes:
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            points = [(r.throughput_rps, value) for r in runs if (value := getattr(r, name))]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name.removesuffix("_ms"))
        axes.set(xlabel="good answers a second", xlim=(0, None))
        axes.set(ylabel="latency, ms", ylim=(0, None))
        if axes.lines:
            axes.legend()


def machine() -> dict[str, Any]:
    """What the figures depend on besides the server."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return facts
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
    found = re.search(r"^flags\s*: (.+)", text, re.MULTILINE)
    facts["flags"] = [flag for flag in known if found and flag in found[1].split()]
    return facts

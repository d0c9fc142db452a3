"""Plots, saved as files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plot(path: Path, width: float, height: float) -> Iterator[Any]:
    """Matplotlib's axes to draw on, which are saved afterwards; the size is in inches.

    Raises OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    yield axes
    figure.savefig(path, dpi=100)

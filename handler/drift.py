"""Drift: whether the images that come are like those of --calibrate.

An image has a few signals, a number each. Packaging cuts the range of each signal into bins of
about a tenth of the images of --calibrate, and the workers count images by bin. Prometheus compares
the shares of the last hour, of all workers together, with those of --calibrate
(deploy/monitoring/rules.yml): a worker alone sees few images, and none of the others'.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the launcher reads model cards, and must stay small
    import numpy as np
    from numpy.typing import NDArray

STEP = 8  # every eighth pixel of every eighth row: of all 224 x 224 the mean takes 8 times as long


@dataclass(frozen=True)
class Bins:
    """The range of a signal, cut into pieces."""

    edges: tuple[float, ...]  # ascending upper bounds, in their bins; the last bin has none
    shares: tuple[float, ...]  # of the images of --calibrate in each bin, never 0

    @cached_property
    def labels(self) -> list[str]:
        """A name for each bin: its upper bound."""
        return [*(f"{edge:.9g}" for edge in self.edges), "+Inf"]

    def index(self, value: float) -> int:
        return bisect_left(self.edges, value)


@dataclass(frozen=True)
class Reference:
    """What the images of --calibrate are like."""

    images: int
    signals: dict[str, Bins]  # confidence, class, brightness, size, distance

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Reference":
        """What dataclasses.asdict and JSON made of one. Raises TypeError or KeyError."""
        signals = {
            name: Bins(tuple(bins["edges"]), tuple(bins["shares"]))
            for name, bins in facts["signals"].items()
        }
        return cls(facts["images"], signals)


def brightness(pixels: "NDArray[np.uint8]") -> float:
    """The mean level, 0 to 255, of the model's input [3, H, W], to a tenth."""
    return round(float(pixels[:, ::STEP, ::STEP].mean()), 1)

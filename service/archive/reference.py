"""What the images of --calibrate are like, for drift to be seen against (handler/drift.py)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from handler.drift import Bins, Reference, brightness
from service.archive.calibration import CalibrationSet

BINS = 10  # of about equal shares, as is usual for the population stability index
BELOW = 0.999  # of the smallest value: the bound of a bin for what is smaller than all
PRIOR = (
    0.5  # of an image in each bin, so that no share is 0; deploy/monitoring/rules.yml has it too
)


def reference_of(
    images: CalibrationSet, probabilities: NDArray[np.float32], distances: NDArray[np.float32]
) -> Reference:
    """What images are like, with the probabilities [N, C] that a worker gives them.

    `distances` [N] are those from the other images; see handler/confidence.py.
    """
    signals = signals_of(images, probabilities, distances)
    bins = {name: make_bins(values) for name, values in signals.items()}
    return Reference(len(probabilities), bins)


def signals_of(
    images: CalibrationSet, probabilities: NDArray[np.float32], distances: NDArray[np.float32]
) -> dict[str, list[float]]:
    """Each signal of each image, as a worker counts them."""
    return {
        # as an answer has it
        "confidence": [round(float(row.max()), 6) for row in probabilities],
        # Neighbours are often alike, as in ImageNet, and few classes have a bin each.
        "class": [float(number) for number in probabilities.argmax(axis=1)],
        "brightness": [brightness(image) for image in images.images],
        "size": [float(width * height) for width, height in images.sizes],
        "distance": [float(distance) for distance in distances],
    }


def make_bins(values: Sequence[float]) -> Bins:
    """Bins of equal shares, as far as equal values allow, and one on either side of all values."""
    ordered = sorted(values)
    tenths = [ordered[-(-len(ordered) * part // BINS) - 1] for part in range(1, BINS + 1)]
    bins = Bins(tuple(sorted({BELOW * ordered[0], *tenths})), ())
    counts = np.bincount([bins.index(value) for value in ordered], minlength=len(bins.labels))
    shares = (counts + PRIOR) / (len(ordered) + PRIOR * len(counts))
    return Bins(bins.edges, tuple(round(float(share), 6) for share in shares))

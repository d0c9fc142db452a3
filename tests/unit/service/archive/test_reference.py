"""The reference of drift, made of drawn numbers."""

import numpy as np
import pytest

from service.archive.calibration import CalibrationSet
from service.archive.reference import make_bins, reference_of


def shares(values: list[float], edges: tuple[float, ...]) -> list[float]:
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    return list(counts / len(values))


def test_bins_hold_a_tenth_each() -> None:
    values = [float(number) for number in range(1, 1001)]
    bins = make_bins(values)
    assert bins.edges == (0.999, *(100.0 * part for part in range(1, 11)))
    assert shares(values, bins.edges) == [0, *[0.1] * 10, 0]
    assert bins.shares == pytest.approx([0, *[0.1] * 10, 0], abs=0.001)
    assert min(bins.shares) > 0
    assert sum(bins.shares) == pytest.approx(1, abs=1e-5)
    assert bins.labels == ["0.999", "100", *(str(100 * part) for part in range(2, 11)), "+Inf"]


def test_a_frequent_value_has_a_bin_of_its_own() -> None:
    bins = make_bins([5.0] * 60 + [7.0] * 40)
    assert bins.edges == (5 * 0.999, 5.0, 7.0)
    assert bins.shares == pytest.approx([0, 0.6, 0.4, 0], abs=0.01)


def test_other_sizes_are_seen_even_if_all_were_equal() -> None:
    """Images that a web page has resized: smaller and larger ones have bins."""
    bins = make_bins([50176.0] * 100)
    assert [bins.index(value) for value in (40000, 50176, 60000)] == [0, 1, 2]
    assert len(set(bins.labels)) == 3


def test_the_signals_of_images() -> None:
    dark, bright = (np.full((3, 32, 32), level, np.uint8) for level in (10, 200))
    images = CalibrationSet((dark, bright), None, ((640, 480), (100, 50)))
    probabilities, distances = np.array([[0.25, 0.75], [1, 0]]), np.array([30, 20], np.float32)
    reference = reference_of(images, probabilities.astype(np.float32), distances)
    assert reference.images == 2
    last = {name: bins.edges[-1] for name, bins in reference.signals.items()}
    assert last == {
        "confidence": 1.0,
        "class": 1.0,
        "brightness": 200.0,
        "size": 640 * 480,
        "distance": 30.0,
    }

"""A result as the shared cache holds it: what is kept of it, and what is refused."""

import numpy as np
import pytest
from numpy.typing import NDArray

from handler.answers import best_classes
from handler.cache import Result
from handler.shared_result import pack, unpack

KEY = b"classifier:1:scope:image"
LABELS = [str(number) for number in range(1000)]


def drawn(classes: int = 1000) -> NDArray[np.float32]:
    """Probabilities of which many are equal, and most are 0, as float32 has it."""
    values = np.random.default_rng(0).integers(0, 12, classes) - 8
    probabilities: NDArray[np.float32] = np.maximum(values, 0).astype(np.float32)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_as_many_classes_as_are_kept_are_answered_as_they_were(top_k: int, sure: bool) -> None:
    probabilities = np.eye(1000, dtype=np.float32)[7] if sure else drawn()
    value = pack(KEY, Result((640, 480), probabilities, "fast"), 20)
    found = unpack(KEY, value, 1000)
    assert found
    expected = best_classes(probabilities, top_k, LABELS)
    assert best_classes(found.probabilities, top_k, LABELS) == expected
    assert (found.size, found.decode) == ((640, 480), "fast")
    assert (found.suffices(20), found.suffices(21)) == (True, False)
    assert len(value) == 178


def test_of_few_classes_all_are_kept() -> None:
    probabilities = drawn(12)
    found = unpack(KEY, pack(KEY, Result((1, 2), probabilities), 20), 12)
    assert found
    assert found.decode == "exact"
    assert found.suffices(12)
    assert np.array_equal(found.probabilities, probabilities)


def test_a_damaged_value_is_none() -> None:
    value = pack(KEY, Result((640, 480), drawn()), 20)
    for place in range(len(value)):
        damaged = bytearray(value)
        damaged[place] ^= 1
        assert unpack(KEY, bytes(damaged), 1000) is None
        assert unpack(KEY, value[:place], 1000) is None
    assert unpack(KEY, value + b"\0", 1000) is None


@pytest.mark.parametrize("value", [None, "text", b"", b"\1" * 178, b"\1" * 10**6, 5, [b"1"]])
def test_what_others_wrote_is_none(value: object) -> None:
    assert unpack(KEY, value, 1000) is None


def test_a_value_of_another_key_or_model_is_none() -> None:
    value = pack(KEY, Result((640, 480), drawn()), 20)
    assert unpack(KEY + b"0", value, 1000) is None
    assert unpack(KEY, value, 19) is None
    best = int(drawn().argmax())
    assert unpack(KEY, pack(KEY, Result((1, 1), drawn()), 1), best) is None

"""The result cache: what it keeps, what it lets go, and what it costs."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from handler.cache import OVERHEAD_BYTES, Result, ResultCache


def result(number: int = 0, classes: int = 1000) -> Result:
    return Result((640, 480), np.full(classes, number, np.float32))


def key(number: int) -> bytes:
    return ResultCache.key(str(number).encode())


ENTRY = 4 * 1000 + OVERHEAD_BYTES


def test_what_is_put_is_got() -> None:
    cache = ResultCache(2**20)
    cache.put(key(1), result(1))
    found = cache.get(key(1))
    assert found
    assert found.size == (640, 480)
    assert np.array_equal(found.probabilities, result(1).probabilities)
    assert cache.get(key(2)) is None


def test_the_least_recently_used_goes_first() -> None:
    cache = ResultCache(3 * ENTRY)
    for number in (1, 2, 3):
        cache.put(key(number), result(number))
    cache.get(key(1))
    cache.put(key(4), result(4))
    assert [number for number in (1, 2, 3, 4) if cache.get(key(number))] == [1, 3, 4]


def test_a_result_larger_than_the_cache_is_not_kept() -> None:
    cache = ResultCache(ENTRY)
    cache.put(key(1), result(1, classes=1001))
    assert cache.get(key(1)) is None
    cache.put(key(1), result(1))
    assert cache.get(key(1))


def test_a_result_is_used_for_no_more_classes_than_it_knows() -> None:
    cache = ResultCache(2**20)
    cache.put(key(1), replace(result(1), known=20))
    assert cache.get(key(1), 20)
    assert cache.get(key(1), 21) is None
    cache.put(key(1), result(1))
    assert cache.get(key(1), 1000)


def test_a_row_of_a_batch_does_not_keep_the_batch() -> None:
    cache = ResultCache(2**20)
    batch = np.zeros((8, 1000), np.float32)
    cache.put(key(1), Result((1, 1), batch[3]))
    found = cache.get(key(1))
    assert found
    assert found.probabilities.nbytes == 4000
    assert found.probabilities.base is None


@pytest.mark.parametrize("classes", [3, 1000])
def test_the_bound_holds_for_real_memory(classes: int) -> None:
    """However full it is: its dictionaries grow in steps."""
    cache = ResultCache(2**30)
    tracemalloc.start()
    try:
        for number in range(1, 2001):
            cache.put(key(number), result(number, classes))
            if number >= 200:
                real = tracemalloc.get_traced_memory()[0] / number
                assert real <= 4 * classes + OVERHEAD_BYTES
    finally:
        tracemalloc.stop()

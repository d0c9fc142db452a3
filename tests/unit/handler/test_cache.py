"""The result cache: what it keeps, what it lets go, and what it costs."""

import tracemalloc

import pytest
import torch

from handler.cache import OVERHEAD_BYTES, Result, ResultCache


def result(number: int = 0, classes: int = 1000) -> Result:
    return Result((640, 480), torch.full((classes,), float(number)))


def key(number: int) -> bytes:
    return ResultCache.key(str(number).encode())


ENTRY = 4 * 1000 + OVERHEAD_BYTES


def test_what_is_put_is_got() -> None:
    cache = ResultCache(2**20)
    cache.put(key(1), result(1))
    found = cache.get(key(1))
    assert found
    assert found.size == (640, 480)
    assert torch.equal(found.probabilities, result(1).probabilities)
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


def test_a_row_of_a_batch_does_not_keep_the_batch() -> None:
    cache = ResultCache(2**20)
    batch = torch.zeros(8, 1000)
    cache.put(key(1), Result((1, 1), batch[3]))
    found = cache.get(key(1))
    assert found
    assert found.probabilities.untyped_storage().nbytes() == 4000


@pytest.mark.parametrize("classes", [3, 1000])
def test_the_bound_holds_for_real_memory(classes: int) -> None:
    """tracemalloc sees Python's share; torch's is the tensor's own bytes."""
    entries, limit = 2000, 2**30
    cache = ResultCache(limit)
    tracemalloc.start()
    try:
        for number in range(entries):
            cache.put(key(number), result(number, classes))
        python_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert python_bytes / entries <= OVERHEAD_BYTES

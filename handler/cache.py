"""Results of images that were classified before.

Each worker has one cache in its memory, which ends with its model, so that no answer is ever of
other weights. What a worker classified itself it holds with all probabilities, so that any top_k
can be answered from it; what came from the shared cache (shared_cache.py) has the best ones alone.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

OVERHEAD_BYTES = 550  # of an entry beside its probabilities, as tracemalloc counts them


@dataclass(frozen=True)
class Result:
    """What is kept of an image."""

    size: tuple[int, int]  # width and height
    probabilities: NDArray[np.float32]  # [C]
    decode: str = "exact"  # or "fast", as Picture has it
    known: int | None = None  # so many best classes, and the others are 0; None: all

    def suffices(self, classes: int) -> bool:
        """Whether so many best classes can be told from it."""
        return self.known is None or classes <= self.known


class ResultCache:
    """Least recently used results by the sha256 of the image as it was sent, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._results: LRUCache[bytes, Result] = LRUCache(max_bytes, getsizeof=_size)

    @staticmethod
    def key(image: bytes, size: tuple[int, int] | None = None) -> bytes:
        """A hash whose collisions nobody can make, or one client could choose another's answer.

        `size`, width and height, is that of raw pixels, which the same bytes may have others of.
        """
        shape = b"%dx%d" % size if size else b""  # beside the hash: no file can imitate it
        return hashlib.sha256(image).digest() + shape

    def get(self, key: bytes, classes: int = 1) -> Result | None:
        """The result, if so many best classes can be told from it."""
        result = self._results.get(key)
        return result if result and result.suffices(classes) else None

    def put(self, key: bytes, result: Result) -> None:
        """Keep a result, unless it alone is larger than the cache."""
        if _size(result) <= self._results.maxsize:
            # A copy, because a row of a batch's array would keep the whole batch alive.
            self._results[key] = replace(result, probabilities=result.probabilities.copy())


def _size(result: Result) -> int:
    return result.probabilities.nbytes + OVERHEAD_BYTES

"""A result as the shared cache holds it: small, and checked against damage when it is read.

Little endian: version, width, height, whether it was decoded fast, the number of classes n; n class
indices and their n probabilities, best first; a CRC-32 of the key and of all that. 20 classes take
178 bytes. All other probabilities are left out.
"""

import struct
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from handler.cache import Result

VERSION = 1
_HEAD = struct.Struct("<BIIBI")
_TAIL = struct.Struct("<I")


def pack(key: bytes, result: Result, count: int) -> bytes:
    """The `count` best classes of a result, or all if there are no more."""
    best = (-result.probabilities).argsort(kind="stable")[:count]
    fast = result.decode == "fast"
    body = b"".join(
        [
            _HEAD.pack(VERSION, *result.size, fast, len(best)),
            best.astype("<u4").tobytes(),
            result.probabilities[best].astype("<f4").tobytes(),
        ]
    )
    return body + _TAIL.pack(crc32(body, crc32(key)))


def unpack(key: bytes, value: object, total: int) -> Result | None:
    """The result with `total` probabilities, of which the best are as they were and the others 0.

    None for what `pack` has not made of this key.
    """
    if not isinstance(value, bytes) or not _HEAD.size + _TAIL.size < len(value):
        return None
    body, tail = value[: -_TAIL.size], value[-_TAIL.size :]
    version, width, height, fast, count = _HEAD.unpack_from(body)
    if (
        version != VERSION
        or not 0 < count <= total
        or len(body) != _HEAD.size + 8 * count
        or _TAIL.unpack(tail) != (crc32(body, crc32(key)),)
    ):
        return None
    best = np.frombuffer(body, "<u4", count, _HEAD.size)
    values = np.frombuffer(body, "<f4", count, _HEAD.size + 4 * count)
    if not (best < total).all() or not np.isfinite(values).all():
        return None
    probabilities: NDArray[np.float32] = np.zeros(total, np.float32)
    probabilities[best] = values
    known = None if count == total else count
    return Result((width, height), probabilities, "fast" if fast else "exact", known)

"""An image that comes as its pixels, which nobody has to decode."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RawPixels:
    """Pixels as a client sent them: red, green and blue, a byte each, row by row."""

    data: bytes  # width x height x 3
    size: tuple[int, int]  # width and height

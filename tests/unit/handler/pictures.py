"""What tests of images share."""

import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.models import get_weight

from handler import images
from handler.errors import RequestError
from handler.images import Picture, read_picture
from handler.networks import input_transform
from handler.settings import Settings

TRANSFORM = input_transform(get_weight("MobileNet_V2_Weights.IMAGENET1K_V2"))


def pixels_of(data: bytes, **settings: Any) -> NDArray[np.uint8]:
    return images.decode(images.open_image(data, Settings(**settings)))


def decode(data: bytes, **settings: Any) -> Image.Image:
    return Image.fromarray(pixels_of(data, **settings))


def refusal(data: bytes, **settings: int) -> RequestError:
    with pytest.raises(RequestError) as raised:
        decode(data, **settings)
    return raised.value


def outcome(data: bytes, **settings: Any) -> Picture | RequestError:
    try:
        return read_picture(data, TRANSFORM, Settings(**settings))
    except RequestError as error:
        return error


def near(seen: Any, expected: tuple[int, ...], by: int = 6) -> bool:
    """Whether two colours are the same up to what JPEG does to them."""
    return all(abs(a - b) <= by for a, b in zip(tuple(seen), expected, strict=True))


def corners(image: Image.Image) -> list[object]:
    """The colours in the centers of the four quarters."""
    width, height = image.size
    return [
        image.getpixel((x, y))
        for y in (height // 4, height * 3 // 4)
        for x in (width // 4, width * 3 // 4)
    ]


def tiff(kind: int, count: int, value: bytes, entries: int = 1) -> bytes:
    """A little-endian EXIF block whose only entry is the orientation."""
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, entries) + entry + bytes(4)

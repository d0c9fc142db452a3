"""Pictures for tests, all drawn here: known colours, known shapes, known damage."""

import random
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 40), (40, 50, 220), (230, 220, 40)
QUARTERS = (RED, GREEN, BLUE, YELLOW)  # top left, top right, bottom left, bottom right

# How a camera that holds its sensor so stores what people see upright; EXIF 2.3, tag 0x0112.
STORED_AS = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.ROTATE_90, Image.Transpose.FLIP_TOP_BOTTOM),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT),
    8: (Image.Transpose.ROTATE_270,),
}
ORIENTATION_TAG = 0x0112


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(colour: Any = RED, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def quarters(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """One colour in each quarter, so that every turn and flip shows."""
    image = Image.new("RGB", size)
    middle, right = size[0] // 2, size[0]
    centre, bottom = size[1] // 2, size[1]
    boxes = (
        (0, 0, middle, centre),
        (middle, 0, right, centre),
        (0, centre, middle, bottom),
        (middle, centre, right, bottom),
    )
    for colour, box in zip(QUARTERS, boxes, strict=True):
        image.paste(colour, box)
    return image


def noise(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    """Smooth colour noise: hard for resizing, the same on every run."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (9, 7), rng.randbytes(9 * 7 * 3))
    fine = Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
    return Image.blend(small.resize(size, Image.Resampling.BICUBIC), fine, 0.3)


def grey16(values: Sequence[int]) -> Image.Image:
    """One row of 16-bit grey."""
    return Image.frombytes("I;16", (len(values), 1), struct.pack(f"<{len(values)}H", *values))


def turned(image: Image.Image, orientation: int, format: str, **options: object) -> bytes:
    """The image as such a camera stores it, with the EXIF tag that says so."""
    for step in STORED_AS[orientation]:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return encode(image, format, exif=exif, **options)


def with_exif(exif: bytes, image: Image.Image) -> bytes:
    """A JPEG with these bytes, valid or not, as its EXIF block."""
    return encode(image, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0" + exif)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def announced(format: str, width: int, height: int) -> bytes:
    """A few bytes whose header announces this size."""
    if format == "PNG":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body
    data = bytearray(encode(plain(size=(4, 4)), format))
    if format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif format == "GIF":  # the screen stays small: the frame is what announces
        start = data.index(b",\0\0\0\0") + 5
        data[start : start + 4] = struct.pack("<HH", width, height)
    elif format == "WEBP":
        data = bytearray(encode(plain(size=(4, 4)), "WEBP", lossless=False))
        start = data.index(b"\x9d\x01\x2a") + 3
        data[start : start + 4] = struct.pack("<HH", width, height)
    return bytes(data)

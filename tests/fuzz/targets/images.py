"""Images: refused with the documented errors, or the pixels that Pillow gives by itself."""

import random
import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.containers import PNG
from handler.errors import RequestError, UnreadableImage
from handler.images import FORMATS, MAX_EXIF_BYTES, Encoded, decode, open_image
from handler.settings import Settings
from tests.drawing import announced, encode, grey16, noise, png_chunk, quarters, turned, with_exif
from tests.fuzz.target import Target

SETTINGS = Settings(max_image_pixels=2**18, max_image_bytes=2**16)
SIZE = (20, 14)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Pixels = NDArray[np.uint8]


def check(data: bytes) -> None:
    try:
        encoded = open_image(data, SETTINGS)
        pixels = decode(encoded)
    except RequestError as error:
        assert "\n" not in str(error)
        if isinstance(error, UnreadableImage):
            assert by_pillow(data) is None, "Pillow reads what is refused"
        return
    width, height = encoded.header.size
    assert pixels.dtype == np.uint8
    assert pixels.shape in ((height, width, 3), (width, height, 3))
    compare(pixels, data, encoded)
    scaled = decode(Encoded(data, open_image(data, SETTINGS).header, fast=True), 4)
    assert scaled.shape[2] == 3


def compare(pixels: Pixels, data: bytes, encoded: Encoded) -> None:
    """Hold pixels against Pillow's own, if it reads the file and its colours as browsers do."""
    expected = by_pillow(data)
    if expected is None:
        return  # for its decoration's sake
    plain, tolerance = expected
    assert pixels.shape == plain.shape, (pixels.shape, plain.shape)
    difference = np.abs(pixels.astype(int) - plain.astype(int)).max(initial=0)
    assert difference <= tolerance, f"{encoded.header.format} {encoded.header.mode}: {difference}"


def by_pillow(data: bytes) -> tuple[Pixels, int] | None:
    """The pixels and how far others may be off, without a line of ours; None if it has none."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > SETTINGS.max_image_pixels:
            return None
        image.load()
    except Exception:
        return None
    if image.format == "PNG" and "transparency" in image.info and image.mode in ("1", "L", "RGB"):
        return None  # of a file with fewer or more than 8 bits Pillow compares the wrong values
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return None
    try:
        turn = TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:
        turn = None
    tolerance = 0
    if image.mode.startswith("I"):
        levels = np.asarray(image.convert("I"))
        grey = np.rint(levels / 257)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[levels == transparent] = 255
        plain = np.stack([grey] * 3, axis=2)
    elif image.has_transparency_data:
        levels = np.asarray(image.convert("RGBA")).astype(float)
        alpha = levels[:, :, 3:] / 255
        if image.format == "BMP" and not alpha.any():
            alpha[:] = 1
        plain = np.rint(levels[:, :, :3] * alpha + 255 * (1 - alpha))
        tolerance = 1  # of rounding
    else:
        plain = np.asarray(image.convert("RGB"))
    if turn is not None:
        plain = np.asarray(Image.fromarray(plain.astype(np.uint8)).transpose(turn))
    return plain.astype(np.uint8), tolerance


def repaired(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have."""
    if not data.startswith(PNG):
        return data
    fixed, at = bytearray(data), len(PNG)
    while at + 12 <= len(fixed):
        length = struct.unpack_from(">I", fixed, at)[0]
        if length > len(fixed) - at - 12:
            length = len(fixed) - at - 12
            struct.pack_into(">I", fixed, at, length)
        end = at + 8 + length
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def seeds() -> list[bytes]:
    picture = noise(SIZE)
    alpha = picture.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(SIZE))
    palette = picture.quantize(16)
    rng = random.Random(0)
    deep = [
        png(depth, colours, rng, transparent)
        for depth, colours in (
            (1, 0),
            (2, 0),
            (4, 0),
            (8, 0),
            (16, 0),
            (8, 2),
            (16, 2),
            (8, 4),
            (16, 6),
        )
        for transparent in (False, True)
    ]
    frames = [palette, palette.transpose(Image.Transpose.ROTATE_180)]
    whole = encode(picture, "JPEG")
    return [
        *(encode(picture, format) for format in FORMATS),
        *(encode(picture.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")),
        encode(palette, "PNG", transparency=3),
        encode(palette, "GIF", transparency=3),
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encode(alpha, "WEBP", lossless=True),
        encode(alpha, "WEBP", quality=50),
        encode(picture, "WEBP", save_all=True, append_images=[picture]),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture.convert("L"), "JPEG"),
        encode(picture, "JPEG", progressive=True, comment=b"hello"),
        encode(picture, "JPEG", subsampling=1, restart_marker_rows=1),
        whole[:-2],
        encode(palette, "BMP"),
        encode(alpha, "BMP"),
        encode(picture.convert("1"), "BMP"),
        encode(grey16(range(0, 65536, 5000))),
        turned(quarters(SIZE), 6, "JPEG"),
        turned(quarters(SIZE), 5, "PNG"),
        turned(quarters(SIZE), 8, "WEBP"),
        with_exif(b"MM\0*\0\0\0\x08\0\x01", picture),
        *(announced(format, 60, 5) for format in FORMATS),
        *deep,
        *map(with_texts, deep[:2]),
    ]


def png(depth: int, colours: int, rng: random.Random, transparent: bool) -> bytes:
    """A PNG of any kind, some of which Pillow cannot write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colours]
    row = (SIZE[0] * channels * depth + 7) // 8
    pixels = b"".join(b"\0" + rng.randbytes(row) for _ in range(SIZE[1]))
    header = struct.pack(">IIBBBBB", *SIZE, depth, colours, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header)
    if transparent:
        chunks += png_chunk(b"tRNS", bytes(2 * channels))
    return PNG + chunks + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")


def with_texts(data: bytes) -> bytes:
    texts = png_chunk(b"tEXt", b"a\0b") + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(99)))
    return data[:33] + texts + png_chunk(b"iCCP", b"x\0\0no") + data[33:]


TOKENS = (
    b"IHDR",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"PLTE",
    b"eXIf",
    b"zTXt",
    b"iTXt",
    b"iCCP",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"\xff\xd8",
    b"\xff\xd9",
    b"\xff\xda",
    b"\xff\xc0",
    b"\xff\xc2",
    b"\xff\xc4",
    b"\xff\xdb",
    b"\xff\xdd",
    b"\xff\xe1",
    b"\xff\xee",
    b"Exif\0\0",
    b"Adobe",
    b"JFIF\0",
    b"MPF\0",
    b"RIFF",
    b"WEBP",
    b"VP8X",
    b"VP8L",
    b"VP8 ",
    b"ALPH",
    b"ANMF",
    b"GIF89a",
    b"!\xf9\x04",
    b"!\xfe",
    b"!\xff\x0b",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\x12\x01",
    b"\x01\x12",
)
TARGET = Target(check=check, seeds=seeds, tokens=TOKENS, repair=repaired, max_bytes=8192)

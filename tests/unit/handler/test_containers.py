"""Images whose decoration is odd, or whose end is missing."""

import struct
import zlib

import pytest
from PIL import Image

from handler.errors import UnreadableImage, UnsupportedFormat
from tests.drawing import QUARTERS, RED, encode, noise, plain, png_chunk, quarters, with_exif
from tests.unit.handler.pictures import corners, decode, near, pixels_of, refusal, tiff

# --- Decoration: browsers show the pixels, whatever else is in the file


def png_with(*chunks: bytes, before: bytes) -> bytes:
    data = encode(quarters())
    start = data.index(before) - 4
    return data[:start] + b"".join(chunks) + data[start:]


def with_wrong_checksum(kind: bytes, data: bytes) -> bytes:
    return png_chunk(kind, data)[:-4] + b"\1\2\3\4"


def fctl(number: int, size: tuple[int, int]) -> bytes:
    return png_chunk(b"fcTL", struct.pack(">5I2H2B", number, *size, 0, 0, 1, 1, 0, 0))


ZEROS = zlib.compress(bytes(50_000_000), 1)  # a thousandth of that
EXIF_6 = tiff(3, 1, struct.pack("<H", 6))
PNG_DECORATION = {
    "long zTXt": png_chunk(b"zTXt", b"k\0\0" + ZEROS),
    "long iTXt": png_chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS),
    "long tEXt": png_chunk(b"tEXt", b"k\0" + bytes(2_000_000)),
    "long iCCP": png_chunk(b"iCCP", b"k\0\0" + ZEROS),
    "many zTXt": 80 * png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000))),
    "zTXt of unknown compression": png_chunk(b"zTXt", b"k\0\7x"),
    "iCCP without an end of its name": png_chunk(b"iCCP", b"k"),
    "short gAMA": png_chunk(b"gAMA", b""),
    "short tRNS": png_chunk(b"tRNS", b"12345"),
    "short acTL": png_chunk(b"acTL", b"1"),
    "frames out of order": png_chunk(b"acTL", struct.pack(">II", 2, 0)) + fctl(7, (96, 64)),
    "a frame outside of the image": fctl(0, (960, 640)),
    "tEXt with a wrong checksum": with_wrong_checksum(b"tEXt", b"k\0v"),
    "tRNS with a wrong checksum": with_wrong_checksum(b"tRNS", struct.pack(">3H", *RED)),
    "eXIf with a wrong checksum": with_wrong_checksum(b"eXIf", EXIF_6),
    "private chunk with a wrong checksum": with_wrong_checksum(b"prVt", b"v"),
    "a name that is not ASCII": png_chunk(b"t\xe9xt", b"v"),
}


@pytest.mark.usefixtures("one_more_gigabyte")
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"], ids=["before pixels", "behind pixels"])
@pytest.mark.parametrize("name", PNG_DECORATION)
def test_a_png_of_any_decoration_is_its_pixels(name: str, before: bytes) -> None:
    data = png_with(PNG_DECORATION[name], before=before)
    assert decode(data).tobytes() == quarters().tobytes()


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"], ids=["before pixels", "behind pixels"])
def test_orientation_of_a_png_of_odd_decoration(before: bytes) -> None:
    data = png_with(PNG_DECORATION["long zTXt"], png_chunk(b"eXIf", EXIF_6), before=before)
    assert decode(data).size == (64, 96)


@pytest.mark.parametrize("change", ["IHDR", "PLTE", "IDAT"])
def test_damage_to_a_png_that_touches_its_pixels_is_refused(change: str) -> None:
    data = bytearray(encode(quarters().quantize(4)))
    data[data.index(change.encode()) + (20 if change == "IDAT" else 5)] ^= 0x55
    assert type(refusal(bytes(data))) is UnreadableImage


def png(depth: int, colour_type: int, row: bytes, width: int, *chunks: bytes) -> bytes:
    """One row of pixels, as they are in the file."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    chunks = (png_chunk(b"IHDR", header), *chunks, pixels, png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("depth", "row"), [(1, b"\x40"), (2, b"\x1b"), (4, b"\x01\x23"), (8, b"\0\1\2\3")]
)
def test_transparent_grey_is_the_level_that_it_names(depth: int, row: bytes) -> None:
    """Of a PNG of few levels Pillow multiplies the pixels, but not the transparent colour."""
    levels = 2**depth
    shades = [level * 255 // (levels - 1) for level in range(min(levels, 4))]
    for level in range(len(shades)):
        transparent = png_chunk(b"tRNS", struct.pack(">H", level))
        decoded = decode(png(depth, 0, row, len(shades), transparent))
        expected = [255 if other == level else shade for other, shade in enumerate(shades)]
        assert list(decoded.tobytes()[: 3 * len(shades) : 3]) == expected


def test_transparent_colour_in_16_bits_is_only_that_colour() -> None:
    """Pillow's 8 bits of each are the same for all of these, and none of them is the named ones."""
    colours = [(0x1234, 0x5678, 0x9ABC), (0x1235, 0x5678, 0x9ABC), (0x12FF, 0x56FF, 0x9AFF)]
    row = b"".join(struct.pack(">3H", *colour) for colour in colours)
    transparent = png_chunk(b"tRNS", struct.pack(">3H", *colours[1]))
    decoded = decode(png(16, 2, row, 3, transparent))
    pixels = [decoded.getpixel((x, 0)) for x in range(3)]
    assert pixels == [(0x12, 0x56, 0x9A), (255, 255, 255), (0x12, 0x56, 0x9A)]


def test_transparent_colour_behind_the_pixels_is_none() -> None:
    data = png_with(png_chunk(b"tRNS", struct.pack(">3H", *RED)), before=b"IEND")
    assert decode(data).tobytes() == quarters().tobytes()


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    data = encode(quarters(), "JPEG", quality=95)
    return data[:2] + b"".join(_segment(*segment) for segment in segments) + data[2:]


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


MANY_PICTURES = (  # two, and an entry for none of them
    b"MPF\0II*\0\x08\0\0\0\2\0" + struct.pack("<2HII", 0xB001, 4, 1, 2) + struct.pack(
        "<2HI4s", 0xB002, 7, 4, b"none"
    ) + bytes(4)
)  # fmt: skip
JPEG_DECORATION = {
    "short JFIF": (0xE0, b"JFIF\0\1"),
    "short Adobe": (0xEE, b"Adobe"),
    "short ICC profile": (0xE2, b"ICC_PROFILE\0"),
    "cut Photoshop resource": (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "pictures that are not there": (0xE2, MANY_PICTURES),
}


@pytest.mark.parametrize("name", JPEG_DECORATION)
def test_a_jpeg_of_any_decoration_is_its_pixels(name: str) -> None:
    exif = (0xE1, b"Exif\0\0" + EXIF_6)
    decoded = decode(jpeg_with(JPEG_DECORATION[name], exif, (0xFE, b"a comment")))
    assert all(map(near, corners(decoded.rotate(90, expand=True)), QUARTERS))


def test_colours_of_a_jpeg_of_odd_decoration() -> None:
    """The Adobe segment says that it holds RGB, and has to stay."""
    data = encode(quarters(), "JPEG", quality=95, keep_rgb=True)
    odd = data[:2] + _segment(*JPEG_DECORATION["short ICC profile"]) + data[2:]
    assert decode(odd).tobytes() == decode(data).tobytes()


def webp_parts(image: Image.Image) -> list[bytes]:
    """The chunks of a lossless WebP with EXIF and XMP."""
    data = encode(image, "WEBP", lossless=True, exif=EXIF_6, xmp=b"<x:xmpmeta/>")
    chunks, at = [], 12
    while at < len(data):
        length = struct.unpack_from("<I", data, at + 4)[0]
        chunks.append(data[at : at + 8 + length + length % 2])
        at += len(chunks[-1])
    return chunks


@pytest.mark.parametrize("size", [0, 30, 10**6, 2**32 - 1])
def test_a_webp_that_says_a_wrong_size(size: int) -> None:
    data = b"RIFF" + struct.pack("<I", size) + b"WEBP" + b"".join(webp_parts(quarters()))
    assert decode(data).rotate(90, expand=True).tobytes() == quarters().tobytes()


def test_a_webp_that_is_cut_behind_its_pixels() -> None:
    data = encode(quarters(), "WEBP", lossless=True, exif=EXIF_6, xmp=b"<x:xmpmeta/>")
    *_, exif, xmp = webp_parts(quarters())
    assert decode(data[:-5]).size == (64, 96)
    assert decode(data[: -len(xmp) - 5]).size == (96, 64)  # the EXIF block is not whole
    assert type(refusal(data[: -len(exif + xmp) - 5])) is UnreadableImage


def test_a_bmp_whose_alpha_was_never_filled_in_is_its_colours() -> None:
    header = struct.pack("<IiiHHIIiiII4I", 56, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0,
                         0xFF0000, 0xFF00, 0xFF, 0xFF000000)  # fmt: skip
    for alphas, shades in {(0, 0): (10, 20), (0, 255): (255, 20)}.items():
        pixels = bytes([10, 10, 10, alphas[0], 20, 20, 20, alphas[1]])
        data = b"BM" + struct.pack("<IHHI", 14 + 56 + 8, 0, 0, 14 + 56) + header + pixels
        decoded = decode(data)
        assert tuple(decoded.tobytes()[:6:3]) == shades


# --- A JPEG's end

ENDINGS = {
    "baseline": encode(noise(), "JPEG"),
    "progressive": encode(noise(), "JPEG", progressive=True),
    "restarts": encode(noise(), "JPEG", restart_marker_blocks=2),
    "grey": encode(noise().convert("L"), "JPEG"),
    "progressive grey": encode(noise().convert("L"), "JPEG", progressive=True),
    "CMYK": encode(noise().convert("CMYK"), "JPEG"),
    "one colour": encode(plain(), "JPEG"),
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_jpeg_that_lacks_only_its_end_marker_is_decoded(kind: str) -> None:
    whole = ENDINGS[kind]
    assert whole.endswith(b"\xff\xd9")
    for cut in (1, 2):
        assert (pixels_of(whole[:-cut]) == pixels_of(whole)).all()


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_jpeg_that_lacks_anything_else_is_refused(kind: str) -> None:
    """At whatever byte it is cut, between two scans as well."""
    whole = ENDINGS[kind]
    for length in range(1, len(whole) - 2):
        assert type(refusal(whole[:length])) is UnreadableImage, length


def test_a_jpeg_of_12_bits_is_refused_by_name() -> None:
    data = bytearray(with_exif(EXIF_6, noise()))
    data[data.index(b"\xff\xc0") + 4] = 12
    error = refusal(bytes(data))
    assert (type(error), error.status) == (UnsupportedFormat, 415)
    assert str(error).startswith("12-bit JPEG is not served; send one of JPEG, ")

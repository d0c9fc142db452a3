"""Bytes of an image to pixels: every mode, format and orientation."""

import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from handler.images import FORMATS, read_picture, to_rgb
from handler.settings import Settings
from tests.drawing import (
    BLUE,
    GREEN,
    QUARTERS,
    RED,
    encode,
    grey16,
    noise,
    plain,
    quarters,
    turned,
    with_exif,
)
from tests.unit.handler.pictures import TRANSFORM, corners, decode, near, pixels_of, tiff

LOSSLESS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
}

# --- Modes


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (plain(128, mode="L"), (128, 128, 128)),
        (plain((128, 255), mode="LA"), (128, 128, 128)),
        (plain(1, mode="1"), (255, 255, 255)),
        (plain(0, mode="1"), (0, 0, 0)),
        (plain(RED).quantize(4), RED),
        (plain(RED), RED),
        (plain((*GREEN, 255), mode="RGBA"), GREEN),
        (grey16([128 * 257] * 4), (128, 128, 128)),
    ],
    ids=["L", "LA", "1 white", "1 black", "P", "RGB", "RGBA", "I;16"],
)
def test_any_mode_decodes_to_rgb(image: Image.Image, colour: tuple[int, int, int]) -> None:
    decoded = decode(encode(image, "PNG"))
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    assert decoded.getcolors() == [(image.width * image.height, colour)]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255,) * 3)],
)
def test_cmyk_jpeg(ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
    decoded = decode(encode(plain(ink, mode="CMYK"), "JPEG", quality=95))
    assert decoded.mode == "RGB"
    assert near(decoded.getpixel((5, 5)), colour)


@pytest.mark.parametrize("value", [0, 127, 128, 129, 256, 300, 32768, 65407, 65535])
def test_16_bit_grey_is_scaled_not_clipped(value: int) -> None:
    shade = round(value / 257)
    assert decode(encode(grey16([value]))).getpixel((0, 0)) == (shade, shade, shade)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_grey_of_either_byte_order(mode: str) -> None:
    order = ">" if mode.endswith("B") else "<"
    image = Image.frombytes(mode, (3, 1), struct.pack(f"{order}3H", 0, 257, 65535))
    rgb = to_rgb(image)
    assert list(rgb.tobytes()[::3]) == [0, 1, 255]


@pytest.mark.parametrize(("value", "shade"), [(0, 0), (257, 1), (65535, 255), (70_000, 255)])
def test_16_bit_grey_in_wider_numbers(value: int, shade: int) -> None:
    assert to_rgb(plain(value, mode="I")).getpixel((0, 0)) == (shade, shade, shade)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("alpha", "colour"), [(0, (255, 255, 255)), (255, (200, 0, 0)), (51, (244, 204, 204))]
)
def test_transparency_goes_over_white(
    format: str, alpha: int, colour: tuple[int, int, int]
) -> None:
    image = plain((200, 0, 0, alpha), mode="RGBA")
    decoded = decode(encode(image, format, lossless=True, exact=True))
    assert near(decoded.getpixel((5, 5)), colour, by=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(format: str) -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 1])
    decoded = decode(encode(image, format, transparency=1))
    assert [decoded.getpixel((x, 0)) for x in range(4)] == [RED, (255,) * 3, BLUE, (255,) * 3]


def test_palette_with_an_alpha_for_each_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putdata([0, 1])
    decoded = decode(encode(image, "PNG", transparency=bytes([51, 255])))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(244, 204, 204), (0, 0, 200)]


@pytest.mark.parametrize(
    ("image", "transparent"),
    [
        (plain(77, mode="L"), 77),
        (plain(RED), RED),
        (plain(1, mode="1"), 1),
        (grey16([1000, 1000]), 1000),
    ],
    ids=["L", "RGB", "1", "I;16"],
)
def test_transparent_colour_is_white(image: Image.Image, transparent: object) -> None:
    """A PNG without an alpha channel may name one colour that is not there."""
    decoded = decode(encode(image, "PNG", transparency=transparent))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


# --- Formats


@pytest.mark.parametrize("format", FORMATS)
def test_any_format_decodes(format: str) -> None:
    options = LOSSLESS.get(format, {})
    decoded = decode(encode(quarters(), format, **options))
    assert (decoded.mode, decoded.size) == ("RGB", (96, 64))
    assert all(map(near, corners(decoded), QUARTERS))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_grey_of_any_format(format: str) -> None:
    decoded = decode(encode(plain(100, mode="L"), format))
    assert decoded.mode == "RGB"
    assert near(decoded.getpixel((5, 5)), (100, 100, 100), by=2)


def test_jpeg_of_several_pictures_gives_the_first() -> None:
    """Phones append depth maps and previews (MPO)."""
    data = encode(plain(RED), "MPO", save_all=True, append_images=[plain(BLUE)], quality=95)
    assert near(decode(data).getpixel((5, 5)), RED)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [plain(colour) for colour in (RED, GREEN, BLUE)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 50, "lossless": True}
    decoded = decode(encode(frames[0], format, **options))
    assert near(decoded.getpixel((5, 5)), RED)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 3)])
def test_tiny_images(format: str, size: tuple[int, int]) -> None:
    picture = read_picture(encode(plain(GREEN, size), format), TRANSFORM, Settings())
    assert picture.size == size
    assert picture.pixels.shape == (3, 224, 224)
    assert near(picture.pixels.float().mean(dim=(1, 2)).tolist(), GREEN)


# --- Orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    data = turned(quarters(), orientation, format, **LOSSLESS.get(format, {}))
    decoded = decode(data)
    assert decoded.size == (96, 64)
    assert all(map(near, corners(decoded), QUARTERS))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pixels_are_pillows(orientation: int) -> None:
    data = turned(noise((33, 57)), orientation, "JPEG")
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert (pixels_of(data) == np.asarray(expected)).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"garbage that is no TIFF header at all",
        b"II*\0",
        b"II*\0\xff\xff\xff\x7f",
        b"MM\0*\0\0\0\x08\0\x01",
        tiff(3, 1, struct.pack("<H", 0)),
        tiff(3, 1, struct.pack("<H", 9)),
        tiff(3, 1, struct.pack("<H", 65535)),
        tiff(2, 2, b"6\0"),
        tiff(5, 1, struct.pack("<I", 0xFFFFFF)),
        tiff(3, 2**32 - 1, struct.pack("<I", 8)),
        tiff(99, 1, b"\x06"),
        tiff(3, 1, struct.pack("<H", 0), entries=60_000),
    ],
    ids=range(13),
)
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    decoded = decode(with_exif(exif, quarters()))
    assert decoded.size == (96, 64)
    assert all(map(near, corners(decoded), QUARTERS))


# --- JPEG without Pillow


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 40},
        {"quality": 95, "subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "progressive": True},
        {"subsampling": 2, "restart_marker_blocks": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(500, 375), (33, 57), (8, 8), (17, 1)], ids=str)
def test_jpeg_pixels_are_pillows(options: dict[str, Any], size: tuple[int, int]) -> None:
    data = encode(noise(size), "JPEG", **options)
    ours = pixels_of(data)
    assert (ours == np.asarray(Image.open(BytesIO(data)))).all()


def test_sound_jpegs_go_past_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encode(noise().convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")]
    monkeypatch.setattr(JpegImageFile, "load", lambda _: pytest.fail("Pillow decodes"))
    for data in images:
        assert pixels_of(data).shape == (48, 64, 3)


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_ink_of_a_jpeg_is_what_pillow_makes_of_it(transform: int) -> None:
    data = bytearray(encode(noise().convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = transform
    expected = Image.open(BytesIO(data)).convert("RGB")
    assert decode(bytes(data)).tobytes() == expected.tobytes()


def test_an_odd_jpeg_is_what_pillow_makes_of_it() -> None:
    """Bytes between two segments are against the standard, and occur."""
    data = encode(quarters(), "JPEG", quality=95)
    start = data.index(b"\xff\xdb")
    odd = data[:start] + b"\0\0\0" + data[start:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    assert all(map(near, corners(decode(odd)), QUARTERS))

"""Bytes of an image to the model's input: every mode, format and orientation, and every damage."""

import random
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.models import get_weight
from torchvision.transforms import functional as F  # noqa: N812

from handler.errors import (
    ImageTooLarge,
    NoImage,
    RequestError,
    TooManyPixels,
    UnreadableImage,
    UnsupportedFormat,
)
from handler.images import (
    FORMATS,
    Picture,
    PixelBudget,
    decode_image,
    read_picture,
    to_rgb,
)
from handler.networks import input_transform
from handler.settings import Settings
from tests.drawing import (
    BLUE,
    GREEN,
    QUARTERS,
    RED,
    announced,
    encode,
    grey16,
    noise,
    plain,
    png_chunk,
    quarters,
    turned,
    with_exif,
)

LOSSLESS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
}
TRANSFORM = input_transform(get_weight("MobileNet_V2_Weights.IMAGENET1K_V2"))


def decode(data: bytes, **settings: Any) -> Image.Image:
    return Image.fromarray(decode_image(data, Settings(**settings)))


def refusal(data: bytes, **settings: int) -> RequestError:
    with pytest.raises(RequestError) as raised:
        decode(data, **settings)
    return raised.value


def outcome(data: bytes, **settings: Any) -> Picture | RequestError:
    try:
        return read_picture(data, TRANSFORM, Settings(**settings))
    except RequestError as error:
        return error


def near(seen: Any, wanted: tuple[int, ...], by: int = 6) -> bool:
    """Whether two colours are the same but for what JPEG does to them."""
    return all(abs(a - b) <= by for a, b in zip(tuple(seen), wanted, strict=True))


def corners(image: Image.Image) -> list[object]:
    """The middles of the four quarters."""
    width, height = image.size
    return [
        image.getpixel((x, y))
        for y in (height // 4, height * 3 // 4)
        for x in (width // 4, width * 3 // 4)
    ]


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


def test_16_bit_grey_keeps_its_order() -> None:
    decoded = decode(encode(grey16(range(0, 65536, 257))))
    assert list(decoded.tobytes()[::3]) == list(range(256))


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


def test_transparent_grey_goes_over_white() -> None:
    assert decode(encode(plain((0, 0), mode="LA"))).getpixel((5, 5)) == (255, 255, 255)
    assert decode(encode(plain((0, 51), mode="LA"))).getpixel((5, 5)) == (204, 204, 204)


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


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"optimize": True}])
def test_jpeg_variants(options: dict[str, object]) -> None:
    decoded = decode(encode(quarters(), "JPEG", quality=95, **options))
    assert all(map(near, corners(decoded), QUARTERS))


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


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_size_is_that_of_the_image_as_people_see_it(orientation: int) -> None:
    data = turned(quarters(), orientation, "PNG")
    picture = read_picture(data, TRANSFORM, Settings())
    assert picture.size == (96, 64)


def _tiff(kind: int, count: int, value: bytes, entries: int = 1) -> bytes:
    """A little-endian EXIF block whose only entry is the orientation."""
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, entries) + entry + bytes(4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"garbage that is no TIFF header at all",
        b"II*\0",
        b"II*\0\xff\xff\xff\x7f",
        b"MM\0*\0\0\0\x08\0\x01",
        _tiff(3, 1, struct.pack("<H", 0)),
        _tiff(3, 1, struct.pack("<H", 9)),
        _tiff(3, 1, struct.pack("<H", 65535)),
        _tiff(2, 2, b"6\0"),
        _tiff(5, 1, struct.pack("<I", 0xFFFFFF)),
        _tiff(3, 2**32 - 1, struct.pack("<I", 8)),
        _tiff(99, 1, b"\x06"),
        _tiff(3, 1, struct.pack("<H", 0), entries=60_000),
    ],
    ids=range(13),
)
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    decoded = decode(with_exif(exif, quarters()))
    assert decoded.size == (96, 64)
    assert all(map(near, corners(decoded), QUARTERS))


# --- Refusals


@pytest.mark.parametrize("format", FORMATS)
def test_more_pixels_than_allowed_are_refused_by_the_header(format: str) -> None:
    side = 16_383 if format == "WEBP" else 20_000  # WebP has 14 bits for a side
    error = refusal(announced(format, side, side))
    assert (type(error), error.status) == (TooManyPixels, 413)
    assert str(error) == f"the image has {side}x{side} pixels, the limit for a request is 50000000"


@pytest.mark.parametrize("format", FORMATS)
def test_pixel_limit_at_its_edge(format: str) -> None:
    data = encode(plain(size=(64, 48)), format)
    assert decode(data, max_image_pixels=64 * 48).size == (64, 48)
    assert type(refusal(data, max_image_pixels=64 * 48 - 1)) is TooManyPixels


@pytest.mark.parametrize("format", FORMATS)
def test_byte_limit_at_its_edge(format: str) -> None:
    data = encode(plain(), format)
    assert decode(data, max_image_bytes=len(data)).size == (64, 48)
    error = refusal(data, max_image_bytes=len(data) - 1)
    assert (type(error), error.status) == (ImageTooLarge, 413)
    assert str(error) == f"the image has {len(data)} bytes, the limit is {len(data) - 1}"


@pytest.mark.usefixtures("one_more_gigabyte")
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2, 40_000), (1, 1_000_000)], ids=str)
def test_a_thread_of_an_image_costs_no_gigabytes(size: tuple[int, int]) -> None:
    """Resizing the short side of 1x20000 to 232 would make a billion pixels of a hundred bytes."""
    data = encode(Image.new("1", size))
    assert len(data) < 3000
    result = outcome(data)
    if isinstance(result, RequestError):
        assert result.status in (400, 413)
    else:
        assert result.pixels.shape == (3, 224, 224)


def test_no_bytes_are_no_image() -> None:
    error = refusal(b"")
    assert (type(error), error.status) == (NoImage, 400)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_truncated_image_is_refused(format: str, part: float) -> None:
    whole = encode(noise(), format)
    error = refusal(whole[: int(len(whole) * part)])
    assert (type(error), error.status) == (UnreadableImage, 400)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_no_pixels_are_refused_or_ignored(format: str, size: tuple[int, int]) -> None:
    """A GIF's own frame may still have some."""
    result = outcome(announced(format, *size))
    if isinstance(result, RequestError):
        assert (type(result), result.status) == (UnreadableImage, 400)
    else:
        assert min(result.size) > 0


@pytest.mark.parametrize(
    "data",
    [b"\0", b"hello", b"{}", b"\xff" * 100, bytes(1000), b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    error = refusal(data)
    assert (type(error), error.status) == (UnreadableImage, 400)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(seed: int) -> None:
    rng = random.Random(seed)
    assert refusal(rng.randbytes(rng.randint(1, 2000))).status in (400, 415)


FOREIGN = {
    "TIFF": [
        encode(plain(), "TIFF"),
        b"MM\0*\0\0\0\x08",
        b"II+\0\x08\0\0\0",
        encode(plain(), "TIFF", compression="tiff_lzw"),
    ],
    "HEIC": [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"],
    "AVIF": [b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"],
    "a video": [b"\0\0\0\x18ftypmp42\0\0\0\0", b"\x1aE\xdf\xa3\x01", b"RIFF\x10\0\0\0AVI LIST"],
    "JPEG XL": [b"\xff\x0a\xfa\x1f", b"\0\0\0\x0cJXL \r\n\x87\n"],
    "JPEG 2000": [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0\x2f"],
    "PDF": [encode(plain(), "PDF"), b"%PDF-1.7\n"],
    "PostScript": [b"%!PS-Adobe-3.0 EPSF-3.0\n"],
    "PSD": [b"8BPS\0\x01"],
    "ICO": [encode(plain(), "ICO")],
    "a ZIP archive": [b"PK\x03\x04\x14\0"],
    "a gzip file": [b"\x1f\x8b\x08\0"],
    "SVG": [
        b"<svg/>",
        b"\xef\xbb\xbf<svg xmlns='http://www.w3.org/2000/svg'></svg>",
        b'<?xml version="1.0" encoding="UTF-8"?>\n<svg width="1"></svg>',
        b'<?xml version="1.0"?>\n<!-- drawn -->\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN">'
        b"\n<svg></svg>",
        b"  \n<!-- drawn --><SVG>",
    ],
    "HTML": [
        b"<!DOCTYPE html><html></html>",
        b"\n<html lang='en'>",
        b"<!-- x --><!doctype HTML>",
        b"<body>",
    ],
    "XML": [b'<?xml version="1.0"?><note/>'],
}


@pytest.mark.parametrize(
    ("name", "data"),
    [(name, data) for name, kinds in FOREIGN.items() for data in kinds],
    ids=[f"{name} {index}" for name, kinds in FOREIGN.items() for index in range(len(kinds))],
)
def test_foreign_format_is_refused_by_name(name: str, data: bytes) -> None:
    error = refusal(data)
    assert (type(error), error.status) == (UnsupportedFormat, 415)
    assert str(error) == f"{name} is not served; send one of JPEG, PNG, WEBP, GIF, BMP"


@pytest.mark.parametrize(
    "data", [b"<html", b"<svg" * 3000, b"<?xml" + b" " * 10**6, b"<!--" * 10**5]
)
def test_long_markup_is_refused_quickly(data: bytes) -> None:
    assert refusal(data).status in (400, 415)


@pytest.mark.parametrize("data", [b"hello", encode(noise(), "PNG")[:1000], b"<svg/>"])
def test_messages_hold_nothing_of_ours(data: bytes) -> None:
    message = str(refusal(data))
    assert not any(word in message for word in ("0x", "/", "BytesIO", "Error", "Traceback"))


# --- Damage by chance


def _damaged(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    bytes_ = bytearray(data)
    kind = rng.choice(["flip", "header", "cut", "grow", "swap"])
    if kind == "cut":
        return bytes(bytes_[: rng.randrange(len(bytes_))])
    if kind == "grow":
        at = rng.randrange(len(bytes_))
        return bytes(bytes_[:at] + rng.randbytes(rng.randint(1, 50)) + bytes_[at:])
    if kind == "swap":
        a, b = sorted(rng.sample(range(len(bytes_)), 2))
        return bytes(bytes_[:a] + bytes_[b:] + bytes_[a:b])
    reach = min(len(bytes_), 80) if kind == "header" else len(bytes_)
    for _ in range(rng.randint(1, 12)):
        bytes_[rng.randrange(reach)] = rng.randrange(256)
    return bytes(bytes_)


SAMPLES = {
    "JPEG": turned(noise((40, 30)), 6, "JPEG"),
    "progressive JPEG": encode(noise((40, 30)), "JPEG", progressive=True),
    "CMYK JPEG": encode(noise((40, 30)).convert("CMYK"), "JPEG"),
    "PNG": turned(noise((40, 30)), 8, "PNG"),
    "palette PNG": encode(noise((40, 30)).quantize(16), "PNG", transparency=3),
    "16-bit PNG": encode(grey16(range(0, 60_000, 500))),
    "WEBP": encode(noise((40, 30)), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "lossless WEBP": encode(noise((40, 30)).convert("RGBA"), "WEBP", lossless=True),
    "animated WEBP": encode(
        noise((40, 30)), "WEBP", save_all=True, append_images=[noise((40, 30), 1)]
    ),
    "GIF": encode(noise((40, 30)), "GIF", transparency=3),
    "animated GIF": encode(
        noise((40, 30)), "GIF", save_all=True, append_images=[noise((40, 30), 1)]
    ),
    "BMP": encode(noise((40, 30)), "BMP"),
    "palette BMP": encode(noise((40, 30)).quantize(16), "BMP"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.usefixtures("one_more_gigabyte")
@pytest.mark.parametrize("kind", SAMPLES)
def test_damage_gives_a_picture_or_a_refusal(kind: str) -> None:
    pictures = refused = 0
    for seed in range(150):
        result = outcome(_damaged(SAMPLES[kind], seed), max_image_pixels=20_000)
        if isinstance(result, RequestError):
            refused += 1
            assert result.status in (400, 413, 415), seed
        else:
            pictures += 1
            assert (result.pixels.shape, result.pixels.dtype) == ((3, 224, 224), torch.uint8), seed
    assert refused
    assert pictures  # or the damage is too coarse to say anything


# --- Decoration: browsers show the pixels, whatever else is in the file


def png_with(*chunks: bytes, before: bytes = b"IDAT", image: Image.Image | None = None) -> bytes:
    data = encode(image or quarters())
    start = data.index(before) - 4
    return data[:start] + b"".join(chunks) + data[start:]


def with_wrong_checksum(kind: bytes, data: bytes) -> bytes:
    return png_chunk(kind, data)[:-4] + b"\1\2\3\4"


def fctl(number: int, size: tuple[int, int]) -> bytes:
    return png_chunk(b"fcTL", struct.pack(">5I2H2B", number, *size, 0, 0, 1, 1, 0, 0))


ZEROS = zlib.compress(bytes(50_000_000), 1)  # a thousandth of that
EXIF_6 = _tiff(3, 1, struct.pack("<H", 6))
PNG_DECORATION = {
    "long zTXt": png_chunk(b"zTXt", b"k\0\0" + ZEROS),
    "long iTXt": png_chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS),
    "long tEXt": png_chunk(b"tEXt", b"k\0" + bytes(2_000_000)),
    "long iCCP": png_chunk(b"iCCP", b"k\0\0" + ZEROS),
    "many zTXt": 80 * png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000))),
    "zTXt of unknown compression": png_chunk(b"zTXt", b"k\0\7x"),
    "iCCP of unknown compression": png_chunk(b"iCCP", b"k\0\7x"),
    "iCCP of nothing": png_chunk(b"iCCP", b""),
    "iCCP without an end of its name": png_chunk(b"iCCP", b"k"),
    "short gAMA": png_chunk(b"gAMA", b""),
    "short cHRM": png_chunk(b"cHRM", b"123"),
    "short sRGB": png_chunk(b"sRGB", b""),
    "short pHYs": png_chunk(b"pHYs", b"1"),
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
        wanted = [255 if other == level else shade for other, shade in enumerate(shades)]
        assert list(decoded.tobytes()[: 3 * len(shades) : 3]) == wanted


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
        assert (decode_image(whole[:-cut], Settings()) == decode_image(whole, Settings())).all()


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
    assert str(error) == "12-bit JPEG is not served; send one of JPEG, PNG, WEBP, GIF, BMP"


# --- The recipe's own transforms

RECIPES = (
    "MobileNet_V2_Weights.IMAGENET1K_V1",
    "MobileNet_V2_Weights.IMAGENET1K_V2",
    "ResNet50_Weights.IMAGENET1K_V2",
    "EfficientNet_B1_Weights.IMAGENET1K_V1",
    "Inception_V3_Weights.IMAGENET1K_V1",
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
    "ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1",
)


def assert_pixels_are_those_of(name: str, image: Image.Image) -> None:
    """To a fiftieth of a level on average, two at most: each rounds twice, in its own way."""
    recipe = get_weight(name)
    transform = input_transform(recipe)
    ours = read_picture(encode(image), transform, Settings()).pixels.float()
    mean = torch.tensor(transform.mean).view(3, 1, 1)
    std = torch.tensor(transform.std).view(3, 1, 1)
    wanted = (recipe.transforms()(image) * std + mean) * 255
    difference = (ours - wanted).abs()
    assert difference.mean() < 0.02
    assert difference.max() < 2.01


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(500, 375), (90, 640), (33, 57)], ids=str)
def test_pixels_are_those_of_the_recipe(name: str, size: tuple[int, int]) -> None:
    assert_pixels_are_those_of(name, noise(size))


@pytest.mark.parametrize("size", [(1000, 40), (10, 400)], ids=str)
def test_pixels_of_a_strip_are_those_of_the_recipe(size: tuple[int, int]) -> None:
    """Of which the recipe takes the middle, after resizing all of it."""
    assert_pixels_are_those_of("MobileNet_V2_Weights.IMAGENET1K_V1", noise(size))


@pytest.mark.parametrize("short", [320, 448, 576])
def test_ratios_with_many_ties_are_rounded_as_the_recipe_does(short: int) -> None:
    recipe = get_weight("MobileNet_V2_Weights.IMAGENET1K_V1")
    image = noise((short + 100, short))
    ours = read_picture(encode(image), input_transform(recipe), Settings()).pixels
    resized = F.center_crop(F.resize(image, [256], antialias=True), [224])
    assert torch.equal(ours, F.pil_to_tensor(resized))


def test_recipes_differ_in_their_numbers() -> None:
    """V1 weights resize to 256, V2 to 232: a constant of ours would be wrong for one of them."""
    v1, v2 = (input_transform(get_weight(name)) for name in RECIPES[:2])
    assert (v1.resize_size, v2.resize_size) == (256, 232)


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
    ours = decode_image(data, Settings())
    assert (ours == np.asarray(Image.open(BytesIO(data)))).all()


def test_sound_jpegs_go_past_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    colour, grey, ink = (encode(noise().convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK"))
    monkeypatch.setattr(JpegImageFile, "load", lambda _: pytest.fail("Pillow decodes"))
    assert decode_image(colour, Settings()).shape == (48, 64, 3)
    assert decode_image(grey, Settings()).shape == (48, 64, 3)
    assert decode_image(ink, Settings()).shape == (48, 64, 3)


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_ink_of_a_jpeg_is_what_pillow_makes_of_it(transform: int) -> None:
    data = bytearray(encode(noise().convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = transform
    wanted = Image.open(BytesIO(data)).convert("RGB")
    assert decode(bytes(data)).tobytes() == wanted.tobytes()


def test_an_odd_jpeg_is_what_pillow_makes_of_it() -> None:
    """Bytes between two segments are against the standard, and occur."""
    data = encode(quarters(), "JPEG", quality=95)
    start = data.index(b"\xff\xdb")
    odd = data[:start] + b"\0\0\0" + data[start:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    assert all(map(near, corners(decode(odd)), QUARTERS))


def test_a_second_size_in_a_jpeg_does_not_pass_the_budget() -> None:
    """Pillow takes the size from the first frame header, libjpeg refuses to have two."""
    data = encode(plain(size=(8, 8)), "JPEG")
    start = data.index(b"\xff\xc0")
    header = bytearray(data[start : start + 19])
    header[5:9] = struct.pack(">HH", 2000, 2000)
    result = outcome(data[:start] + header + data[start:], max_image_pixels=100)
    assert isinstance(result, TooManyPixels | UnreadableImage)
    result = outcome(data[: start + 19] + header + data[start + 19 :], max_image_pixels=100)
    assert isinstance(result, TooManyPixels | UnreadableImage)


def test_images_of_a_request_share_its_pixels() -> None:
    """Spent from the header: an image that turns out damaged has cost as much as a sound one."""
    budget = PixelBudget(20_000)
    whole = encode(Image.effect_noise((100, 100), 90).convert("RGB"))
    read_picture(whole, TRANSFORM, Settings(), budget)
    with pytest.raises(UnreadableImage):
        read_picture(whole[:-60], TRANSFORM, Settings(), budget)
    with pytest.raises(TooManyPixels, match="the limit for a request is 20000, and 0 are left"):
        read_picture(whole, TRANSFORM, Settings(), budget)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = encode(noise(), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : -2]
    assert isinstance(outcome(data), Picture)
    assert isinstance(outcome(data[:-2] + scan * 101 + data[-2:]), UnsupportedFormat)


def test_many_scans_do_not_hide_in_a_jpeg_of_several_pictures() -> None:
    """Pillow calls a JPEG with such a segment MPO."""
    image = noise()
    options = {"save_all": True, "append_images": [image], "progressive": True}
    data = encode(image, "MPO", **options)
    assert Image.open(BytesIO(data)).format == "MPO"
    assert isinstance(outcome(data), Picture)
    end = data.index(b"\xff\xd9")
    scan = data[data.index(b"\xff\xda") : end]
    assert isinstance(outcome(data[:end] + scan * 101 + data[end:]), UnsupportedFormat)


def test_a_gif_of_many_comments_is_refused() -> None:
    data = encode(noise(), "GIF")
    head = 13 + 3 * 2 ** ((data[10] & 7) + 1)  # behind the colour table
    comments = b"\x21\xfe\x01x\x00"
    assert isinstance(outcome(data[:head] + comments * 9 + data[head:]), Picture)
    assert isinstance(outcome(data[:head] + comments * 1001 + data[head:]), UnsupportedFormat)


def test_a_run_length_encoded_bmp_is_refused() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 8, 1, 2, 2835, 2835, 256, 0)
    body = header + bytes(1024) + b"\x00\x01"
    data = b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + 40 + 1024) + body
    assert isinstance(outcome(data), UnsupportedFormat)


def test_exif_that_no_jpeg_could_hold_is_not_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = encode(plain(size=(64, 48)), "PNG", exif=exif)
    exif[0x010E] = "x" * 70_000
    large = encode(plain(size=(64, 48)), "PNG", exif=exif)
    assert (decode(small).size, decode(large).size) == ((48, 64), (64, 48))

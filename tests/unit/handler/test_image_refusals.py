"""Images that are refused: too large, damaged, foreign, or slow to decode."""

import random
import struct
from io import BytesIO

import pytest
import torch
from PIL import Image

from handler.containers import count_scans
from handler.errors import (
    ImageTooLarge,
    RequestError,
    TooManyPixels,
    UnreadableImage,
    UnsupportedFormat,
)
from handler.images import FORMATS, Picture, PixelBudget, open_image
from handler.images import decode as decode_pixels
from handler.settings import Settings
from tests.drawing import announced, encode, grey16, noise, plain, turned
from tests.unit.handler.pictures import decode, outcome, refusal

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
    "HTML": [b"<!DOCTYPE html><html></html>", b"\n<html lang='en'>", b"<!-- x --><!doctype HTML>"],
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
    assert str(error) == f"{name} is not served; send one of {', '.join(FORMATS)}"


@pytest.mark.parametrize(
    "data", [b"<html", b"<svg" * 3000, b"<?xml" + b" " * 10**6, b"<!--" * 10**5]
)
def test_long_markup_is_refused_quickly(data: bytes) -> None:
    assert refusal(data).status in (400, 415)


@pytest.mark.parametrize("data", [b"hello", encode(noise(), "PNG")[:1000], b"<svg/>"])
def test_messages_hold_nothing_of_ours(data: bytes) -> None:
    message = str(refusal(data))
    assert not any(word in message for word in ("0x", "/", "BytesIO", "Error", "Traceback"))


# --- Limits


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
    decode_pixels(open_image(whole, Settings(), budget))
    with pytest.raises(UnreadableImage):
        decode_pixels(open_image(whole[:-60], Settings(), budget))
    with pytest.raises(TooManyPixels, match="the limit for a request is 20000, and 0 are left"):
        open_image(whole, Settings(), budget)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = encode(noise(), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : -2]
    assert isinstance(outcome(data), Picture)
    assert isinstance(outcome(data[:-2] + scan * 101 + data[-2:]), UnsupportedFormat)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xda", b"\xff\xda\0", b"\xff\xff\xda\0\x0c" * 3]
)
def test_every_scan_is_counted(data: bytes) -> None:
    assert count_scans(data) == data.count(b"\xff\xda\0")


def test_what_only_looks_like_scans_is_no_reason_to_refuse() -> None:
    """Phones append videos, in whose bytes any two occur once in 65,536."""
    assert isinstance(outcome(encode(noise(), "JPEG") + b"\xff\xda\x01" * 200), Picture)


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


@pytest.mark.usefixtures("one_more_gigabyte")
@pytest.mark.parametrize("disposal", range(8))
def test_a_gif_prepares_for_no_second_frame_before_its_size_is_known(disposal: int) -> None:
    """Pillow would fill an image of 60000x60000 while it opens the file."""
    data = announced("GIF", 60_000, 60_000)
    frame = data.index(b",\0\0\0\0")
    control = struct.pack("<4BHBB", 0x21, 0xF9, 4, disposal << 2 | 1, 0, 0, 0)
    error = outcome(data[:frame] + control + data[frame:])
    assert isinstance(error, TooManyPixels)
    assert "60000x60000" in str(error)


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

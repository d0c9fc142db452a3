"""Bytes of an image to pixels, within limits, and to the model's input."""

import re
import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from handler.containers import (
    JPEG,
    JPEG_END,
    PNG,
    count_scans,
    jpeg_precision,
    lacks_only_its_end,
    without_decoration,
)
from handler.errors import ImageTooLarge, NoImage, TooManyPixels, UnreadableImage, UnsupportedFormat
from handler.model_card import InputTransform
from handler.pixels import RawPixels
from handler.resize import Pixels, resize_and_crop
from handler.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_SCANS = 100  # of a progressive JPEG; libjpeg writes 10, and each costs a pass over the image
MAX_COMMENTS = 1000  # of a GIF, which Pillow joins one by one
MAX_EXIF_BYTES = 65536  # what a JPEG can hold; a PNG may hold a structure that expands without end
GREY_LEVELS = {"L;2": 4, "L;4": 16, "L": 256}  # of a PNG, by Pillow's name for how it is stored

# How libjpeg may scale a JPEG down while it decodes: to a half, a quarter or an eighth. Its other
# steps, such as 5/8, have no vector code: they take longer than the whole image.
DIVISORS = (8, 4, 2)
FAST_MARGIN = 2  # with `decode: fast`, each side stays at least this times the resize size

# Pillow's own limit holds for the whole process; ours is a setting, and is checked before decoding.
Image.MAX_IMAGE_PIXELS = None

# The log has one line for each request, and none for each oddity in a client's file.
warnings.filterwarnings("ignore", module="PIL")

# Pillow would load its other plugins, which takes 30 ms, at the first image that it does not know.
Image.init()


class _FirstFrame(GifImageFile):
    """A GIF of which only the first frame is wanted.

    As it opens a file, Pillow prepares what the second is drawn on: an image of the size that the
    first claims, up to 4 GB, before that can be held against the limits.
    """

    @property
    def disposal_method(self) -> int:
        """How the second frame treats the first; 0, whatever the file says: not at all."""
        return 0

    @disposal_method.setter
    def disposal_method(self, method: int) -> None:
        """Drop it."""


Image.register_open("GIF", _FirstFrame, Image.OPEN["GIF"][1])

# What people send by mistake, by its first bytes. The answer names it instead of "unreadable".
_FOREIGN = (
    ("TIFF", rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    ("HEIC", rb".{4}ftyp(hei[cxms]|hev[cmsx]|mif1|msf1)"),
    ("AVIF", rb".{4}ftypavi[fs]"),
    ("a video", rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI "),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("PDF", rb"%PDF-"),
    ("PostScript", rb"%!PS"),
    ("PSD", rb"8BPS"),
    ("ICO", rb"\0\0[\x01\x02]\0[^\0]\0"),
    ("a ZIP archive", rb"PK\x03\x04"),
    ("a gzip file", rb"\x1f\x8b"),
    ("SVG", rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*-->\s*)?(<!doctype svg.*)?<svg\b"),
    ("HTML", rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*-->\s*)?<(!doctype html|html|head|body)\b"),
    ("XML", rb"(?i)(\xef\xbb\xbf)?\s*<\?xml"),
)

# EXIF orientation (EXIF 2.3, tag 0x0112) to what turns the stored pixels upright: the axes to flip
# (0 rows, 1 columns), and whether rows and columns are then swapped.
UPRIGHT: dict[int, tuple[tuple[int, ...], bool]] = {
    2: ((1,), False),
    3: ((0, 1), False),
    4: ((0,), False),
    5: ((), True),
    6: ((0,), True),
    7: ((0, 1), True),
    8: ((1,), True),
}


@dataclass(frozen=True)
class Encoded:
    """An image that is within the limits by its header; its pixels are not decoded yet."""

    data: bytes
    header: Image.Image  # Pillow's, opened and not loaded
    fast: bool = False  # the setting `decode`: whether libjpeg may scale it down

    @property
    def size(self) -> tuple[int, int]:
        """Width and height by the header."""
        return self.header.size


@dataclass(frozen=True)
class Picture:
    """A decoded image, ready for the model."""

    pixels: Tensor  # uint8 RGB [3, H, W], H x W as the model takes it
    size: tuple[int, int]  # width and height of the image as people see it
    decode: str = "exact"  # "fast" if libjpeg has scaled it down


class PixelBudget:
    """Pixels that the images of one request may still have.

    Shared, because decoding takes a worker seconds for each 50 megapixels, and a batch of requests
    has `responseTimeout` seconds before TorchServe kills the worker.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit

    def spend(self, width: int, height: int) -> None:
        """Subtract an image's pixels before it is decoded. Raises TooManyPixels."""
        if width * height > self._left:
            left = f", and {self._left} are left" if self._left < self._limit else ""
            raise TooManyPixels(
                f"the image has {width}x{height} pixels, "
                f"the limit for a request is {self._limit}{left}"
            )
        self._left -= width * height


def read_picture(data: bytes, transform: InputTransform, settings: Settings) -> Picture:
    """The only image of a request to a Picture. Raises a RequestError of status 400, 413 or 415."""
    return decode_picture(open_image(data, settings), transform)


def decode_picture(encoded: Encoded | RawPixels, transform: InputTransform) -> Picture:
    """The slow half of `read_picture`: decode, resize and crop. Raises UnreadableImage."""
    if isinstance(encoded, RawPixels):
        width, height = encoded.size
        pixels = np.frombuffer(bytearray(encoded.data), np.uint8).reshape(height, width, 3)
        return Picture(resize_and_crop(pixels, transform), encoded.size)
    pixels = decode(encoded, FAST_MARGIN * transform.resize_size if encoded.fast else None)
    width, height = encoded.header.size
    if upright(encoded.header)[1]:
        width, height = height, width
    how = "exact" if pixels.shape[:2] == (height, width) else "fast"
    return Picture(resize_and_crop(pixels, transform), (width, height), how)


def open_image(data: bytes, settings: Settings, budget: PixelBudget | None = None) -> Encoded:
    """Read an image's header, check it against the limits, and subtract its pixels from the budget.

    Without a budget it is the only image of its request. Raises NoImage, ImageTooLarge,
    TooManyPixels, UnsupportedFormat or UnreadableImage.
    """
    if not data:
        raise NoImage("the image is empty (0 bytes)")
    _check_bytes(data, settings)
    try:
        image = _open(data)
        _refuse_slow(image, data)
    except (MemoryError, UnsupportedFormat):
        raise
    except Exception as exc:  # hostile headers reach many of Pillow's error paths
        name = foreign_format(data)
        if name:
            raise UnsupportedFormat(
                f"{name} is not served; send one of {', '.join(FORMATS)}"
            ) from exc
        raise UnreadableImage(f"{len(data)} bytes could not be read as an image") from exc
    (budget or PixelBudget(settings.max_image_pixels)).spend(*image.size)
    return Encoded(data, image, settings.decode == "fast")


def open_pixels(raw: RawPixels, settings: Settings, budget: PixelBudget) -> RawPixels:
    """Check an image that came as its pixels likewise. Raises ImageTooLarge or TooManyPixels."""
    _check_bytes(raw.data, settings)
    budget.spend(*raw.size)
    return raw


def _check_bytes(data: bytes, settings: Settings) -> None:
    if len(data) > settings.max_image_bytes:
        raise ImageTooLarge(
            f"the image has {len(data)} bytes, the limit is {settings.max_image_bytes}"
        )


def _open(data: bytes) -> Image.Image:
    """The header as Pillow reads it, without the decoration for which it would refuse an image.

    A PNG always loses it, because Pillow reads what is behind the pixels only with them.
    """
    if data.startswith(PNG):
        image = Image.open(BytesIO(without_decoration(data)), formats=FORMATS)
        if isinstance(image, PngImageFile):
            _scale_transparent(image)
        return image
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Exception:  # as Pillow's errors are
        plain = without_decoration(data)
        if plain == data:
            raise
        return Image.open(BytesIO(plain), formats=FORMATS)


def decode(encoded: Encoded, shortest: int | None = None) -> Pixels:
    """uint8 RGB [H, W, 3], upright. Raises UnreadableImage.

    With `shortest`, a JPEG is scaled down to a half, a quarter or an eighth, if no side is then
    shorter than that.
    """
    data, image = encoded.data, encoded.header
    try:
        pixels = _decode_jpeg(image, data, shortest)
        if pixels is None:
            pixels = _decode_transparent_rgb16(image, data)
        if pixels is None:
            image.load()
            pixels = np.array(to_rgb(image))
        flipped, swapped = upright(image)
        if flipped or swapped:
            whole = np.flip(pixels.view("V3"), flipped)  # numpy copies a pixel as fast as a byte
            whole = np.ascontiguousarray(whole.swapaxes(0, 1) if swapped else whole)
            pixels = whole.view(np.uint8)
        return pixels
    except MemoryError:
        raise
    except Exception as exc:  # as above
        raise UnreadableImage(
            f"{len(data)} bytes of {image.format} are damaged or truncated"
        ) from exc


def _decode_jpeg(image: Image.Image, data: bytes, shortest: int | None) -> Pixels | None:
    """The pixels of a sound JPEG, which may lack its end marker; None for what is Pillow's.

    simplejpeg uses the same libjpeg-turbo as Pillow, so values are equal, and makes fewer copies.
    """
    if not isinstance(image, JpegImageFile):
        return None
    if not data.endswith(JPEG_END) and lacks_only_its_end(data):
        data += JPEG_END
    colours, channels = ("CMYK", 4) if image.mode == "CMYK" else ("RGB", 3)
    divisor = _divisor(image.size, shortest)
    width, height = (-(-side // divisor) for side in image.size)  # rounded up, as libjpeg does
    try:
        # Pillow reads the header and simplejpeg the pixels: with a buffer of the header's size,
        # simplejpeg cannot take more memory than the budget allowed.
        pixels = simplejpeg.decode_jpeg(
            data,
            colours,
            fastdct=False,
            fastupsample=False,
            min_height=height,
            min_width=width,
            buffer=np.empty((height, width, channels), np.uint8),
        )
    except ValueError:  # simplejpeg refuses oddities; Pillow tells them from damage
        return None
    if pixels.shape[:2] != (height, width):
        return None
    if colours == "CMYK":  # inverted, as Adobe has it
        return np.array(to_rgb(Image.frombytes("CMYK", (width, height), pixels, "raw", "CMYK;I")))
    return pixels


def _divisor(size: tuple[int, int], shortest: int | None) -> int:
    """The largest of DIVISORS that leaves each side at least `shortest`; 1 if none does."""
    if shortest is None:
        return 1
    return next((divisor for divisor in DIVISORS if min(size) >= divisor * shortest), 1)


def _scale_transparent(image: PngImageFile) -> None:
    """Scale a PNG's transparent grey from the file's bit depth to 8 bits, like its pixels."""
    rawmode = image.tile[0].args if image.tile else None
    if rawmode in GREY_LEVELS and "transparency" in image.info:
        levels = GREY_LEVELS[rawmode]
        image.info["transparency"] = image.info["transparency"] % levels * 255 // (levels - 1)


def _decode_transparent_rgb16(image: Image.Image, data: bytes) -> Pixels | None:
    """A PNG of 16-bit RGB with one transparent colour, over white; None for anything else.

    Pillow's pixels are the upper bytes, which many 16-bit colours share, so a second reading gives
    the lower bytes.
    """
    if not isinstance(image, PngImageFile) or "transparency" not in image.info:
        return None
    if not image.tile or image.tile[0].args != "RGB;16B":
        return None
    with Image.open(BytesIO(without_decoration(data)), formats=["PNG"]) as other:
        other.tile = [image.tile[0]._replace(args="RGB;16L")]
        lower = np.asarray(other)
    pixels = np.array(image)
    transparent = np.ones(pixels.shape[:2], bool)
    for channel, value in enumerate(image.info["transparency"]):
        transparent &= pixels[:, :, channel] == value >> 8
        transparent &= lower[:, :, channel] == value & 255
    pixels[transparent] = 255
    return pixels


def _refuse_slow(image: Image.Image, data: bytes) -> None:
    """Raise UnsupportedFormat for small files that would keep a decoder busy for a minute."""
    if isinstance(image, JpegImageFile) and count_scans(data) > MAX_SCANS:
        raise UnsupportedFormat(f"the JPEG has more than {MAX_SCANS} scans, and is not served")
    if image.format == "GIF" and data.count(b"\x21\xfe") > MAX_COMMENTS:
        raise UnsupportedFormat(f"the GIF has more than {MAX_COMMENTS} comments, and is not served")
    if image.format == "BMP" and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", [])):
        raise UnsupportedFormat("run-length encoded BMP is not served")


def foreign_format(data: bytes) -> str | None:
    """The name of a format that is recognised but not served."""
    if data.startswith(JPEG):
        bits = jpeg_precision(data)
        return f"{bits}-bit JPEG" if bits in (12, 16) else None
    head = bytes(data[:1024])
    return next((name for name, rule in _FOREIGN if re.match(rule, head, re.DOTALL)), None)


def upright(image: Image.Image) -> tuple[tuple[int, ...], bool]:
    """What turns an image's stored pixels upright, as in UPRIGHT; nothing for most."""
    return UPRIGHT.get(orientation(image), ((), False))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, which turns nothing, if there is none or the block is damaged."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        number = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # EXIF is decoration: struct, tag and type errors all occur
        return 1
    return number if isinstance(number, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit grey scaled instead of clipped, transparency over white."""
    if image.mode.startswith("I"):  # "I;16", "I;16B", or "I" with 16-bit values
        eight_bits = [round(value / 257) for value in range(65536)]
        if isinstance(transparent := image.info.get("transparency"), int):
            eight_bits[transparent] = 255
        image = image.convert("I").point(eight_bits, "L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        if image.format == "BMP" and image.getextrema()[-1] == (0, 0):
            return image.convert("RGB")  # its alpha was never filled in: browsers show the colours
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

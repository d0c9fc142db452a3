"""Bytes of an image to the model's input."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torch.nn import functional

from handler.containers import (
    JPEG,
    JPEG_END,
    PNG,
    jpeg_precision,
    lacks_only_its_end,
    without_decoration,
)
from handler.errors import (
    ImageTooLarge,
    NoImage,
    TooManyPixels,
    UnreadableImage,
    UnsupportedFormat,
)
from handler.model_card import InputTransform
from handler.settings import Settings

Pixels = NDArray[np.uint8]  # RGB [H, W, 3]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_SCANS = 100  # of a progressive JPEG; libjpeg writes 10, and each costs a pass over the image
MAX_COMMENTS = 1000  # of a GIF, which Pillow joins one by one
MAX_EXIF_BYTES = 65536  # what a JPEG can hold; a PNG may hold a structure that expands without end
GREY_LEVELS = {"L;2": 4, "L;4": 16, "L": 256}  # of a PNG, by Pillow's name for how it is stored
MAX_ASPECT_RATIO = 16  # of what is resized; of longer images the middle

# Pillow's own limit is one for all programs; ours is a setting, and is checked before decoding.
Image.MAX_IMAGE_PIXELS = None

# One line for each request: not another for each oddity in a client's file.
warnings.filterwarnings("ignore", module="PIL")

# Pillow loads its other plugins at the first image it does not know: 30 ms of somebody's request.
Image.init()

# What people send by mistake, by its first bytes: named in the answer instead of "unreadable".
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
_FOREIGN_FORMATS = [(name, re.compile(rule, re.DOTALL)) for name, rule in _FOREIGN]


# EXIF orientation (EXIF 2.3, tag 0x0112) to what turns the stored pixels upright: the axes that are
# flipped (0 rows, 1 columns), and whether rows and columns then change places.
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


@dataclass(frozen=True)
class Picture:
    """A decoded image, ready for the model."""

    pixels: Tensor  # uint8 RGB [3, H, W], H x W as the model wants it
    size: tuple[int, int]  # width and height of the image as people see it


class PixelBudget:
    """Pixels that the images of one request may still have.

    Shared, because decoding takes a worker seconds for each 50 megapixels, and a batch of requests
    has `responseTimeout` seconds before TorchServe kills the worker.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit

    def spend(self, width: int, height: int) -> None:
        """Take an image's pixels off, before it is decoded. Raises TooManyPixels."""
        if width * height > self._left:
            left = f", and {self._left} are left" if self._left < self._limit else ""
            raise TooManyPixels(
                f"the image has {width}x{height} pixels, "
                f"the limit for a request is {self._limit}{left}"
            )
        self._left -= width * height


def read_picture(
    data: bytes, transform: InputTransform, settings: Settings, budget: PixelBudget | None = None
) -> Picture:
    """Encoded bytes to a Picture. Raises a RequestError of the 400, 413 or 415 family.

    `budget` is the request's; None: the image is the only one of its request.
    """
    return decode_picture(open_image(data, settings, budget), transform)


def decode_picture(encoded: Encoded, transform: InputTransform) -> Picture:
    """The second half of `read_picture`: all that costs time. Raises UnreadableImage."""
    pixels = decode(encoded)
    height, width, _ = pixels.shape
    return Picture(to_input(pixels, transform), (width, height))


def to_input(pixels: Pixels, transform: InputTransform) -> Tensor:
    """uint8 RGB [H, W, 3] to uint8 [3, crop, crop]: the recipe's resize and crop.

    Stops before torchvision's normalisation, because a batch of bytes is a quarter of the floats.
    """
    # Channels last in memory, as decoders give them: torch's vectorised resize is made for that.
    image = without_ends(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    height, width = target_size(image.shape[2:], transform)
    if (height, width) != image.shape[2:]:
        if falls_between(image.shape[2:], transform):
            pixels = image[0].permute(1, 2, 0).numpy()
            method = Image.Resampling[transform.interpolation.upper()]
            resized = np.array(Image.fromarray(pixels).resize((width, height), method))
            image = torch.from_numpy(resized).permute(2, 0, 1)[None]
        else:
            image = functional.interpolate(
                image, (height, width), mode=transform.interpolation, antialias=transform.antialias
            )
    return middle(image, transform.crop_size)[0].contiguous()


def without_ends(images: Tensor) -> Tensor:
    """[B, C, H, W] without the ends of a strip.

    The recipe resizes the shorter side, then cuts out the middle: of a strip of 1 x 50,000 pixels
    it would make 232 x 11 million first. Only the middle of a strip is kept.
    """
    return middle(images, MAX_ASPECT_RATIO * min(images.shape[2:]))


def target_size(size: Sequence[int], transform: InputTransform) -> tuple[int, int]:
    """Height and width to height and width after the resize; the recipe has the shorter side."""
    short = min(size)
    height, width = (
        transform.resize_size if side == short else int(transform.resize_size * side / short)
        for side in size
    )
    return height, width


def falls_between(size: Sequence[int], transform: InputTransform) -> bool:
    """Whether an image of this size is to be resized by Pillow itself: by 5/4, 7/4, ….

    Many values then fall exactly between two levels, and torch's 15 bits of a weight round them
    otherwise than Pillow's 22, by which the recipe's results are given.
    """
    short = min(size)
    return 4 * short % transform.resize_size == 0 and 2 * short % transform.resize_size != 0


def middle(images: Tensor, longest: int) -> Tensor:
    """[B, C, H, W] without what goes beyond `longest` at either end; rounds as torchvision does."""
    height, width = images.shape[2:]
    top, left = (max(0, round((side - longest) / 2)) for side in (height, width))
    return images[:, :, top : top + longest, left : left + longest]


def decode_image(data: bytes, settings: Settings, budget: PixelBudget | None = None) -> Pixels:
    """JPEG, PNG, WebP, GIF or BMP bytes to uint8 RGB [H, W, 3], upright; the first of many frames.

    Raises NoImage, ImageTooLarge, TooManyPixels, UnsupportedFormat or UnreadableImage.
    """
    return decode(open_image(data, settings, budget))


def open_image(data: bytes, settings: Settings, budget: PixelBudget | None = None) -> Encoded:
    """Read an image's header and hold it against the limits; its pixels are taken off the budget.

    Raises as `decode_image` does.
    """
    if not data:
        raise NoImage("the image is empty (0 bytes)")
    if len(data) > settings.max_image_bytes:
        raise ImageTooLarge(
            f"the image has {len(data)} bytes, the limit is {settings.max_image_bytes}"
        )
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
    return Encoded(data, image)


def _open(data: bytes) -> Image.Image:
    """Pillow's reading of the header, without the decoration for which it would refuse an image.

    A PNG's is never read, because what is behind the pixels would be found only with them.
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


def decode(encoded: Encoded) -> Pixels:
    """uint8 RGB [H, W, 3], upright. Raises UnreadableImage."""
    data, image = encoded.data, encoded.header
    try:
        pixels = _decode_jpeg(image, data)
        if pixels is None:
            pixels = _decode_transparent_rgb16(image, data)
        if pixels is None:
            image.load()
            pixels = np.array(to_rgb(image))
        flipped, swapped = UPRIGHT.get(orientation(image), ((), False))
        if flipped or swapped:
            pixels = np.flip(pixels, flipped)
            pixels = np.ascontiguousarray(pixels.swapaxes(0, 1) if swapped else pixels)
        return pixels
    except MemoryError:
        raise
    except Exception as exc:  # as above
        raise UnreadableImage(
            f"{len(data)} bytes of {image.format} are damaged or truncated"
        ) from exc


def _decode_jpeg(image: Image.Image, data: bytes) -> Pixels | None:
    """The pixels of a sound JPEG, which may lack its end marker; None for what is Pillow's.

    The same libjpeg-turbo as Pillow's, value for value, without Pillow's copies on the way.
    """
    if not isinstance(image, JpegImageFile):
        return None
    if not data.endswith(JPEG_END) and lacks_only_its_end(data):
        data += JPEG_END
    colours, channels = ("CMYK", 4) if image.mode == "CMYK" else ("RGB", 3)
    try:
        # Header and pixels are read by two programs: no more memory than the first one's size,
        # for which the budget was spent.
        buffer = np.empty((image.height, image.width, channels), np.uint8)
        pixels = simplejpeg.decode_jpeg(
            data, colours, fastdct=False, fastupsample=False, buffer=buffer
        )
    except ValueError:  # it takes no oddity; Pillow takes some, and knows damage from oddity
        return None
    if pixels.shape[1::-1] != image.size:
        return None
    if colours == "CMYK":  # inverted, as Adobe has it
        return np.array(to_rgb(Image.frombytes("CMYK", image.size, pixels, "raw", "CMYK;I")))
    return pixels


def _scale_transparent(image: PngImageFile) -> None:
    """A PNG's transparent grey, which is given in the file's depth, in 8 bits like the pixels."""
    rawmode = image.tile[0].args if image.tile else None
    if rawmode in GREY_LEVELS and "transparency" in image.info:
        levels = GREY_LEVELS[rawmode]
        image.info["transparency"] = image.info["transparency"] % levels * 255 // (levels - 1)


def _decode_transparent_rgb16(image: Image.Image, data: bytes) -> Pixels | None:
    """A PNG of 16-bit RGB with one transparent colour, over white; None for anything else.

    Pillow's pixels are the upper bytes, which 16 million colours share: a second reading gives the
    lower ones.
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
    if isinstance(image, JpegImageFile) and data.count(b"\xff\xda") > MAX_SCANS:
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
    return next((name for name, rule in _FOREIGN_FORMATS if rule.match(head)), None)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, which turns nothing, where a damaged EXIF block says none."""
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

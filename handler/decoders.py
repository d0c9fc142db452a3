"""Images of a batch from bytes to pixels: in the worker's thread, in several, or on the GPU."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional

from handler.errors import InvalidSettings, RequestError
from handler.images import (
    UPRIGHT,
    Encoded,
    Picture,
    decode_picture,
    falls_between,
    middle,
    open_image,
    orientation,
    read_picture,
    target_size,
    without_ends,
)
from handler.model_card import InputTransform
from handler.settings import Settings

MAX_DIFFERENCE = 0.01  # of 255, on average: what the GPU's pixels may be off from the CPU's

# Horizontal and vertical sampling of Y, Cb and Cr in the usual JPEGs, by the names they go by.
SAMPLINGS = {
    "4:4:4": ((1, 1), (1, 1), (1, 1)),
    "4:2:2": ((2, 1), (1, 1), (1, 1)),
    "4:2:0": ((2, 2), (1, 1), (1, 1)),
}

# Times the size that it is resized to, for an image to be the GPU's. Smaller ones cost the CPU
# little, and so near to their own size many values fall between two levels, as in falls_between.
MIN_SHRINK = 1.25

# Of what the GPU decodes together. A pixel takes it some 30 bytes, most of them for resizing.
CHUNK_PIXELS = 2**24

DecodeJpegs = Callable[[list[Tensor]], list[Tensor]]  # uint8 [n] each -> uint8 RGB [3, H, W] each


@dataclass(eq=False)
class Decoding:
    """An image while it is decoded, then its picture or its error; equal to itself alone."""

    size: tuple[int, int]  # width and height by its header
    picture: Picture | None = None
    error: Exception | None = None  # a RequestError, or a bug of ours
    future: Future[None] | None = None  # in the pool
    encoded: Encoded | None = None  # for the GPU


class Decoder(ABC):
    """Images go in one by one, in whatever order, and come out decoded."""

    name: str

    @abstractmethod
    def start(self, encoded: Encoded) -> Decoding:
        """Begin with an image. Never raises for what is wrong with it."""

    @abstractmethod
    def finish(self, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
        """Wait for images that were started; each is given as soon as it is decoded, or refused."""


class CpuDecoder(Decoder):
    """Decodes at once, or in a pool where the worker has several threads.

    The decoders and torch's resize release Python's lock while they work.
    """

    name = "cpu"

    def __init__(self, transform: InputTransform, threads: int = 1) -> None:
        self._transform = transform
        self._pool = None
        if threads > 1:  # each with one thread of torch's: there is no core for more
            self._pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))

    def start(self, encoded: Encoded) -> Decoding:
        decoding = Decoding(encoded.header.size)
        self.decode(encoded, decoding)
        return decoding

    def decode(self, encoded: Encoded, decoding: Decoding) -> None:
        """Begin with an image that has its Decoding already."""
        if self._pool:
            decoding.future = self._pool.submit(self._decode, encoded, decoding)
        else:
            self._decode(encoded, decoding)

    def finish(self, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
        for decoding in decodings:
            if decoding.future:
                decoding.future.result()
            yield decoding

    def _decode(self, encoded: Encoded, decoding: Decoding) -> None:
        try:
            decoding.picture = decode_picture(encoded, self._transform)
        except RequestError as error:
            # Without the frames of this call, which hold the image and, in a circle, the error.
            decoding.error = error.with_traceback(None)
        except Exception as bug:
            decoding.error = bug


class GpuDecoder(Decoder):
    """Plain JPEGs in chunks through nvJPEG; all else, and what nvJPEG refuses, on the CPU."""

    name = "nvjpeg"

    def __init__(
        self, transform: InputTransform, decode_jpegs: DecodeJpegs, cpu: CpuDecoder
    ) -> None:
        self._transform = transform
        self._decode_jpegs = decode_jpegs
        self._cpu = cpu

    def start(self, encoded: Encoded) -> Decoding:
        size = encoded.header.size
        large = min(size) >= MIN_SHRINK * self._transform.resize_size
        if large and is_plain_jpeg(encoded) and not falls_between(size, self._transform):
            return Decoding(size, encoded=encoded)
        return self._cpu.start(encoded)

    def finish(self, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
        others = [decoding for decoding in decodings if not decoding.encoded]
        for chunk in _chunks(decoding for decoding in decodings if decoding.encoded):
            left = self._decode(chunk)
            yield from (decoding for decoding in chunk if decoding not in left)
            others += left
        yield from self._cpu.finish(others)

    def _decode(self, chunk: Sequence[Decoding]) -> list[Decoding]:
        """Decode a chunk, each image by itself where one is refused; gives what the CPU gets."""
        encoded = [decoding.encoded for decoding in chunk if decoding.encoded]
        # A damaged image, one of a kind that nvJPEG has not, no memory: what follows is outside of
        # the exception, whose frames hold the chunk's pixels on the GPU.
        with suppress(Exception):
            for decoding, picture in zip(chunk, self.decode_together(encoded), strict=True):
                decoding.picture, decoding.encoded = picture, None
            return []
        if len(chunk) > 1:
            return [left for decoding in chunk for left in self._decode([decoding])]
        with suppress(RuntimeError):  # the GPU itself is lost, as the forward pass will find
            torch.cuda.empty_cache()
        chunk[0].encoded = None
        self._cpu.decode(encoded[0], chunk[0])
        return [chunk[0]]

    def decode_together(self, images: Sequence[Encoded]) -> list[Picture]:
        """Raises whatever nvJPEG raises for the first image that it refuses."""
        files = [torch.frombuffer(bytearray(image.data), dtype=torch.uint8) for image in images]
        upright = []
        for image, pixels in zip(images, self._decode_jpegs(files), strict=True):
            if (*pixels.shape,) != (3, image.header.height, image.header.width):
                raise ValueError(f"nvJPEG gave {[*pixels.shape]} for {image.header.size}")
            flipped, swapped = UPRIGHT.get(orientation(image.header), ((), False))
            pixels = pixels.flip([axis + 1 for axis in flipped])
            upright.append(pixels.transpose(1, 2) if swapped else pixels)
        places: dict[torch.Size, list[int]] = {}
        for place, pixels in enumerate(upright):
            places.setdefault(pixels.shape, []).append(place)
        pictures: dict[int, Picture] = {}
        for (_, height, width), same in places.items():
            inputs = to_inputs(torch.stack([upright[place] for place in same]), self._transform)
            for place, pixels in zip(same, inputs, strict=True):
                pictures[place] = Picture(pixels, (width, height))
        return [pictures[place] for place in range(len(images))]

    def differences(self) -> dict[str, float]:
        """Levels of 255 by which its pixels are off from the CPU's on average, by chroma sampling.

        Of the worst of a few JPEGs drawn here. Raises what nvJPEG raises where it does not run.
        """
        found = {}
        for sampling in SAMPLINGS:
            jpegs = [_draw_jpeg(size, sampling) for size in ((501, 375), (347, 601))]
            encoded = [open_image(jpeg, Settings()) for jpeg in jpegs]
            wanted = [read_picture(jpeg, self._transform, Settings()).pixels for jpeg in jpegs]
            given = [picture.pixels.cpu() for picture in self.decode_together(encoded)]
            found[sampling] = max(
                (one.float() - other.float()).abs().mean().item()
                for one, other in zip(wanted, given, strict=True)
            )
        return found


def _chunks(decodings: Iterable[Decoding]) -> Iterator[list[Decoding]]:
    """In order, at most CHUNK_PIXELS each; an image of more is alone."""
    chunk: list[Decoding] = []
    pixels = 0
    for decoding in decodings:
        width, height = decoding.size
        if chunk and pixels + width * height > CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
        chunk.append(decoding)
        pixels += width * height
    if chunk:
        yield chunk


def is_plain_jpeg(encoded: Encoded) -> bool:
    """Whether libjpeg and nvJPEG understand the same by it: YCbCr, whole, of a usual sampling.

    nvJPEG does not say when a file ends early, and takes RGB inside of a JPEG for YCbCr.
    """
    header = encoded.header
    if type(header) is not JpegImageFile or header.mode != "RGB":
        return False
    names, *samplings = zip(*(component[:3] for component in header.layer), strict=True)
    return (
        names == (1, 2, 3)
        and header.info.get("adobe_transform", 1) == 1
        and tuple(zip(*samplings, strict=True)) in SAMPLINGS.values()
        and encoded.data.endswith(b"\xff\xd9")
    )


def to_inputs(images: Tensor, transform: InputTransform) -> Tensor:
    """uint8 RGB [B, 3, H, W] to uint8 [B, 3, crop, crop], as `to_input` but for some roundings.

    For devices on which torch resizes floats alone. Along one axis, rounded, along the other, as
    Pillow does it and torch with bytes: both at once would be off by 0.15 levels on average.
    """
    images = without_ends(images)
    height, width = target_size(images.shape[2:], transform)
    for size in ((images.shape[2], width), (height, width)):
        if size != images.shape[2:]:
            floats = functional.interpolate(
                images.float(), size, mode=transform.interpolation, antialias=transform.antialias
            )
            images = floats.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return middle(images, transform.crop_size)


def choose_decoder(
    transform: InputTransform, settings: Settings, device: str, threads: int
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder that the settings ask for, and, where it is not as one would wish, why.

    `device` is the engine's. On a GPU, nvJPEG is held against the CPU first: where its pixels are
    others, `auto` is the CPU. Raises InvalidSettings where the GPU is demanded and cannot decode.
    """
    cpu = CpuDecoder(transform, threads)
    if settings.decoder == "gpu" and device == "cpu":
        raise InvalidSettings("decoder is gpu, and device is cpu")
    if settings.decoder == "cpu" or device == "cpu":
        return cpu, {}
    try:
        gpu = GpuDecoder(transform, nvjpeg(device), cpu)
        differences = gpu.differences()
    except Exception as exc:
        if settings.decoder == "gpu":
            raise InvalidSettings(f"decoder is gpu, and nvJPEG does not run here: {exc}") from exc
        return cpu, {"cause": str(exc)}
    if max(differences.values()) <= MAX_DIFFERENCE:
        return gpu, {}
    chosen = gpu if settings.decoder == "gpu" else cpu
    return chosen, {"differences": differences, "tolerance": MAX_DIFFERENCE}


def nvjpeg(device: str) -> DecodeJpegs:
    """torchvision's nvJPEG, whose pixels nothing else writes to before the current stream has read.

    torchvision decodes on a stream of its own, which waits for no other, into memory from the pool
    of the current stream: that of pixels that were freed, but are still to be resized by kernels
    in the queue. So it is given a pool in which nothing but its pixels lies, and each piece of it
    is used again only when the stream that reads the pixels is done with them.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # 170 MB, which a GPU's worker has anyway

    pool = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def decode_jpegs(files: list[Tensor]) -> list[Tensor]:
        reader = torch.cuda.current_stream(device)
        with torch.cuda.stream(pool):
            images: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        reader.wait_stream(pool)
        for pixels in images:
            pixels.record_stream(reader)
        return images

    return decode_jpegs


def _draw_jpeg(size: tuple[int, int], sampling: str) -> bytes:
    """Coarse and fine colours, the same for the same size."""
    rng = random.Random(size[0])  # noqa: S311 a picture, not a secret
    image = Image.new("RGB", size)
    for cells, share in ((4, 1.0), (16, 0.5), (64, 0.3), (256, 0.15)):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(cells * cells * 3))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), share)
    file = BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=sampling)
    return file.getvalue()

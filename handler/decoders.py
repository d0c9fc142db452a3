"""Images of a batch from bytes to pixels: in one thread or in several, or on the GPU."""

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

from handler.errors import InvalidSettings, RequestError
from handler.images import (
    Encoded,
    Picture,
    decode_picture,
    open_image,
    read_picture,
    upright,
)
from handler.model_card import InputTransform
from handler.resize import needs_pillow_resize, resize_and_crop_batch
from handler.settings import Settings

MAX_DIFFERENCE = 0.01  # of 255: how far the GPU's pixels may be from the CPU's on average

# Horizontal and vertical sampling of Y, Cb and Cr in the usual JPEGs, by the names they go by.
SAMPLINGS = {
    "4:4:4": ((1, 1), (1, 1), (1, 1)),
    "4:2:2": ((2, 1), (1, 1), (1, 1)),
    "4:2:0": ((2, 2), (1, 1), (1, 1)),
}

# The GPU decodes an image only if its short side is at least this times the resize size. Smaller
# ones cost the CPU little, and many of their values fall between two levels (needs_pillow_resize).
MIN_SHRINK = 1.25

# Of images that the GPU decodes together. A pixel takes some 30 bytes, most of them to resize it.
CHUNK_PIXELS = 2**24

DecodeJpegs = Callable[[list[Tensor]], list[Tensor]]  # uint8 [n] each -> uint8 RGB [3, H, W] each


@dataclass(eq=False)
class Decoding:
    """An image while it is decoded, then its picture or its error; equal only to itself."""

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
        """Begin to decode an image. Never raises for what is wrong with it."""

    @abstractmethod
    def finish(self, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
        """Wait for images that were started, and yield each once it is decoded or refused."""


class CpuDecoder(Decoder):
    """Decodes at once, or in a pool if the worker has several threads.

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
        """Begin to decode an image that has its Decoding already."""
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
            # Without its traceback, whose frames hold the image and, in a cycle, the error.
            decoding.error = error.with_traceback(None)
        except Exception as bug:
            decoding.error = bug


@dataclass
class GpuDecoder(Decoder):
    """Decodes plain JPEGs in chunks with nvJPEG; all else, and what it refuses, on the CPU."""

    name = "nvjpeg"

    transform: InputTransform
    decode_jpegs: DecodeJpegs
    cpu: CpuDecoder

    def start(self, encoded: Encoded) -> Decoding:
        size = encoded.header.size
        large = min(size) >= MIN_SHRINK * self.transform.resize_size
        if large and is_plain_jpeg(encoded) and not needs_pillow_resize(size, self.transform):
            return Decoding(size, encoded=encoded)
        return self.cpu.start(encoded)

    def finish(self, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
        others = [decoding for decoding in decodings if not decoding.encoded]
        for chunk in _chunks(decoding for decoding in decodings if decoding.encoded):
            left = self._decode(chunk)
            yield from (decoding for decoding in chunk if decoding not in left)
            others += left
        yield from self.cpu.finish(others)

    def _decode(self, chunk: Sequence[Decoding]) -> list[Decoding]:
        """Decode a chunk, or one by one if an image is refused; returns what is left to the CPU."""
        encoded = [decoding.encoded for decoding in chunk if decoding.encoded]
        # nvJPEG raises for a damaged image, for a kind that it does not know, and if there is no
        # memory. What follows is outside of the exception, whose frames hold pixels on the GPU.
        with suppress(Exception):
            for decoding, picture in zip(chunk, self.decode_together(encoded), strict=True):
                decoding.picture, decoding.encoded = picture, None
            return []
        if len(chunk) > 1:
            return [left for decoding in chunk for left in self._decode([decoding])]
        with suppress(RuntimeError):  # the GPU itself is lost, as the forward pass will notice
            torch.cuda.empty_cache()
        chunk[0].encoded = None
        self.cpu.decode(encoded[0], chunk[0])
        return [chunk[0]]

    def decode_together(self, images: Sequence[Encoded]) -> list[Picture]:
        """JPEGs to Pictures. Raises what nvJPEG raises for the first image that it refuses."""
        files = [torch.frombuffer(bytearray(image.data), dtype=torch.uint8) for image in images]
        by_shape: dict[torch.Size, dict[int, Tensor]] = {}  # upright, by their places
        decoded = zip(images, self.decode_jpegs(files), strict=True)
        for place, (image, pixels) in enumerate(decoded):
            if (*pixels.shape,) != (3, image.header.height, image.header.width):
                raise ValueError(f"nvJPEG gave {[*pixels.shape]} for {image.header.size}")
            flipped, swapped = upright(image.header)
            turned = pixels.flip([axis + 1 for axis in flipped])
            turned = turned.transpose(1, 2) if swapped else turned
            by_shape.setdefault(turned.shape, {})[place] = turned
        pictures: dict[int, Picture] = {}
        for (_, height, width), same in by_shape.items():
            inputs = resize_and_crop_batch(torch.stack([*same.values()]), self.transform)
            for place, pixels in zip(same, inputs, strict=True):
                pictures[place] = Picture(pixels, (width, height))
        return [pictures[place] for place in range(len(images))]

    def differences(self) -> dict[str, float]:
        """How far its pixels are from the CPU's: mean levels of 255, by chroma sampling.

        The figure is that of the worst of a few JPEGs drawn here. Raises what nvJPEG raises if it
        does not run.
        """
        found = {}
        for sampling in SAMPLINGS:
            jpegs = [_draw_jpeg(size, sampling) for size in ((501, 375), (347, 601))]
            encoded = [open_image(jpeg, Settings()) for jpeg in jpegs]
            expected = [read_picture(jpeg, self.transform, Settings()).pixels for jpeg in jpegs]
            actual = [picture.pixels.cpu() for picture in self.decode_together(encoded)]
            found[sampling] = max(
                (one.float() - other.float()).abs().mean().item()
                for one, other in zip(expected, actual, strict=True)
            )
        return found


def _chunks(decodings: Iterable[Decoding]) -> Iterator[list[Decoding]]:
    """The images in order, in chunks of at most CHUNK_PIXELS; a larger image is a chunk."""
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
    """Whether libjpeg and nvJPEG read the same in it: a whole YCbCr image of a usual sampling.

    nvJPEG does not report a file that ends early, and takes RGB inside a JPEG for YCbCr.
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


def choose_decoder(
    transform: InputTransform, settings: Settings, device: str, threads: int
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder that the settings ask for, with what there is to say against nvJPEG, if anything.

    `device` is the engine's. On a GPU, nvJPEG is first compared with the CPU: if its pixels differ,
    `auto` takes the CPU. Raises InvalidSettings if `decoder` is gpu and the GPU cannot decode.
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
    """torchvision's nvJPEG, with memory that is reused only once its pixels have been read.

    torchvision decodes on a stream of its own, which waits for no other, into memory from the pool
    of the current stream. That memory may be of pixels that were freed, but that kernels in the
    queue have yet to resize. So it gets a pool that holds only its own pixels, and each piece of it
    is reused only when the stream that reads the pixels is done with them.
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
    """A JPEG with coarse and fine patterns of colours, always the same for the same size."""
    rng = random.Random(size[0])  # noqa: S311 a picture, not a secret
    image = Image.new("RGB", size)
    for cells, share in ((4, 1.0), (16, 0.5), (64, 0.3), (256, 0.15)):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(cells * cells * 3))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), share)
    file = BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=sampling)
    return file.getvalue()

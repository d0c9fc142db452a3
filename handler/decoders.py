"""Images of a batch from bytes to pixels: in one thread or in several, or on the GPU."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from handler.batch_resize import Turned, can_resize, resize_and_crop_batch
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
from handler.nvimgcodec import nvimgcodec
from handler.pixels import RawPixels
from handler.settings import Settings

MAX_DIFFERENCE = 0.01  # of 255: how far the GPU's pixels may be from the CPU's on average

# The usual chroma samplings: horizontal and vertical factors of Y, Cb and Cr, and their names.
SAMPLINGS: dict[tuple[Any, ...], str] = {
    ((1, 1), (1, 1), (1, 1)): "4:4:4",
    ((2, 1), (1, 1), (1, 1)): "4:2:2",
    ((2, 2), (1, 1), (1, 1)): "4:2:0",
}
ALL_SAMPLINGS = tuple(SAMPLINGS.values())

# Of images that the GPU decodes together. A pixel takes some 40 bytes, most of them to resize it,
# and an image some 3 MB.
CHUNK_PIXELS = 2**23
CHUNK_IMAGES = 64
MAX_PADDING = 2  # pixels in a chunk, with what pads all images to one size, for each of an image

# uint8 [n] each -> uint8 RGB [3, H, W] each, on the GPU, or None for an image that is refused
DecodeJpegs = Callable[[list[Tensor]], Sequence[Tensor | None]]


@dataclass(eq=False)
class Decoding:
    """An image while it is decoded, then its picture or its error; equal only to itself."""

    size: tuple[int, int]  # width and height by its header
    picture: Picture | None = None
    error: Exception | None = None  # a RequestError, or a bug of ours
    future: Future[None] | None = None  # in the pool
    encoded: Encoded | None = None  # for the GPU
    turn: tuple[tuple[int, ...], bool] = ((), False)  # of `encoded`, as in images.UPRIGHT

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height once it is turned."""
        width, height = self.size
        return (height, width) if self.turn[1] else (width, height)


class Decoder(ABC):
    """Images go in one by one, in whatever order, and come out decoded."""

    name: str
    samplings: tuple[str, ...] = ()  # of the JPEGs that the GPU decodes

    @abstractmethod
    def start(self, encoded: Encoded | RawPixels) -> Decoding:
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

    def start(self, encoded: Encoded | RawPixels) -> Decoding:
        decoding = Decoding(encoded.size)
        self.decode(encoded, decoding)
        return decoding

    def decode(self, encoded: Encoded | RawPixels, decoding: Decoding) -> None:
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

    def _decode(self, encoded: Encoded | RawPixels, decoding: Decoding) -> None:
        try:
            decoding.picture = decode_picture(encoded, self._transform)
        except RequestError as error:
            # Without its traceback, whose frames hold the image and, in a cycle, the error.
            decoding.error = error.with_traceback(None)
        except Exception as bug:
            decoding.error = bug


@dataclass
class GpuDecoder(Decoder):
    """Decodes plain JPEGs in chunks on the GPU; all else, and what it refuses, on the CPU.

    Decoding and resizing have a stream of their own, beside the forward passes, in which memory is
    reused in order. What leaves it are the model's inputs alone.
    """

    transform: InputTransform
    decode_jpegs: DecodeJpegs
    cpu: CpuDecoder
    name: str = "nvjpeg"
    samplings: tuple[str, ...] = ALL_SAMPLINGS
    stream: torch.cuda.Stream | None = None  # None: the current one

    def start(self, encoded: Encoded | RawPixels) -> Decoding:
        if isinstance(encoded, Encoded) and plain_sampling(encoded) in self.samplings:
            return _for_gpu(encoded)
        return self.cpu.start(encoded)

    def finish(self, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
        others = [decoding for decoding in decodings if not decoding.encoded]
        for chunk in _chunks(decoding for decoding in decodings if decoding.encoded):
            left = self._decode(chunk)
            yield from (decoding for decoding in chunk if decoding.picture)
            for decoding in left:
                self._leave_to_cpu(decoding)
            others += left
        yield from self.cpu.finish(others)

    def _decode(self, chunk: Sequence[Decoding]) -> list[Decoding]:
        """Decode a chunk, or one by one if it is refused as a whole; returns what is left."""
        # A decoder raises for a kind that it does not know, and if there is no memory; nvJPEG for
        # any damaged image. What follows is outside of the exception, whose frames hold pixels.
        with suppress(Exception):
            for decoding, picture in zip(chunk, self.decode_together(chunk), strict=True):
                decoding.picture = picture
                decoding.encoded = None if picture else decoding.encoded
            return [decoding for decoding in chunk if not decoding.picture]
        if len(chunk) > 1:
            return [left for decoding in chunk for left in self._decode([decoding])]
        with suppress(RuntimeError):  # the GPU itself is lost, as the forward pass will notice
            torch.cuda.empty_cache()
        return [*chunk]

    def _leave_to_cpu(self, decoding: Decoding) -> None:
        encoded, decoding.encoded = decoding.encoded, None
        if encoded:
            self.cpu.decode(encoded, decoding)

    def decode_together(self, chunk: Sequence[Decoding]) -> list[Picture | None]:
        """Images for the GPU to Pictures, None for one that is refused.

        The pixels of all are one tensor [B, 3, H, W]. Raises what the library raises.
        """
        files = [_as_tensor(decoding.encoded.data) for decoding in chunk if decoding.encoded]
        pictures: list[Picture | None] = [None] * len(chunk)
        with torch.cuda.stream(self.stream):
            turned = {}
            for place, (decoding, pixels) in enumerate(
                zip(chunk, self.decode_jpegs(files), strict=True)
            ):
                if pixels is None:
                    continue
                if (*pixels.shape,) != (3, decoding.size[1], decoding.size[0]):
                    raise ValueError(f"{self.name} gave {[*pixels.shape]} for {decoding.size}")
                turned[place] = Turned(pixels, *decoding.turn)
            if not turned:
                return pictures
            inputs = resize_and_crop_batch([*turned.values()], self.transform)
        if self.stream:
            reader = torch.cuda.current_stream(self.stream.device)
            reader.wait_stream(self.stream)
            inputs.record_stream(reader)
        for place, pixels in zip(turned, inputs, strict=True):
            pictures[place] = Picture(pixels, chunk[place].upright_size)
        return pictures

    def differences(self) -> dict[str, float | None]:
        """How far its pixels are from the CPU's: mean levels of 255, by chroma sampling.

        The figure is that of the worst of a few JPEGs drawn here, None if it refuses one. Raises
        what the library raises if it does not run.
        """
        drawn = [
            (sampling, _draw_jpeg(size, sampling, progressive=progressive))
            for sampling in ALL_SAMPLINGS
            for size, progressive in (((501, 375), False), ((347, 601), False), ((501, 375), True))
        ]
        decodings = [_for_gpu(open_image(jpeg, Settings())) for _, jpeg in drawn]
        found: dict[str, float | None] = dict.fromkeys(ALL_SAMPLINGS, 0.0)
        for (sampling, jpeg), picture in zip(drawn, self.decode_together(decodings), strict=True):
            worst = found[sampling]
            if picture is None or worst is None:
                found[sampling] = None
                continue
            expected = read_picture(jpeg, self.transform, Settings()).pixels
            difference = (picture.pixels.cpu().float() - expected.float()).abs().mean().item()
            found[sampling] = max(worst, difference)
        return found


def _for_gpu(encoded: Encoded) -> Decoding:
    return Decoding(encoded.size, encoded=encoded, turn=upright(encoded.header))


def _as_tensor(data: bytes) -> Tensor:
    """The bytes themselves as uint8 [n], not to be written to."""
    return from_dlpack(np.frombuffer(data, np.uint8))  # torch.frombuffer warns, or copies


def _chunks(decodings: Iterable[Decoding]) -> Iterator[list[Decoding]]:
    """The images in chunks of like sizes, from small to large.

    A chunk takes the memory of images that are all as wide as its widest and as high as its
    highest, which is bounded by CHUNK_PIXELS; a larger image is a chunk.
    """
    chunk: list[Decoding] = []
    pixels = width = height = 0
    for decoding in sorted(decodings, key=lambda decoding: sorted(decoding.size, reverse=True)):
        wide, high = decoding.upright_size
        width, height, pixels = max(width, wide), max(height, high), pixels + wide * high
        padded = width * height * (len(chunk) + 1)
        if chunk and (
            padded > min(CHUNK_PIXELS, MAX_PADDING * pixels) or len(chunk) == CHUNK_IMAGES
        ):
            yield chunk
            chunk, width, height, pixels = [], wide, high, wide * high
        chunk.append(decoding)
    if chunk:
        yield chunk


def plain_sampling(encoded: Encoded) -> str | None:
    """The chroma sampling of a JPEG in which libjpeg and the GPU read the same; else None.

    It is a whole YCbCr image of a usual sampling: nvJPEG does not report a file that ends early,
    and takes RGB inside a JPEG for YCbCr.
    """
    header = encoded.header
    if type(header) is not JpegImageFile or header.mode != "RGB":
        return None
    names, *factors = zip(*(component[:3] for component in header.layer), strict=True)
    if (
        names != (1, 2, 3)
        or header.info.get("adobe_transform", 1) != 1
        or not encoded.data.endswith(b"\xff\xd9")
    ):
        return None
    return SAMPLINGS.get(tuple(zip(*factors, strict=True)))


def choose_decoder(
    transform: InputTransform, settings: Settings, device: str, threads: int
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder that the settings ask for, with why the GPU does not decode every plain JPEG.

    `device` is the engine's. Each decoder of a GPU is compared with the CPU, for each chroma
    sampling; the first that has the CPU's pixels for the most is taken, for these with `auto`, and
    for all with `gpu`. Raises InvalidSettings if `decoder` is gpu and the GPU cannot decode.
    """
    cpu = CpuDecoder(transform, threads)
    if settings.decoder == "gpu" and device == "cpu":
        raise InvalidSettings("decoder is gpu, and device is cpu")
    if settings.decoder == "cpu" or device == "cpu":
        return cpu, {}
    chosen: GpuDecoder | None = None
    reason: dict[str, Any] = {}  # by the name of a library: its differences, or what it raised
    for name, load in GPU_LIBRARIES.items():
        try:
            if not can_resize(transform):
                raise ValueError("the recipe resizes without antialias")
            gpu = GpuDecoder(transform, load(device, threads), cpu, name, stream=_stream(device))
            differences = gpu.differences()
        except Exception as exc:
            reason[name] = str(exc)
            continue
        reason[name] = differences
        gpu.samplings = tuple(
            sampling
            for sampling, difference in differences.items()
            if difference is not None and difference <= MAX_DIFFERENCE
        )
        if gpu.samplings == ALL_SAMPLINGS:
            return gpu, {}
        if chosen is None or len(gpu.samplings) > len(chosen.samplings):
            chosen = gpu
    if settings.decoder == "gpu":
        if chosen is None:
            raise InvalidSettings(f"decoder is gpu, and the GPU cannot decode: {reason}")
        chosen.samplings = ALL_SAMPLINGS
    reason["tolerance"] = MAX_DIFFERENCE
    if chosen is None or not chosen.samplings:
        return cpu, reason
    return chosen, reason | {"samplings": chosen.samplings}


def _stream(device: str) -> torch.cuda.Stream | None:
    if not device.startswith("cuda"):
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def nvjpeg(device: str, threads: int = 1) -> DecodeJpegs:  # noqa: ARG001 as nvimgcodec has it
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


# From the one that is tried first; each is given the device and a number of threads.
GPU_LIBRARIES: dict[str, Callable[[str, int], DecodeJpegs]] = {
    "nvimgcodec": nvimgcodec,
    "nvjpeg": nvjpeg,
}


def _draw_jpeg(size: tuple[int, int], sampling: str, *, progressive: bool) -> bytes:
    """A JPEG with coarse and fine patterns of colours, always the same for the same size."""
    rng = random.Random(size[0])  # noqa: S311 a picture, not a secret
    image = Image.new("RGB", size)
    for cells, share in ((4, 1.0), (16, 0.5), (64, 0.3), (256, 0.15)):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(cells * cells * 3))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), share)
    file = BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=sampling, progressive=progressive)
    return file.getvalue()

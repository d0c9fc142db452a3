"""The parts of the service on a GPU, in this process: are they right, and how fast are they?"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.servers import say, show
from handler.decoders import CpuDecoder, DecodeJpegs, Decoder, GpuDecoder, choose_decoder, nvjpeg
from handler.engine import Engine
from handler.engines import load_engine
from handler.images import open_image, read_picture
from handler.machine import available_cores
from handler.model_card import ModelCard
from handler.settings import Settings

# The largest difference of a probability from torch on the CPU in fp32. 16 bits are off by 0.1 in
# single images (bf16, MobileNetV2, measured on a CPU): there, the top-1 class must mostly stay.
TOLERANCE = 0.003
MINIMUM_AGREEMENT = 0.97
IN_FLIGHT = 2  # forward passes under way at once
DECODED_TOGETHER = 64  # images


@dataclass(frozen=True)
class Parts:
    """A packaged model and JPEGs; `device` is torch's name of the device."""

    model_dir: Path
    card: ModelCard
    device: str
    jpegs: Sequence[bytes]
    seconds: float  # of each measurement

    def check(self, engine: Engine) -> dict[str, Any]:
        """Probabilities and decoders against torch and libjpeg on the CPU."""
        say("checking against the CPU")
        transform = self.card.transform
        exact = Settings(device="cpu", engine="torch", precision="fp32")
        reference = load_engine(self.card, self.model_dir, exact, gpu_id=None, workers=1)
        pixels = [read_picture(jpeg, transform, Settings()).pixels for jpeg in self.jpegs]
        expected = in_passes(reference, pixels)
        gpu = GpuDecoder(transform, jpeg_decoder(self.device), CpuDecoder(transform))
        decoded = [picture.pixels for picture in decode(gpu, self.jpegs)]
        levels = [
            (one.float() - other.cpu().float()).abs().mean().item()
            for one, other in zip(pixels, decoded, strict=True)
        ]
        chosen, _ = choose_decoder(transform, Settings(), self.device, threads=1)
        found: dict[str, Any] = {
            "images": len(self.jpegs),
            "engine": compare(expected, in_passes(engine, pixels)),
            "engine_and_gpu_decoder": compare(expected, in_passes(engine, decoded)),
            "gpu_decoder_levels": {"mean": sum(levels) / len(levels), "largest": max(levels)},
            "gpu_decoder_drawn_levels": gpu.differences(),
            "decoder_of_auto": chosen.name,
        }
        full = engine.precision == "fp32"
        found["passed"] = (
            found["engine"]["largest_difference"] <= TOLERANCE
            if full
            else found["engine"]["same_best_class"] >= MINIMUM_AGREEMENT
        )
        rows = [{"what": name, **found[name]} for name in ("engine", "engine_and_gpu_decoder")]
        show(rows, ("what", "largest_difference", "same_best_class"), digits=5)
        bar = f"within {TOLERANCE}" if full else f"same top-1 class in {MINIMUM_AGREEMENT:.0%}"
        say(f"{bar}: {'yes' if found['passed'] else 'NO'}")
        if not self.card.weights.trained:
            say("(untrained weights give all classes much the same: this says little)")
        say(f"GPU decoder, levels of 255: {found['gpu_decoder_levels']}; auto: {chosen.name}")
        return found

    def measure_model(self, engine: Engine) -> list[dict[str, Any]]:
        """Pixels in the CPU's memory to probabilities in the CPU's memory."""
        say("the model alone")
        size = self.card.transform.crop_size
        pixels = torch.randint(0, 256, (engine.max_forward, 3, size, size), dtype=torch.uint8)
        rows = []
        for batch in getattr(engine, "sizes", sorted({1, engine.max_forward})):
            images = list(pixels[:batch])
            under_way: deque[Callable[[], Tensor]] = deque()

            def call(images: list[Tensor] = images, under_way: Any = under_way) -> None:
                under_way.append(engine.launch(images))
                if len(under_way) > IN_FLIGHT:
                    under_way.popleft()()

            rows.append({"batch": batch, "images_per_second": batch * self.rate(call)})
            while under_way:
                under_way.popleft()()
        show(rows, ("batch", "images_per_second"))
        return rows

    def measure_decoding(self) -> list[dict[str, Any]]:
        """Encoded bytes to the model's input, header checks and resizing included."""
        say("decoding alone")
        transform, cores = self.card.transform, available_cores()
        jpegs = list(islice(cycle(self.jpegs), DECODED_TOGETHER))
        decoders: dict[str, Decoder] = {
            "CPU, 1 thread": CpuDecoder(transform),
            f"CPU, {cores} threads": CpuDecoder(transform, cores),
            f"torchvision on {self.device}": GpuDecoder(
                transform, jpeg_decoder(self.device), CpuDecoder(transform)
            ),
        }
        rows = []
        for name, decoder in decoders.items():

            def call(decoder: Decoder = decoder) -> None:
                decode(decoder, jpegs)
                if self.device != "cpu":
                    torch.cuda.synchronize()

            rows.append({"decoder": name, "images_per_second": len(jpegs) * self.rate(call)})
        show(rows, ("decoder", "images_per_second"))
        return rows

    def rate(self, call: Callable[[], None]) -> float:
        """Calls a second, after a few that are not counted."""
        for _ in range(IN_FLIGHT + 1):
            call()
        calls, begin = 0, time.perf_counter()
        while (now := time.perf_counter()) < begin + self.seconds:
            call()
            calls += 1
        return calls / (now - begin)


def jpeg_decoder(device: str) -> DecodeJpegs:
    """nvJPEG on a GPU; torchvision's libjpeg if all of this is tried on a CPU."""
    return nvjpeg(device) if device != "cpu" else partial(decode_jpeg, mode=ImageReadMode.RGB)


def decode(decoder: Decoder, jpegs: Sequence[bytes]) -> list[Any]:
    """The pictures, in the order of the JPEGs. Raises the first error of one."""
    started = [decoder.start(open_image(jpeg, Settings())) for jpeg in jpegs]
    for decoding in decoder.finish(started):
        if decoding.error:
            raise decoding.error
    return [decoding.picture for decoding in started]


def in_passes(engine: Engine, pixels: Sequence[Tensor]) -> Tensor:
    """Probabilities [N, C] of any number of images, on any device."""
    starts = range(0, len(pixels), engine.max_forward)
    passes = [list(pixels[start : start + engine.max_forward]) for start in starts]
    if engine.device == "cpu":
        passes = [[image.cpu() for image in images] for images in passes]
    return torch.from_numpy(np.concatenate([engine.launch(images)() for images in passes]))


def compare(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """Differences of probabilities [N, C], and the share of equal top-1 classes.

    An image's difference is that of its most different class.
    """
    same = (expected.argmax(dim=1) == actual.argmax(dim=1)).float().mean().item()
    off = (expected - actual).abs().amax(dim=1)
    return {
        "largest_difference": off.max().item(),
        "mean_difference": off.mean().item(),
        "same_best_class": same,
    }

"""The parts of the service on a GPU, in one process: are they right, and how fast are they?

    python -m benchmarks.gpu_parts check|model|decoding --model-dir DIR --device cuda

`python -m benchmarks.gpu` runs each with a time limit. A row is a line of JSON.
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import load_rgb
from benchmarks.parts import print_row
from handler.decoders import Decoder, choose_decoder
from handler.engine import Engine
from handler.engines import load_engine
from handler.errors import InvalidSettings
from handler.images import open_image, read_picture
from handler.machine import available_cores
from handler.model_card import ModelCard
from handler.rules import rules_of
from handler.settings import Settings

IN_FLIGHT = 2  # forward passes under way at once


@dataclass(frozen=True)
class Parts:
    """A packaged model and JPEGs, and what is measured of them; each figure is a printed row."""

    model_dir: Path
    card: ModelCard
    settings: Settings
    jpegs: Sequence[bytes]
    seconds: float  # of each measurement

    def load(self) -> Engine:
        """The engine that a lone worker would have."""
        return load_engine(self.card, self.model_dir, self.settings, gpu_id=0, workers=1)

    def decoders(self, engine: Engine) -> Iterator[tuple[str, int, Decoder | InvalidSettings]]:
        """What each value of the setting `decoder` gives, and its threads, or why it does not run.

        The name has both, such as "auto: nvjpeg". On a CPU `auto` is `cpu`, and left out.
        """
        cores = available_cores()
        for name in rules_of(Settings)["decoder"].choices:
            if name == "auto" and engine.device == "cpu":
                continue
            for threads in sorted({1, cores}) if name == "cpu" else [cores]:
                settings = replace(self.settings, decoder=name)
                try:
                    found, _ = choose_decoder(self.card.transform, settings, engine.device, threads)
                except InvalidSettings as exc:
                    yield name, threads, exc
                else:
                    both = name if name == found.name else f"{name}: {found.name}"
                    yield both, threads, found

    def check(self) -> None:
        """Probabilities and decoders against torch and libjpeg on the CPU, both in fp32."""
        exact = Settings(device="cpu", engine="torch", precision="fp32")
        # As a worker would have them: with all cores, as nothing else runs.
        reference = load_engine(self.card, self.model_dir, exact, gpu_id=None, workers=1)
        transform = self.card.transform
        pixels = [read_picture(jpeg, transform, Settings()).pixels for jpeg in self.jpegs]
        expected = in_passes(reference, pixels)
        engine = self.load()
        self._compare(engine, "cpu", expected, pixels, pixels)
        for name, _, decoder in self.decoders(engine):
            if name != "cpu":
                if isinstance(decoder, InvalidSettings):
                    print_row(engine=engine.name, decoder=name, reason=str(decoder))
                else:
                    decoded = [picture.pixels for picture in decode(decoder, self.jpegs)]
                    self._compare(engine, name, expected, pixels, decoded)

    def _compare(
        self,
        engine: Engine,
        decoder: str,
        expected: Tensor,
        pixels: Sequence[Tensor],
        decoded: Sequence[Tensor],
    ) -> None:
        levels = [
            (one.float() - other.cpu().float()).abs().mean().item()
            for one, other in zip(pixels, decoded, strict=True)
        ]
        print_row(
            engine=engine.name,
            decoder=decoder,
            images=len(pixels),
            **compare(expected, in_passes(engine, decoded)),
            mean_levels=sum(levels) / len(levels),  # of 255, from libjpeg's pixels
            largest_levels=max(levels),  # of an image's mean
            trained=self.card.weights.trained,
        )

    def measure_model(self, batches: Sequence[int]) -> None:
        """Pixels in the memory of the CPU, or of the device, to probabilities in the CPU's."""
        engine = self.load()
        size = self.card.transform.crop_size
        pixels = torch.randint(0, 256, (engine.max_forward, 3, size, size), dtype=torch.uint8)
        for batch in sorted({min(batch, engine.max_forward) for batch in batches}):
            for device in dict.fromkeys(("cpu", engine.device)):
                images = list(pixels[:batch].to(device))
                under_way: deque[Callable[[], Any]] = deque()

                def call(images: list[Tensor] = images, under_way: Any = under_way) -> None:
                    under_way.append(engine.launch(images))
                    if len(under_way) > IN_FLIGHT:
                        under_way.popleft()()

                rate = batch * self.rate(call)
                while under_way:
                    under_way.popleft()()
                print_row(engine=engine.name, batch=batch, pixels_on=device, images_per_second=rate)

    def measure_decoding(self, together: Sequence[int]) -> None:
        """Encoded bytes to the model's input, header checks and resizing included."""
        engine = self.load()
        torch.set_num_threads(1)  # the decoders have threads of their own
        for name, threads, decoder in self.decoders(engine):
            facts = {"decoder": name, "threads": threads}
            if isinstance(decoder, InvalidSettings):
                print_row(**facts, reason=str(decoder))
                continue
            for count in together:
                jpegs = list(islice(cycle(self.jpegs), count))

                def call(decoder: Decoder = decoder, jpegs: Sequence[bytes] = jpegs) -> None:
                    decode(decoder, jpegs)
                    if engine.device != "cpu":
                        torch.cuda.synchronize()

                rate = count * self.rate(call)
                print_row(**facts, together=count, images_per_second=rate)

    def rate(self, call: Callable[[], None]) -> float:
        """Calls a second, after a few that are not counted."""
        for _ in range(IN_FLIGHT + 1):
            call()
        calls, begin = 0, time.perf_counter()
        while (now := time.perf_counter()) < begin + self.seconds:
            call()
            calls += 1
        return calls / (now - begin)


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("part", choices=["check", "model", "decoding"])
    add("--model-dir", type=Path, required=True, help="an unpacked archive")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--precision", default="auto")
    add("--images", type=Path, help="JPEGs (default: drawn)")
    add("--seconds", type=float, default=1)
    add("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="of the model")
    add("--together", type=int, nargs="+", default=[8, 32], help="images to decode in one call")
    args = parser.parse_args(argv)
    settings = Settings(device=args.device, precision=args.precision)
    jpegs = [image.body for image in load_rgb(args.images)]
    card = ModelCard.read(args.model_dir)
    parts = Parts(args.model_dir, card, settings, jpegs, args.seconds)
    if args.part == "check":
        parts.check()
    elif args.part == "model":
        parts.measure_model(args.batches)
    else:
        parts.measure_decoding(args.together)
    return 0


if __name__ == "__main__":
    sys.exit(main())

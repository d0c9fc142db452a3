"""Images through decoder and engine, both at work at once if they can be."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from io import BytesIO
from itertools import islice
from math import prod
from time import perf_counter, thread_time
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from handler.decoders import Decoding
from handler.engine import Engine
from handler.errors import SetupError
from handler.images import read_picture
from handler.inspection import Inspection
from handler.model_card import InputTransform
from handler.settings import Settings

BLANK_SIZE = 500, 375  # width and height
DECODES = 3  # the first has some things to load


class Timed(Iterator[Decoding]):
    """Passes on what another iterator yields, and adds up the seconds of waiting for it."""

    def __init__(self, decodings: Iterator[Decoding]) -> None:
        self._decodings = decodings
        self.seconds = 0.0

    def __next__(self) -> Decoding:
        started = perf_counter()
        try:
            return next(self._decodings)
        finally:
            self.seconds += perf_counter() - started


Outcome = TypeVar("Outcome", bound=Sized)  # of a forward pass; its length is the number of images


def classify(
    decodings: Iterable[Decoding], engine: Engine
) -> Iterator[tuple[list[Decoding], NDArray[np.float32] | Exception]]:
    """Each forward pass: its images, and their probabilities float32 [B, C] or what it raised.

    A pass is launched once as many images are decoded as it takes. Images that could not be decoded
    are in none.
    """
    return _passes(decodings, engine.launch, engine.max_forward)


def inspect(
    decodings: Iterable[Decoding], engine: Engine
) -> Iterator[tuple[list[Decoding], Inspection | Exception]]:
    """The same for images whose answers are to be explained."""

    def launch(images: Sequence[Tensor]) -> Callable[[], Inspection]:
        stacked = torch.stack([image.to(engine.device) for image in images])
        return partial(engine.inspect, stacked)

    return _passes(decodings, launch, engine.max_forward)


def _passes(
    decodings: Iterable[Decoding],
    launch: Callable[[Sequence[Tensor]], Callable[[], Outcome]],
    size: int,
) -> Iterator[tuple[list[Decoding], Outcome | Exception]]:
    decoded = (decoding for decoding in decodings if decoding.picture)
    launched = []
    while images := list(islice(decoded, size)):
        pixels = [decoding.picture.pixels for decoding in images if decoding.picture]
        try:
            launched.append((images, launch(pixels)))
        except Exception as exc:
            yield images, exc
    for images, wait in launched:
        try:
            outcome = wait()
            if len(outcome) != len(images):
                raise ValueError(f"{len(outcome)} results for {len(images)} images")
        except Exception as exc:
            yield images, exc
        else:
            yield images, outcome


def warm_up(
    engine: Engine, transform: InputTransform, batch_size: int, rounds: int, max_pixels: int
) -> float | None:
    """Classify a blank image, alone and as a full batch, so that the first client need not wait.

    Returns the seconds that the longest step would take, the largest forward pass or the decoding
    of a blank JPEG of `max_pixels`; None without a round.
    Raises SetupError if the model gives no probabilities.
    """
    file = BytesIO()
    Image.new("RGB", BLANK_SIZE).save(file, "JPEG")
    seconds = None
    decodes = []
    for _ in range(rounds):
        for _ in range(DECODES):
            started = thread_time()  # other workers start at the same time
            pixels = read_picture(file.getvalue(), transform, Settings()).pixels
            decodes.append(thread_time() - started)
        for images in sorted({1, min(batch_size, engine.max_forward)}):
            started = perf_counter()
            probabilities = engine.probabilities(torch.stack([pixels] * images))
            seconds = (perf_counter() - started) / images * engine.max_forward
            if not torch.isfinite(probabilities).all():
                raise SetupError("the model gives no finite probabilities for a blank image")
    return seconds and max(seconds, min(decodes) / prod(BLANK_SIZE) * max_pixels)

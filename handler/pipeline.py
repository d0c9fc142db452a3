"""The images of a batch through decoder and engine, both at work at once where they can be."""

from collections.abc import Iterable, Iterator
from itertools import islice
from time import perf_counter

from torch import Tensor

from handler.decoders import Decoding
from handler.engine import Engine


class Timed(Iterator[Decoding]):
    """Passes on what another iterator gives, and counts the seconds that were waited for it."""

    def __init__(self, decodings: Iterator[Decoding]) -> None:
        self._decodings = decodings
        self.seconds = 0.0

    def __next__(self) -> Decoding:
        started = perf_counter()
        try:
            return next(self._decodings)
        finally:
            self.seconds += perf_counter() - started


def classify(
    decodings: Iterable[Decoding], engine: Engine
) -> Iterator[tuple[list[Decoding], Tensor | Exception]]:
    """Each forward pass: its images, and their probabilities float32 [B, C] or what it raised.

    A pass is launched as soon as so many images are decoded as it takes. Images that could not be
    decoded are in none.
    """
    decoded = (decoding for decoding in decodings if decoding.picture)
    launched = []
    while images := list(islice(decoded, engine.max_forward)):
        pixels = [decoding.picture.pixels for decoding in images if decoding.picture]
        try:
            launched.append((images, engine.launch(pixels)))
        except Exception as exc:
            yield images, exc
    for images, wait in launched:
        try:
            probabilities = wait()
            if len(probabilities) != len(images):
                raise ValueError(f"{len(probabilities)} results for {len(images)} images")
        except Exception as exc:
            yield images, exc
        else:
            yield images, probabilities

"""The requests of a batch and their images, on their way from bytes to answers.

Images of the same bytes are one: decoded once, classified once, and the result or the error is that
of every request which sent them.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from time import perf_counter, time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from handler.answers import Answer, failure
from handler.cache import Result, ResultCache
from handler.confidence import calibrate
from handler.decoders import Decoder, Decoding
from handler.engine import Engine
from handler.errors import DeadlineExceeded, RequestError
from handler.explanations import Activation, Explain, activation_of, explain
from handler.failures import Failures
from handler.images import PixelBudget, open_image, open_pixels
from handler.inspection import Inspection
from handler.payloads import ImageRequest, Protocol
from handler.pipeline import Timed, classify, inspect
from handler.pixels import RawPixels
from handler.settings import Settings
from handler.shared_cache import SharedCache

UNPROCESSED = "the image could not be processed"
TOO_LATE = "the time that the request had is over"
LIKENESS_BYTES = 32  # the last ones of a file are those of its pixels


@dataclass(eq=False)
class BatchImage:
    """An image of a batch, for every request that sent these bytes."""

    outcome: Result | RequestError | None = None  # None until it is classified or refused
    decoding: Decoding | None = None  # None if it is cached, or was refused by its header
    data: bytes = b""  # as it was sent
    key: bytes | None = None  # of the result caches, if there is one
    cached: bool = False  # the result is that of an earlier batch, perhaps of another worker
    deadline: float = 0.0  # Unix time, the latest of its requests
    request_ids: list[str] = field(default_factory=list)
    asked: set[Explain] = field(default_factory=set)  # what is to be explained
    activations: dict[Explain, Activation] = field(default_factory=dict)  # of these
    explanations: dict[Explain, Answer] = field(default_factory=dict)  # made from them

    @property
    def pixels(self) -> Tensor | None:
        """uint8 RGB [3, H, W], as the model takes them; None if it was not decoded here."""
        return self.decoding.picture.pixels if self.decoding and self.decoding.picture else None

    def explanation(self, asked: Explain, region: Sequence[int], labels: Sequence[str]) -> Answer:
        """Made once for all requests that want the same; `region` is as in `explain`."""
        if asked not in self.explanations:
            if self.pixels is None:
                raise ValueError("the image was not inspected")
            found = self.activations[asked]
            self.explanations[asked] = explain(asked.form, found, self.pixels, region, labels)
        return self.explanations[asked]


def check_deadline(deadline: float) -> None:
    """Raise DeadlineExceeded if nobody waits any more."""
    if time() > deadline:
        raise DeadlineExceeded(TOO_LATE)


def _key(sent: bytes | RawPixels) -> bytes:
    if isinstance(sent, RawPixels):
        return ResultCache.key(sent.data, sent.size)
    return ResultCache.key(sent)


class Classified(NamedTuple):
    """What the model was given, and what it gave."""

    pixels: NDArray[np.uint8]  # RGB [3, H, W]
    probabilities: NDArray[np.float32]  # [C], calibrated if the archive is


@dataclass
class Row:
    """One request; each stage of the handler fills in its part."""

    request_id: str
    headers: Mapping[str, Any]  # names in lower case
    request: ImageRequest | RequestError  # an error: refused as a whole, and without images
    protocol: Protocol = "own"  # in which it is answered
    classes: int = 0  # how many best ones a cached result must have; 0: no cached one is taken
    images: list[BatchImage] = field(default_factory=list)
    results: list[Answer] = field(default_factory=list)  # one for each image
    errors: list[RequestError] = field(default_factory=list)  # of these, or of the whole request
    image_bytes: list[int] = field(default_factory=list)  # sizes of the images as they were sent
    brightness: list[float] = field(default_factory=list)  # of `pixels`, if there is a reference
    status: int = 0  # HTTP status of the answer
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    def add_failure(self, error: RequestError) -> None:
        """The result of an image that is not answered."""
        self.errors.append(error)
        self.results.append(failure(error))

    def release(self) -> None:
        """Let go of the images, once they are answered: what is left is for the accounts."""
        if isinstance(self.request, ImageRequest):
            sent = self.request.images
            self.image_bytes = [len(data) for data in sent if isinstance(data, bytes)]
            sent.clear()
        for image in self.images:
            image.data, image.decoding = b"", None
            image.activations.clear()
            image.explanations.clear()
        for error in self.errors:  # the frames of a traceback hold the images
            error.__traceback__ = error.__cause__ = error.__context__ = None

    def classified(self) -> Iterator[Classified]:
        """Each image, without those on a GPU, which would have to be waited for."""
        for image in self.images:
            if isinstance(image.outcome, Result) and image.decoding and image.decoding.picture:
                pixels = image.decoding.picture.pixels
                if not pixels.is_cuda:
                    yield Classified(pixels.numpy(), image.outcome.probabilities)

    @property
    def best(self) -> list[Answer]:
        """The top-1 class of each image that was classified."""
        return [one["predictions"][0] for one in self.results if one["status"] == "success"]


@dataclass
class Batch:
    """Collects the images of a batch, then classifies those that no cache knew."""

    settings: Settings
    decoder: Decoder
    cache: ResultCache | None
    shared: SharedCache | None
    failures: Failures
    step: Callable[[], None]  # called whenever an image or a forward pass is done
    temperature: float | None = None  # of the probabilities; None: they are not calibrated
    _images: list[BatchImage] = field(default_factory=list, init=False)  # to be classified
    _explained: list[BatchImage] = field(default_factory=list, init=False)  # likewise, apart
    _known: dict[Hashable, BatchImage] = field(default_factory=dict, init=False)
    _keys: dict[int, bytes] = field(default_factory=dict, init=False)  # by id(), as sent
    _recalled: dict[bytes, Result] = field(default_factory=dict, init=False)  # from `shared`

    def recall(self, rows: Sequence[Row], shared: SharedCache) -> None:
        """Ask the shared cache, once for all images of all rows that the worker's own has not."""
        started = perf_counter()
        keys: dict[bytes, int] = {}
        for row in rows:
            for sent in row.request.images if isinstance(row.request, ImageRequest) else ():
                if row.classes and not isinstance(sent, RequestError):
                    key = self._keys[id(sent)] = _key(sent)
                    if not (self.cache and self.cache.get(key, row.classes)):
                        keys[key] = min(row.classes, keys.get(key, row.classes))
        self._recalled = shared.get(keys)
        for row in rows:  # each has waited
            row.seconds["preprocess"] += perf_counter() - started

    def open_images(
        self,
        images: Sequence[bytes | RawPixels | RequestError],
        request_id: str,
        *,
        classes: int,
        explain: Explain | None = None,
        deadline: float = inf,
    ) -> list[BatchImage]:
        """A request's images: their decoding has begun, or they have their outcome already.

        `classes` is as in Row. An image is given up if its turn to be decoded or classified comes
        after the deadline, which is a Unix time. Images to `explain` are in no cache.
        """
        budget = PixelBudget(self.settings.max_image_pixels)
        opened = []
        for data in images:
            try:
                check_deadline(deadline)
                image = self._open(data, budget, classes, explain)
            except RequestError as error:
                image = BatchImage(error)
            except Exception as bug:  # of ours: one client's 500, not the whole batch's 503
                image = BatchImage(self.failures.error_of_one(UNPROCESSED, [request_id], bug))
            image.deadline = max(image.deadline, deadline)
            if request_id not in image.request_ids:
                image.request_ids.append(request_id)
            opened.append(image)
            self.step()
        return opened

    def _open(
        self,
        sent: bytes | RawPixels | RequestError,
        budget: PixelBudget,
        classes: int,
        explain: Explain | None,
    ) -> BatchImage:
        if isinstance(sent, RequestError):
            raise sent
        data, size = (sent.data, sent.size) if isinstance(sent, RawPixels) else (sent, None)
        key = None
        if (self.cache or self.shared) and not explain:
            key = self._keys.get(id(sent)) or _key(sent)
        if key and classes and (result := self._find(key, classes)):
            budget.spend(*result.size)
            return BatchImage(result, key=key, cached=True)
        # A hash of all bytes would cost more than the comparison with the few that seem equal.
        likeness = explain is None, size, len(data), data[-LIKENESS_BYTES:]
        if (known := self._known.get(likeness)) and known.decoding and known.data == data:
            budget.spend(*known.decoding.size)
            if explain:
                known.asked.add(explain)
            return known
        decoding = self.decoder.start(
            open_pixels(sent, self.settings, budget)
            if isinstance(sent, RawPixels)
            else open_image(sent, self.settings, budget)
        )
        image = BatchImage(decoding=decoding, data=data, key=key)
        if explain:
            image.asked.add(explain)
        (self._explained if explain else self._images).append(image)
        self._known[likeness] = image
        return image

    def _find(self, key: bytes, classes: int) -> Result | None:
        """What the caches know, if so many best classes can be told from it."""
        if self.cache and (result := self.cache.get(key, classes)):
            return result
        recalled = self._recalled.get(key)
        if recalled is None or not recalled.suffices(classes):
            return None
        if self.cache:
            self.cache.put(key, recalled)
        return recalled

    def classify(self, engine: Engine) -> float:
        """Give every image its outcome, in forward passes that the requests share.

        Returns the seconds in which nothing but decoding was waited for.
        """
        waited = self._classify(self._images, classify, engine)
        if self._explained:
            waited += self._classify(self._explained, inspect, engine)
        return waited

    def _classify(
        self,
        opened: Sequence[BatchImage],
        passes: Callable[
            [Iterator[Decoding], Engine],
            Iterator[tuple[list[Decoding], NDArray[np.float32] | Inspection | Exception]],
        ],
        engine: Engine,
    ) -> float:
        images = {image.decoding: image for image in opened if image.decoding}
        decoded = Timed(self._decode(images))
        for decodings, outcome in passes(decoded, engine):
            self.step()
            passed = [images[decoding] for decoding in decodings]
            if isinstance(outcome, Exception):
                request_ids = dict.fromkeys(chain(*(image.request_ids for image in passed)))
                error = self.failures.error_of(outcome, list(request_ids), engine)
                for image in passed:
                    image.outcome = error
                continue
            if isinstance(outcome, Inspection):
                for image, seen in zip(passed, outcome.each(), strict=True):  # maps are large
                    image.activations = {one: activation_of(one, seen) for one in image.asked}
                outcome = outcome.probabilities.numpy()
            if self.temperature is not None:
                outcome = calibrate(outcome, self.temperature)
            finite = np.isfinite(outcome.sum(axis=1)).tolist()
            for image, probabilities, usable in zip(passed, outcome, finite, strict=True):
                self._give_result(image, probabilities if usable else None)
        return decoded.seconds

    def _decode(self, images: Mapping[Decoding, BatchImage]) -> Iterator[Decoding]:
        """Each image's decoding as soon as it is over; one that failed is the image's outcome."""
        for decoding in self.decoder.finish(list(images)):
            self.step()
            image = images[decoding]
            if error := decoding.error:
                if not isinstance(error, RequestError):
                    error = self.failures.error_of_one(UNPROCESSED, image.request_ids, error)
                image.outcome = error
            elif time() > image.deadline:
                image.outcome, decoding.picture = DeadlineExceeded(TOO_LATE), None
            yield decoding

    def _give_result(self, image: BatchImage, probabilities: NDArray[np.float32] | None) -> None:
        """`probabilities` is float32 [C]; None if some are not finite."""
        if probabilities is None:
            message = "the model gave no finite probabilities"
            image.outcome = self.failures.report(message, image.request_ids)
        elif image.decoding and image.decoding.picture:
            picture = image.decoding.picture
            image.outcome = Result(picture.size, probabilities, picture.decode)
            for cache in (self.cache, self.shared):
                if cache and image.key:
                    cache.put(image.key, image.outcome)

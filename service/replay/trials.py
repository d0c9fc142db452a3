"""Answers to an image, computed again in this process, by the handler's own modules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torchvision

from handler.answers import best_classes
from handler.batch import Batch
from handler.cache import Result
from handler.decoders import choose_decoder, plain_sampling
from handler.engine import Engine
from handler.engines import load_engine
from handler.errors import RequestError, SetupError
from handler.failures import Failures
from handler.images import open_image
from handler.model_card import InputTransform, ModelCard
from handler.networks import input_transform
from handler.settings import Settings
from service.archive.mar import unpack
from service.replay.archives import Archive
from service.replay.logged import Best

# The limits of the service do not matter: it took the image.
WITHOUT_LIMITS = Settings(max_image_bytes=2**30, max_image_pixels=2**30)
# The engines, by the library that computes, with what each can be asked for.
PRECISIONS = {
    "openvino": ("fp32", "bf16", "int8"),
    "torch": ("fp32", "bf16"),
    "cuda": ("fp32", "bf16", "fp16"),
}


@dataclass(frozen=True)
class Way:
    """How an answer is computed."""

    archive: Archive
    engine: str  # such as "openvino-bf16"; "auto": as a worker here would choose
    decode: str = "exact"  # or "fast"
    recipe: str | None = None  # whose resize and crop are taken; None: the archive's


@dataclass(frozen=True)
class Computed:
    """An answer, and by what it was computed."""

    best: Best
    engine: str  # such as "openvino-bf16"
    decoder: str  # such as "cpu"


@dataclass
class Trials:
    """Computes an image's answers; archives and engines are kept for the next."""

    image: bytes
    folder: Path  # where archives are unpacked
    _unpacked: dict[Path, Path] = field(default_factory=dict)
    _engines: dict[tuple[Path, str], Engine] = field(default_factory=dict)

    def answer(self, way: Way) -> Computed:
        """The top-1 class. Raises SetupError if there is none."""
        card = way.archive.card
        settings = _settings(way)
        engine = self._engine(way, settings)
        transform = other_transforms(card)[way.recipe] if way.recipe else card.transform
        decoder, _ = choose_decoder(transform, settings, engine.device, threads=1)
        batch = Batch(settings, decoder, None, None, Failures({}), lambda: None)
        if card.confidence:
            batch.temperature = card.confidence.temperature
        [image] = batch.open_images([self.image], "replay", classes=0)
        batch.classify(engine)
        if isinstance(image.outcome, RequestError):
            raise SetupError(f"the image is refused: {image.outcome}")
        assert isinstance(image.outcome, Result)  # noqa: S101 - classify() gives one of the two
        [best] = best_classes(image.outcome.probabilities, 1, card.labels)
        found = Best(best["class"], best["confidence"])
        return Computed(found, engine.name, self.decoder_of(decoder.name))

    def decoder_of(self, worker: str) -> str:
        """What a worker with this decoder decodes the image by: a GPU takes plain JPEGs alone."""
        is_plain = plain_sampling(open_image(self.image, WITHOUT_LIMITS))
        return worker if is_plain else "cpu"

    def _engine(self, way: Way, settings: Settings) -> Engine:
        path, key = way.archive.path, (way.archive.path, way.engine)
        if path not in self._unpacked:
            target = self.folder / str(len(self._unpacked))
            self._unpacked[path] = unpack(path, None, target, way.archive.card)
        if key not in self._engines:
            folder = self._unpacked[path]
            self._engines[key] = load_engine(way.archive.card, folder, settings, None, workers=1)
        return self._engines[key]


def alternatives(way: Way, archives: Sequence[Archive]) -> Iterator[tuple[str, str, Way]]:
    """What can be changed by itself: its name, what it becomes, and the way to compute then."""
    decode = "fast" if way.decode == "exact" else "exact"
    yield "decode", decode, replace(way, decode=decode)
    library, _, precision = way.engine.partition("-")
    for other in PRECISIONS[library]:
        if other != precision:
            yield "precision", other, replace(way, engine=f"{library}-{other}")
    for other in PRECISIONS:
        if other != library and precision in PRECISIONS[other]:
            yield "engine", other, replace(way, engine=f"{other}-{precision}")
    for recipe in other_transforms(way.archive.card):
        yield "recipe", recipe, replace(way, recipe=recipe)
    for archive in archives:
        if archive.digest != way.archive.digest:
            text = f"{archive.path} ({archive.card.weights.name}, {archive.card.recipe})"
            yield "archive", text, replace(way, archive=archive)


def other_transforms(card: ModelCard) -> dict[str, InputTransform]:
    """By name, the architecture's other recipes that differ in the resize alone.

    Mean and std are compiled into the archive's models.
    """
    own = card.transform
    found: dict[str, InputTransform] = {}
    for recipe in torchvision.models.get_model_weights(card.architecture):
        other = input_transform(recipe)
        alike = replace(own, resize_size=other.resize_size, interpolation=other.interpolation)
        if other == alike != own and other not in found.values():
            found[str(recipe)] = other
    return found


def _settings(way: Way) -> Settings:
    if way.engine == "auto":
        return replace(WITHOUT_LIMITS, decode=way.decode)
    library, _, precision = way.engine.partition("-")
    device = "cuda" if library == "cuda" else "cpu"
    return replace(
        WITHOUT_LIMITS, decode=way.decode, device=device, engine=library, precision=precision
    )

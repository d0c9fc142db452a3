"""Labelled images through a target: what became of each."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

from handler.errors import SetupError
from service.bulk.report import draw_thumbnail
from service.bulk.sources import Image, read_file
from service.evaluation.targets import Answer, Target

# What the first bytes of a file say; the service goes by them, too, and not by the name.
SIGNATURES = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one image."""

    path: Path
    truth: int  # class index
    classes: tuple[int, ...] = ()  # the likeliest ones, best first; empty if it failed
    confidence: float = 0.0  # of the first
    error: str | None = None  # type
    message: str = ""
    format: str = "other"
    short_side: int | None = None  # pixels
    brightness: float | None = None  # mean of the grey levels, 0 to 255
    set_size: int | None = None  # of the set that holds the truth in most cases, if asked for
    covered: bool = False  # whether that set does
    unknown: bool | None = None  # whether it is unlike all that the model knows, if asked for

    @property
    def is_right(self) -> bool:
        return self.classes[:1] == (self.truth,)


@dataclass
class Run:
    """All images of a target, in the order of their names."""

    target: str
    labels: tuple[str, ...]
    outcomes: list[Outcome] = field(default_factory=list)
    models: Counter[str] = field(default_factory=Counter)  # what the answers say, and how many


def classify_all(target: Target, truths: Mapping[Path, int]) -> Run:
    """Ask about each image. Raises SetupError if the target is lost."""
    run = Run(target.name, target.labels)
    with tqdm(total=len(truths), unit=" images", disable=None) as bar:
        for image, answer in target.answers(_read(truths)):
            path = Path(image.name)
            run.outcomes.append(_outcome(image, answer, truths[path]))
            if answer["status"] == "success":
                run.models[_model(answer["metadata"])] += 1
            bar.update()
    run.outcomes.sort(key=lambda outcome: outcome.path)
    return run


def _read(paths: Mapping[Path, int]) -> Iterator[Image]:
    for path in paths:
        if path.is_file():
            yield read_file(path)
        else:  # a pipe or a device might never end
            yield Image(str(path), problem=("UnreadableFile", "no such file"))


def _model(metadata: Answer) -> str:
    facts = [metadata.get(name) for name in ("model", "version", "weights", "engine", "decode")]
    return "{} {}, weights {}, {}, decode {}".format(*facts)


def _outcome(image: Image, answer: Answer, truth: int) -> Outcome:
    path, kind, light = Path(image.name), _format(image.body), _brightness(image.body)
    if answer["status"] != "success":
        return Outcome(
            path=path,
            truth=truth,
            error=str(answer.get("type")),
            message=str(answer.get("message")),
            format=kind,
            brightness=light,
        )
    try:
        predictions, likely = answer["predictions"], answer.get("set")
        return Outcome(
            path=path,
            truth=truth,
            classes=tuple(int(one["class_id"]) for one in predictions),
            confidence=float(predictions[0]["confidence"]),
            format=kind,
            short_side=min(answer["metadata"]["image_size"]),
            brightness=light,
            set_size=None if likely is None else len(likely),
            covered=likely is not None and any(one["class_id"] == truth for one in likely),
            unknown=answer.get("unknown"),
        )
    except (LookupError, TypeError, ValueError) as exc:
        raise SetupError(f"{path}: the answer is none of this project's services") from exc


def _format(body: bytes) -> str:
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    return next((name for sign, name in SIGNATURES.items() if body.startswith(sign)), "other")


def _brightness(body: bytes) -> float | None:
    """Of the thumbnail; None for an image without one."""
    from PIL import Image as Pillow
    from PIL import ImageStat

    small = draw_thumbnail(body)
    if small is None:
        return None
    with Pillow.open(BytesIO(small)) as image:
        return float(ImageStat.Stat(image.convert("L")).mean[0])

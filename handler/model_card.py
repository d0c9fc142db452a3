"""The facts about a packaged model: written by ./scripts/package, read by every worker."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handler.drift import Reference
from handler.errors import InvalidModel

CARD_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"  # for torch
# For OpenVINO, with the tensors in a .bin beside each; an archive for torch alone has none.
OPENVINO_FILE = "openvino.xml"
INT8_FILE = "openvino-int8.xml"  # only if calibration images were given
UNTRAINED = "untrained"


def file_sha256(path: Path) -> str:
    """In hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class WeightsFacts:
    """Where the weights came from."""

    name: str  # torchvision's name, the file's, a registered model's NAME/VERSION, or "untrained"
    trained: bool
    source: str  # "torchvision", "file", "seed 0", a URL, or mlflow:models:/NAME/VERSION
    sha256: str  # of the file given, else of "{architecture} seed 0 torch {version}"


@dataclass(frozen=True, kw_only=True)
class InputTransform:
    """A recipe's resize, crop and normalisation: V1 weights resize to 256, V2 to 232."""

    resize_size: int  # pixels of the shorter side
    crop_size: int  # pixels of each side of the center crop
    interpolation: str  # "bilinear" or "bicubic"
    antialias: bool
    mean: tuple[float, ...]  # by channel, of values from 0 to 1
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ConfidenceFacts:
    """What --calibrate found out (service/archive/confidence.py)."""

    images: int  # that it was fitted on
    engine: str  # whose answers to them
    temperature: float  # by which logits are divided
    ece_before: float  # expected calibration error over the images, 15 bins
    ece_after: float
    unknown_limit: float  # of a distance; see handler/confidence.py


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What an archive holds besides its code and tensors."""

    architecture: str  # torchvision's builder, e.g. "mobilenet_v2"
    recipe: str  # the torchvision weights entry that the transform is of
    transform: InputTransform
    labels: tuple[str, ...]  # position = class index
    parameters: dict[str, int]  # "total" and "trainable"
    weights: WeightsFacts
    int8: dict[str, Any] | None  # what was measured when the int8 model was made
    inputs_sha256: str  # of everything the archive was made from: decides whether to rebuild
    code_sha256: tuple[str, str]  # of the code among it: of its files, and of what they do
    packaged_with: dict[str, str]  # versions of the libraries that made the archive
    confidence: ConfidenceFacts | None = None  # None: without --calibrate
    reference: Reference | None = None  # likewise
    golden_images: int = 0  # of --golden
    golden_logits: bool = False  # whether the trainer's were given for them
    files: dict[str, str]  # sha256 of each file of the archive, but service.archive.mar.UNHASHED

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelCard":
        """Raises InvalidModel if the text is not a card of this version."""
        try:
            facts = json.loads(text)
            facts["weights"] = WeightsFacts(**facts["weights"])
            facts["labels"] = tuple(facts["labels"])
            facts["code_sha256"] = tuple(facts["code_sha256"])
            facts["files"] = {**facts["files"]}
            transform = facts["transform"]
            transform |= {name: tuple(transform[name]) for name in ("mean", "std")}
            facts["transform"] = InputTransform(**transform)
            if facts.get("confidence") is not None:
                facts["confidence"] = ConfidenceFacts(**facts["confidence"])
            if facts.get("reference") is not None:
                facts["reference"] = Reference.from_facts(facts["reference"])
            return cls(**facts)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise InvalidModel(f"{CARD_FILE} in the archive is not a model card: {exc}") from exc

    @classmethod
    def read(cls, model_dir: Path) -> "ModelCard":
        """The card of an unpacked archive; raises InvalidModel if there is none."""
        try:
            text = (model_dir / CARD_FILE).read_bytes()
        except OSError as exc:
            raise InvalidModel(f"the archive has no {CARD_FILE}: package it again") from exc
        return cls.from_json(text)

    def check_files(self, model_dir: Path) -> None:
        """Raise InvalidModel for the first file that is not as it was packaged, with its name."""
        for name, expected in self.files.items():
            try:
                actual = file_sha256(model_dir / name)
            except OSError as exc:
                raise InvalidModel(f"{name} of the archive cannot be read: {exc.strerror}") from exc
            if actual != expected:
                raise InvalidModel(
                    f"{name} of the archive is not as it was packaged: its sha256 is {actual}, "
                    f"and {CARD_FILE} says {expected}"
                )

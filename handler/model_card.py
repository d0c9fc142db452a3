"""The facts about a packaged model: written by scripts/package.py, read by every worker."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from handler.errors import InvalidModel

CARD_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
UNTRAINED = "untrained"


@dataclass(frozen=True, kw_only=True)
class WeightsFacts:
    """Where the weights came from."""

    name: str  # torchvision's name, the file's name, or "untrained"
    trained: bool
    source: str  # "torchvision", "file" or "seed 0"
    sha256: (
        str  # of the file given; of "{architecture} seed 0 torch {version}" where there was none
    )


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What an archive holds besides its code and tensors."""

    architecture: str  # torchvision's builder, e.g. "mobilenet_v2"
    recipe: str  # the torchvision weights entry whose transforms apply
    labels: tuple[str, ...]  # position = class index
    parameters: dict[str, int]  # "total" and "trainable"
    weights: WeightsFacts
    inputs_sha256: str  # of everything the archive was made from: decides whether to rebuild
    packaged_with: dict[str, str]  # versions of the libraries that made the archive

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelCard":
        """Raises InvalidModel where the text is not a card of this version."""
        try:
            facts = json.loads(text)
            facts["weights"] = WeightsFacts(**facts["weights"])
            facts["labels"] = tuple(facts["labels"])
            return cls(**facts)
        except (ValueError, TypeError, KeyError) as exc:
            raise InvalidModel(f"{CARD_FILE} in the archive is not a model card: {exc}") from exc

    @classmethod
    def read(cls, model_dir: Path) -> "ModelCard":
        """The card of an unpacked archive; raises InvalidModel where there is none."""
        try:
            text = (model_dir / CARD_FILE).read_bytes()
        except OSError as exc:
            raise InvalidModel(f"the archive has no {CARD_FILE}: package it again") from exc
        return cls.from_json(text)

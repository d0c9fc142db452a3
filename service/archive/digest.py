"""What an archive is made from, as one number, and whether an archive is still up to date.

Nothing here needs torch: ./scripts/serve asks before Java starts, and torch takes seconds to load
and would hold its memory for as long as the server runs.
"""

import ast
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from handler.errors import SetupError
from handler.machine import has_gpu
from handler.model_card import UNTRAINED, ModelCard, WeightsFacts, file_sha256
from handler.selection import Hardware, select
from service.plan import PackagePlan
from service.registry.fetching import Origin
from service.torchserve.config import ROOT

CODE = (ROOT / "handler", ROOT / "service" / "archive")  # in an archive, and what makes archives
LIBRARIES = ("torch", "torchvision", "openvino", "torch-model-archiver")
SEED = 0  # of untrained weights


def is_current(plan: PackagePlan) -> bool:
    """Whether the archive of a plan exists, and the same inputs as now have made it.

    Its configuration, which is put in when it is served, may be another. False if there is any
    doubt: packaging then makes the archive, or says what is wrong. Raises InvalidSettings if the
    settings do not go together with an archive that is up to date.
    """
    card, settings = plan.card, plan.settings
    if card is None:
        return False
    weights = _expected_weights(plan, card)
    if weights is None or not (weights.trained or settings.allow_untrained):
        return False
    # Whether CPU and GPU compute in bf16 only packaging can tell; here they do not.
    hardware = Hardware(gpu=0 if has_gpu() else None)
    try:
        select(settings, hardware, converted=plan.holds_openvino, int8=card.int8 is not None)
    except SetupError:
        return False
    try:
        if card.inputs_sha256 != digest(plan, weights):
            return False
    except (OSError, PackageNotFoundError):  # of labels and calibration, which packaging explains
        return False
    plan.check_limits(card.labels)
    return True


def _expected_weights(plan: PackagePlan, card: ModelCard) -> WeightsFacts | None:
    """The weights that an archive would be made with now; None if only packaging can tell.

    Pretrained weights that are packaged already are neither fetched nor looked for again.
    """
    if plan.weights == "untrained":
        return untrained_facts(plan.name)
    if plan.weights in (None, "pretrained"):
        return card.weights if card.weights.source == "torchvision" else None
    try:
        return file_facts(Path(plan.weights), plan.origin)
    except OSError:
        return None


def untrained_facts(architecture: str) -> WeightsFacts:
    """Weights drawn from the seed, known by the words that decide them."""
    words = f"{architecture} seed {SEED} torch {version('torch')}"
    sha256 = hashlib.sha256(words.encode()).hexdigest()
    return WeightsFacts(name=UNTRAINED, trained=False, source=f"seed {SEED}", sha256=sha256)


def file_facts(path: Path, origin: Origin | None = None) -> WeightsFacts:
    """Weights of the user's, and where they were fetched, if they were. Raises OSError."""
    name, source = (origin.name, origin.source) if origin else (path.name, "file")
    return WeightsFacts(name=name, trained=True, source=source, sha256=file_sha256(path))


def digest(plan: PackagePlan, weights: WeightsFacts) -> str:
    """sha256 of everything that an archive is made from.

    Of the configuration, only what decides the rest of the content: configure() puts in the others.
    The recipe's own labels and transforms follow from its name and torchvision's version.
    Raises OSError if a file that the plan names cannot be read, PackageNotFoundError if NNCF or
    scikit-learn is needed and not installed.
    """
    return _sha256(
        {
            "code": code_sha256(plan.card)[1],
            "model": [plan.name, plan.version, plan.recipe],
            "weights": [weights.name, weights.source, weights.sha256],
            "choices": [plan.weights_prefix, plan.transform_input],
            "labels": [plan.labels.suffix, file_sha256(plan.labels)] if plan.labels else None,
            "int8": _calibration_facts(plan),
            "confidence": _confidence_facts(plan),
            "golden": _contents(plan.golden) if plan.golden else None,
            "golden_logits": file_sha256(plan.golden_logits) if plan.golden_logits else None,
            "config": plan.holds_openvino,
            "libraries": {name: version(name) for name in LIBRARIES},
        }
    )


def code_sha256(card: ModelCard | None) -> tuple[str, str]:
    """sha256 of the files of CODE, and of what they do: comments, docstrings and layout left out.

    An archive with an int8 model takes minutes to make, so an edit that changes no behaviour must
    not throw it away. All syntax trees are compared, and not only those of files that the expensive
    part happens to import: no list has to be kept, and no change of behaviour can be missed. If the
    files are those of the card, so is the second number: parsing them takes 0.1 s.
    """
    texts = {
        f"{folder.name}/{path.name}": path.read_text("utf-8")
        for folder in CODE
        for path in folder.glob("*.py")
    }
    files = _sha256(texts)
    if card and card.code_sha256[0] == files:
        return card.code_sha256
    trees = {name: ast.dump(_without_docstrings(ast.parse(text))) for name, text in texts.items()}
    return files, _sha256(trees)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _calibration_facts(plan: PackagePlan) -> list[Any] | None:
    """What decides an int8 model, besides the model itself. Raises OSError."""
    if not plan.calibration:
        return None
    return [plan.minimum_agreement, version("nncf"), *_contents(plan.calibration)]


def _confidence_facts(plan: PackagePlan) -> list[Any] | None:
    """What decides the calibration, besides model and code. Raises OSError."""
    if not plan.calibrate:
        return None
    return [version("scikit-learn"), *_contents(plan.calibrate)]


def _contents(folder: Path) -> list[list[str]]:
    """Name and sha256 of each file of a folder. Raises OSError."""
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    return [[path.name, file_sha256(path)] for path in files]

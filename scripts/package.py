"""Make model_store/{model}.mar: weights and labels in, a self-contained archive out."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torchvision.models import WeightsEnum

from handler.engines import check_precision, choose_device
from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.images import InputTransform
from handler.machine import available_cores
from handler.model_card import CARD_FILE, WEIGHTS_FILE, ModelCard, WeightsFacts
from handler.networks import (
    class_count,
    clean_state_dict,
    empty_network,
    fit_state_dict,
    get_recipe,
)
from handler.settings import Settings
from scripts.options import parse_package
from scripts.torchserve import MODEL_CONFIG_KEYS, read_config, read_number, read_path
from scripts.weights import (
    DownloadFailed,
    Source,
    check_labels,
    find_weights,
    read_labels,
    read_state_dict,
)

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "handler"
MODEL_VERSION = "1.0"
CONFIG_FILE = "model-config.yaml"
LIBRARIES = ("torch", "torchvision", "torch-model-archiver")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_package(argv)
    try:
        store = read_path(read_config(), "model_store")
        for model in args.models:
            archive = package(model, args, store)
            print(f"{archive}  {archive.stat().st_size / 2**20:.1f} MiB")
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


def package(model: str, options: Namespace, out_dir: Path) -> Path:
    """Make the archive of a model, or return the one that the same inputs made before.

    Raises SetupError where settings, weights, labels and model do not go together.
    """
    recipe = get_recipe(model, options.recipe)
    InputTransform.from_recipe(recipe)
    config = model_config(model, options)
    settings = Settings.load(config["handler"])
    check_precision(settings)
    choose_device(settings, gpu_id=None)
    labels = read_labels(Path(options.labels)) if options.labels else recipe.meta["categories"]
    check_limits(settings, config, labels, read_config())
    archive = out_dir / f"{model}.mar"
    source = choose_weights(model, recipe, options.weights)
    if not source.trained and not settings.allow_untrained:
        raise InvalidSettings(
            f"{model} would be untrained, and allow_untrained is false (CLASSIFIER_ENV is "
            f"{settings.env}); give --weights FILE or let pretrained weights be downloaded"
        )
    inputs = _digest(model, str(recipe), labels, source, config)
    if read_digest(archive) == inputs:
        return archive

    state = clean_state_dict(read_state_dict(source, recipe, model), model)
    try:
        classes = class_count(state, recipe, model)
        check_labels(labels, classes, own=bool(options.labels))
        state = fit_state_dict(state, recipe, model, classes)
    except InvalidModel as exc:
        raise InvalidModel(f"{source.path or source.name}: {exc}") from exc
    parameters = [*empty_network(recipe, model, classes).parameters()]
    card = ModelCard(
        architecture=model,
        recipe=str(recipe),
        labels=tuple(labels),
        parameters={
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        },
        weights=WeightsFacts(
            name=source.name, trained=source.trained, source=source.kind, sha256=source.sha256
        ),
        inputs_sha256=inputs,
        packaged_with={name: version(name) for name in LIBRARIES},
    )
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".packaging-") as folder:
            made = _archive(Path(folder), model, card, state, config)
            if not options.weights and not source.trained:
                _keep_trained(archive)
            made.replace(archive)
    except (OSError, SafetensorError) as exc:
        raise SetupError(f"{archive} cannot be written: {exc}") from exc
    return archive


def _keep_trained(archive: Path) -> None:
    """Put an archive of trained weights aside, where untrained ones nobody asked for replace it."""
    card = read_card(archive)
    if card and card.weights.trained:
        aside = archive.with_name(f"{archive.name}.trained")
        archive.replace(aside)
        print(f"warning: the archive with {card.weights.name} is kept as {aside}", file=sys.stderr)


def choose_weights(model: str, recipe: WeightsEnum, choice: str | None) -> Source:
    """The weights asked for; untrained ones where none were and the network gives none."""
    if choice:
        return find_weights(choice, recipe, model)
    try:
        return find_weights("pretrained", recipe, model)
    except DownloadFailed as exc:
        print(
            f"warning: {exc}\n"
            f"warning: {model} is served UNTRAINED: it answers, but its answers mean nothing",
            file=sys.stderr,
            flush=True,
        )
        return find_weights("untrained", recipe, model)


def model_config(model: str, options: Namespace) -> dict[str, Any]:
    """TorchServe's model configuration: default.yaml, the model's own file, then the options.

    Raises InvalidSettings for what TorchServe would ignore: unknown keys, values it has no use for.
    """
    config: dict[str, Any] = {}
    handler: dict[str, Any] = {}
    for name in ("default", model):
        path = HANDLER / "configs" / f"{name}.yaml"
        if path.exists():
            content = _read_yaml(path)
            handler |= content.pop("handler", None) or {}
            config |= content
    if options.batch_size:
        config["batchSize"] = options.batch_size
    if options.max_batch_delay_ms:
        config["maxBatchDelay"] = options.max_batch_delay_ms
    if options.device != "auto":
        config["deviceType"] = "gpu" if options.device == "cuda" else "cpu"
        handler["device"] = options.device
    if options.precision != "auto":
        handler["precision"] = options.precision
    config["handler"] = handler
    settings = Settings.load(handler)
    for name, option in (("device", options.device), ("precision", options.precision)):
        if option not in ("auto", getattr(settings, name)):
            raise InvalidSettings(
                f"--{name} {option} and CLASSIFIER_{name.upper()}={getattr(settings, name)} differ"
            )
    workers = options.workers
    if workers == "auto":
        on_gpu = choose_device(settings, gpu_id=None) != "cpu"
        workers = 1 if on_gpu else available_cores()
    # TorchServe ignores either of the two without the other, and takes one worker a core instead.
    return config | {"minWorkers": workers, "maxWorkers": workers}


def _read_yaml(path: Path) -> dict[str, Any]:
    """A checked file of handler/configs."""
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())
        raise InvalidSettings(f"{path.name} is not valid YAML: {reason}") from exc
    if not isinstance(content, dict):
        raise InvalidSettings(f"{path.name} must be a mapping of settings, got {content!r}")
    for key, value in content.items():
        if key not in MODEL_CONFIG_KEYS:
            known = ", ".join(sorted(MODEL_CONFIG_KEYS))
            raise InvalidSettings(f"{path.name}: {key} is unknown; known: {known}")
        if key == "handler":
            if not isinstance(value, dict | None):
                raise InvalidSettings(
                    f"{path.name}: handler must be a mapping of settings, got {value!r}"
                )
        elif key == "deviceIds":
            if not isinstance(value, list) or not all(type(number) is int for number in value):
                raise InvalidSettings(f"{path.name}: deviceIds must be a list, got {value!r}")
        elif type(value) is not int or value < 1:  # TorchServe takes maxBatchDelay 0 for 100 ms
            raise InvalidSettings(
                f"{path.name}: {key} must be a whole number, 1 or more, got {value!r}"
            )
    return content


def check_limits(
    settings: Settings, config: dict[str, Any], labels: Sequence[str], server: dict[str, str]
) -> None:
    """Raise InvalidSettings where the handler's limits do not fit into TorchServe's.

    The largest answer is that of a full batch of the most images with every class: TorchServe kills
    the worker that exceeds max_response_size.
    """
    image = 1024 + sum(64 + len(label.encode()) for label in labels)  # bytes
    answer = config["batchSize"] * settings.max_images * image
    if answer > (limit := read_number(server, "max_response_size", 6_553_500)):
        raise InvalidSettings(
            f"batchSize {config['batchSize']} x max_images {settings.max_images} x {len(labels)} "
            f"classes may answer {answer} bytes, max_response_size is {limit}"
        )
    if settings.max_image_bytes > (limit := read_number(server, "max_request_size", 6_553_500)):
        raise InvalidSettings(
            f"max_image_bytes is {settings.max_image_bytes}, max_request_size only {limit}"
        )


def _digest(model: str, recipe: str, labels: Sequence[str], source: Source, config: Any) -> str:
    """sha256 of everything that an archive is made from."""
    inputs = {
        "handler": {path.name: path.read_text("utf-8") for path in sorted(HANDLER.glob("*.py"))},
        "model": [model, MODEL_VERSION, recipe, source.name, source.sha256],
        "labels": list(labels),
        "config": config,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_card(archive: Path) -> ModelCard | None:
    """The card of an existing archive; None where there is none or it is damaged."""
    try:
        with zipfile.ZipFile(archive) as content:
            return None if content.testzip() else ModelCard.from_json(content.read(CARD_FILE))
    except Exception:  # zipfile has many words for damage, and the cure is the same: make it again
        return None


def read_digest(archive: Path) -> str | None:
    """What an existing archive was made from; None where there is none or it is damaged."""
    card = read_card(archive)
    return card.inputs_sha256 if card else None


def _archive(
    folder: Path, model: str, card: ModelCard, state: dict[str, torch.Tensor], config: Any
) -> Path:
    """Lay out the files and let torch-model-archiver pack them.

    The archiver flattens what it is given, so the package is staged one level down: the import line
    `from handler.images import …` is then the same in the repository, in tests and in the archive.
    """
    stage = folder / "stage"
    package_dir = stage / "handler"
    package_dir.mkdir(parents=True)
    for path in HANDLER.glob("*.py"):
        shutil.copy(path, package_dir)
    (stage / CARD_FILE).write_text(card.to_json(), "utf-8")
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    command = [
        Path(sys.executable).with_name("torch-model-archiver"),
        *("--model-name", model),
        *("--version", MODEL_VERSION),
        *("--handler", package_dir / "image_classifier.py"),
        *("--serialized-file", folder / WEIGHTS_FILE),
        *("--extra-files", stage),
        *("--config-file", folder / CONFIG_FILE),
        *("--export-path", folder),
        *("--archive-format", "zip-store"),  # tensors do not compress
    ]
    # The archiver works in, and empties, a folder of the model's name in the temporary directory.
    (folder / "tmp").mkdir()
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InvalidModel(f"torch-model-archiver failed: {done.stderr.strip().splitlines()[-1:]}")
    return folder / f"{model}.mar"


if __name__ == "__main__":
    sys.exit(main())

"""What goes into an archive, and whether one is still up to date: all that needs no torch.

./scripts/serve imports this module and not ./scripts/package, because torch takes seconds to load
and its memory would stay for as long as the server runs.
"""

import hashlib
import json
import shutil
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.machine import available_cores, has_gpu
from handler.model_card import CARD_FILE, UNTRAINED, ModelCard, WeightsFacts
from handler.rules import check_mapping
from handler.selection import Hardware, select
from handler.settings import Settings
from service.options import DEFAULT_VERSION
from service.torchserve.server import (
    CONFIG_FILE,
    MODEL_CONFIG,
    ROOT,
    dump_config,
    read_config,
    read_number,
    usable_gpus,
)
from service.tuning.tuned import find_tuned

HANDLER = ROOT / "handler"
MAKERS = ROOT / "service" / "archive"
LIBRARIES = ("torch", "torchvision", "openvino", "torch-model-archiver")
SEED = 0  # of untrained weights


def find_current(model: str, options: Namespace, store: Path) -> Path | None:
    """The archive of a model, where the same inputs as now have made it.

    Its configuration, which is put in when it is served, may be another. None where there is any
    doubt: ./scripts/package then makes the archive, or says what is wrong. Raises InvalidSettings
    where settings do not go together with an archive that is up to date.
    """
    archive = archive_path(model, options, store)
    card = read_card(archive)
    if card is None:
        return None
    config = model_config(model, options)
    settings = Settings.load(config["handler"])
    weights = _expected_weights(model, options.weights, card)
    if weights is None or not (weights.trained or settings.allow_untrained):
        return None
    # Whether CPU and GPU compute in bf16 only packaging can tell; here they do not.
    hardware = Hardware(gpu=0 if has_gpu() else None)
    try:
        select(settings, hardware, converted=has_openvino(config), int8=card.int8 is not None)
    except SetupError:
        return None
    try:
        current = card.inputs_sha256 == digest(model, options, config, weights)
    except (OSError, PackageNotFoundError):  # of labels and calibration, which packaging explains
        return None
    if not current:
        return None
    check_limits(settings, config, card.labels, read_config())
    return archive


def archive_path(model: str, options: Namespace, store: Path) -> Path:
    """Where the archive of a model is: versions that are not the default have it in the name."""
    other = options.version != DEFAULT_VERSION
    return store / (f"{model}-{options.version}.mar" if other else f"{model}.mar")


def read_target(archive: Path) -> str:
    """The name and version, as MODEL/VERSION, that an archive is served under.

    Raises InvalidModel where it is no archive.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            model = json.loads(content.read("MAR-INF/MANIFEST.json"))["model"]
            return f"{model['modelName']}/{model['modelVersion']}"
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as exc:
        raise InvalidModel(f"{archive} cannot be read as a model archive") from exc


def _expected_weights(model: str, choice: str | None, card: ModelCard) -> WeightsFacts | None:
    """The weights that an archive would be made with now; None where only packaging can tell.

    Pretrained weights that are packaged already are neither fetched nor looked for again.
    """
    if choice == "untrained":
        return untrained_facts(model)
    if choice in (None, "pretrained"):
        return card.weights if card.weights.source == "torchvision" else None
    try:
        return file_facts(Path(choice))
    except OSError:
        return None


def untrained_facts(architecture: str) -> WeightsFacts:
    """Weights drawn from the seed, known by the words that decide them."""
    words = f"{architecture} seed {SEED} torch {version('torch')}"
    sha256 = hashlib.sha256(words.encode()).hexdigest()
    return WeightsFacts(name=UNTRAINED, trained=False, source=f"seed {SEED}", sha256=sha256)


def file_facts(path: Path) -> WeightsFacts:
    """Weights of the user's. Raises OSError."""
    return WeightsFacts(name=path.name, trained=True, source="file", sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    """Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def digest(model: str, options: Namespace, config: dict[str, Any], weights: WeightsFacts) -> str:
    """sha256 of everything that an archive is made from; `config` is what model_config gives.

    Of the configuration, only what decides the rest of the content: configure() does the others.
    The recipe's own labels and transforms follow from its name and torchvision's version.
    Raises OSError where labels or calibration images cannot be read, PackageNotFoundError where
    NNCF is needed and not installed.
    """
    labels = Path(options.labels) if options.labels else None
    inputs = {
        "code": {path.name: path.read_text("utf-8") for path in _code()},
        "model": [model, options.version, options.recipe, weights.name, weights.sha256],
        "choices": [options.weights_prefix, options.transform_input],
        "labels": [labels.suffix, file_sha256(labels)] if labels else None,
        "int8": _calibration_facts(options),
        "config": has_openvino(config),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _code() -> list[Path]:
    """What is put into an archive, and what decides the models in it."""
    makers = """
        packaging weights checkpoints fitting labels conversion calibration quantization saturation
    """
    return [*sorted(HANDLER.glob("*.py")), *(MAKERS / f"{name}.py" for name in makers.split())]


def _calibration_facts(options: Namespace) -> list[Any] | None:
    """What decides an int8 model, besides the model itself. Raises OSError."""
    if not options.calibration:
        return None
    files = sorted(
        path
        for path in Path(options.calibration).iterdir()
        if path.is_file() and not path.name.startswith(".")
    )
    contents = [[path.name, file_sha256(path)] for path in files]
    return [options.minimum_agreement, version("nncf"), *contents]


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


def has_openvino(config: dict[str, Any]) -> bool:
    """Whether an archive with this configuration holds the model for OpenVINO."""
    engine = config.get("handler", {}).get("engine", "auto")
    return engine in ("auto", "openvino") and config.get("deviceType") != "gpu"


def configure(archive: Path, config: dict[str, Any]) -> None:
    """Put a configuration into an archive, where it has another. Raises SetupError."""
    with zipfile.ZipFile(archive) as old:
        if yaml.safe_load(old.read(CONFIG_FILE)) == config:
            return
        try:
            with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".packaging-") as folder:
                made = Path(folder, archive.name)
                with zipfile.ZipFile(made, "w") as new:
                    for item in old.infolist():
                        if item.filename == CONFIG_FILE:
                            new.writestr(item, dump_config(config))
                        else:  # piece by piece: the launcher stays small
                            with old.open(item) as source, new.open(item, "w") as target:
                                shutil.copyfileobj(source, target)
                made.replace(archive)
        except OSError as exc:
            raise SetupError(f"{archive} cannot be written: {exc}") from exc


def model_config(model: str, options: Namespace) -> dict[str, Any]:
    """TorchServe's model configuration: default.yaml, the model's own, `--tuned`, the options.

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
    asked = options
    if tuned := find_tuned(model, options):
        handler |= asdict(tuned.handler)
        options = tuned.fill_in(options)
    return _under_options(config | {"handler": handler}, options, asked)


def given_config(archive: Path, options: Namespace) -> dict[str, Any]:
    """The configuration of an archive that is given: its own, the options of this start.

    Raises InvalidModel for an archive of others', InvalidSettings where its own settings, those of
    the start and its labels do not go together.
    """
    card = read_card(archive)
    if card is None:
        raise InvalidModel(f"{archive} is damaged, or was not made by ./scripts/package")
    with zipfile.ZipFile(archive) as content:
        config = yaml.safe_load(content.read(CONFIG_FILE))
    config = _under_options(config, options, options)
    settings = Settings.load(config["handler"])
    if not (card.weights.trained or settings.allow_untrained):
        raise InvalidSettings(
            f"{archive.name} is untrained, and allow_untrained is false (CLASSIFIER_ENV is "
            f"{settings.env})"
        )
    check_limits(settings, config, card.labels, read_config())
    return config


def _under_options(config: dict[str, Any], options: Namespace, asked: Namespace) -> dict[str, Any]:
    """A configuration with options over it; `asked` are those that were given, not tuned."""
    config, handler = dict(config), dict(config["handler"])
    if options.batch_size:
        config["batchSize"] = options.batch_size
    if options.max_batch_delay_ms:
        config["maxBatchDelay"] = options.max_batch_delay_ms
    if options.device != "auto":
        config["deviceType"] = "gpu" if options.device == "cuda" else "cpu"
        handler["device"] = options.device
    if options.device_ids:
        config["deviceIds"] = [int(word) for word in options.device_ids.split(",")]
    if options.precision != "auto":
        handler["precision"] = options.precision
    config["handler"] = handler
    settings = Settings.load(handler)
    for name, option in (("device", asked.device), ("precision", asked.precision)):
        if option not in ("auto", getattr(settings, name)):
            raise InvalidSettings(
                f"--{name} {option} and CLASSIFIER_{name.upper()}={getattr(settings, name)} differ"
            )
    workers = asked.workers if asked.workers_per_gpu else options.workers
    if workers == "auto":
        gpus = 0 if settings.device == "cpu" else usable_gpus(read_config())
        used = len(config.get("deviceIds", range(gpus))) if gpus else 0
        workers = workers_for(used, options.workers_per_gpu)
    # TorchServe ignores either of the two without the other, and takes one worker a core instead.
    return config | {"minWorkers": workers, "maxWorkers": workers}


def workers_for(gpus: int, per_gpu: int | None = None) -> int:
    """How many workers a model has where nobody says: one a core, or some on each GPU.

    Several on a GPU, so that one decodes while another computes. Decoding takes cores, so there is
    no more of them than cores; each holds a model and a CUDA context, so there are 4 at most.
    """
    cores = available_cores()
    if gpus == 0:
        return cores
    return gpus * (per_gpu or max(1, min(4, cores // gpus)))


def check_device_ids(config: dict[str, Any], gpus: int) -> None:
    """Raise InvalidSettings for a GPU that is not there: TorchServe would ignore the whole list.

    The ids are positions among the visible GPUs, as torch counts them.
    """
    for number in config.get("deviceIds", ()) if gpus else ():
        if not 0 <= number < gpus:
            raise InvalidSettings(f"deviceIds must be 0 to {gpus - 1}, the GPUs here, got {number}")


def _read_yaml(path: Path) -> dict[str, Any]:
    """A checked file of handler/configs."""
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())
        raise InvalidSettings(f"{path.name} is not valid YAML: {reason}") from exc
    try:
        return check_mapping(MODEL_CONFIG, content)
    except InvalidSettings as exc:
        raise InvalidSettings(f"{path.name}: {exc}") from exc


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

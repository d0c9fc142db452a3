"""Make the archive of a model: weights and labels in, a self-contained .mar out."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import openvino
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from handler.confidence import CONFIDENCE_FILE
from handler.drift import Reference
from handler.engines import find_hardware
from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.golden import Golden, limit_of
from handler.model_card import (
    INT8_FILE,
    OPENVINO_FILE,
    WEIGHTS_FILE,
    InputTransform,
    ModelCard,
)
from handler.networks import empty_network, get_recipe, input_transform, load_state
from handler.selection import select
from service.archive.calibration import CalibrationSet, read_calibration
from service.archive.confidence import Fitted, fit, read_labelled
from service.archive.conversion import check_conversion, compare, to_openvino
from service.archive.digest import LIBRARIES, code_sha256, digest, is_current
from service.archive.fitting import fit_checkpoint, two_outputs
from service.archive.golden import DRAWN, make_golden
from service.archive.labels import check_labels, read_labels
from service.archive.mar import CONFIG_FILE, configure, dump_config, seal, sign
from service.archive.quantization import check_images, import_nncf, quantize
from service.archive.reference import reference_of
from service.archive.replacing import make_way
from service.archive.signing import read_private_key
from service.archive.trainer import check_decoding, check_given, check_trainer, read_images
from service.archive.weights import (
    DownloadFailed,
    Source,
    find_weights,
    read_weights,
    scales_input_again,
)
from service.plan import PackagePlan
from service.processes import Guardian
from service.temporary import TemporaryFolder
from service.torchserve.config import ROOT

HANDLER = ROOT / "handler"


@dataclass(frozen=True)
class Model:
    """A network with its weights in it, and what it takes."""

    network: nn.Module
    state: dict[str, Tensor]
    transform: InputTransform


def package_from(stream: BinaryIO) -> int:
    """Make the archives whose plans another process of ours has pickled; the exit status."""
    return package_all(pickle.load(stream))  # noqa: S301 - service/serving.py writes it


def package_all(plans: Sequence[PackagePlan]) -> int:
    """Make archives, with their sizes on stdout and what is wrong on stderr; the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half made is cleaned up
    os.environ["CI"] = "true"  # or OpenVINO's converter reports its use to its makers
    try:
        keys = [read_private_key(plan.sign) if plan.sign else None for plan in plans]
        for plan, key in zip(plans, keys, strict=True):
            archive = package(plan)
            if key:
                sign(archive, key)
            print(f"{archive}  {archive.stat().st_size / 2**20:.1f} MiB")
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def package(plan: PackagePlan) -> Path:
    """Make the archive of a model, or leave the one that the same inputs made before.

    Raises SetupError if settings, weights, labels and model do not go together.
    """
    if is_current(plan):
        configure(plan.archive, plan.config)
        return plan.archive
    recipe = get_recipe(plan.name, plan.recipe)
    transform = input_transform(recipe)
    check_precision(plan)
    labels = read_labels(plan.labels) if plan.labels else recipe.meta["categories"]
    plan.check_limits(labels)
    calibration = check_calibration(plan, transform)
    labelled = read_labelled(plan, transform, len(labels))
    check_given(plan.golden, plan.golden_logits)
    source = choose_weights(plan, recipe)
    inputs = digest(plan, source.facts)
    if plan.card and plan.card.inputs_sha256 == inputs:
        configure(plan.archive, plan.config)
        return plan.archive
    check_writable(plan.archive)
    model = build_model(plan, recipe, source, labels)
    golden = make_reference(plan, recipe, model, labels)
    converted, int8_report = convert(plan, model, golden, calibration)
    served = without_refused(converted, golden)
    fitted = fit(model.network, model.transform, served, labelled) if labelled else None
    reference = None
    if labelled and fitted:
        reference = reference_of(labelled, fitted.probabilities, fitted.distances)
    card = make_card(
        plan, recipe, labels, source, model, golden, int8_report, fitted, reference, inputs
    )
    write_archive(plan, card, model, converted, golden, fitted)
    return plan.archive


def check_precision(plan: PackagePlan) -> None:
    """Raise SetupError for what cannot be packaged, or served on this machine."""
    engine = plan.settings.engine  # the environment's; holds_openvino goes by the file's
    if plan.calibration and not (plan.holds_openvino and engine in ("auto", "openvino")):
        raise InvalidSettings("--calibration makes an int8 model, which only runs on a CPU")
    converted, int8 = plan.holds_openvino, plan.calibration is not None
    select(plan.settings, find_hardware(), converted=converted, int8=int8)


def check_calibration(plan: PackagePlan, transform: InputTransform) -> CalibrationSet | None:
    """The calibration images, if any are given and there are enough. Raises SetupError."""
    if not plan.calibration:
        return None
    import_nncf()
    calibration = read_calibration(plan.calibration, transform, plan.settings)
    check_images(calibration.images, calibration.labels)
    return calibration


def choose_weights(plan: PackagePlan, recipe: WeightsEnum) -> Source:
    """The weights asked for; untrained ones if none were and none can be downloaded.

    Raises InvalidModel, and InvalidSettings if untrained weights may not be served.
    """
    try:
        source = find_weights(plan.weights or "pretrained", recipe, plan.name, plan.origin)
    except DownloadFailed as exc:
        if plan.weights:
            raise
        _warn(str(exc))
        source = find_weights("untrained", recipe, plan.name)
    if not source.facts.trained and not plan.settings.allow_untrained:
        raise InvalidSettings(
            f"{plan.name} would be untrained, and allow_untrained is false (CLASSIFIER_ENV is "
            f"{plan.settings.env}); give --weights FILE or let pretrained weights be downloaded"
        )
    if not source.facts.trained and not plan.weights:
        _warn(f"{plan.name} is UNTRAINED: it answers, but its answers mean nothing")
    return source


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def check_writable(archive: Path) -> None:
    """Raise SetupError now, and not after minutes of converting and measuring."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=archive.parent).close()
    except OSError as exc:
        raise SetupError(f"{archive} has to be made, and cannot be written: {exc}") from exc


def build_model(
    plan: PackagePlan, recipe: WeightsEnum, source: Source, labels: Sequence[str]
) -> Model:
    """The network with the weights in it. Raises InvalidModel if weights or labels do not fit."""
    checkpoint = read_weights(source, recipe, plan.name)
    try:
        fit = fit_checkpoint(checkpoint, recipe, plan.name, plan.weights_prefix)
        if fit.classes == 1:
            fit = two_outputs(fit, labels)
        check_labels(labels, fit.classes, own=plan.labels is not None)
        again = scales_input_again(
            source, recipe, plan.name, plan.transform_input, fit.has_auxiliary
        )
    except InvalidModel as exc:
        raise InvalidModel(f"{source.path or source.facts.name}: {exc}") from exc
    for note in fit.notes:
        print(f"{source.facts.name}: {note}", file=sys.stderr)
    network = empty_network(recipe, plan.name, fit.classes)
    load_state(network, fit.state)
    return Model(network, fit.state, input_transform(recipe, transform_input=again))


def make_reference(
    plan: PackagePlan, recipe: WeightsEnum, model: Model, labels: Sequence[str]
) -> Golden:
    """The golden images with what the recipe's own transforms and the network make of them.

    Raises InvalidModel if the network's answers are no numbers, or not those that the trainer gave,
    and for an image of the trainer's with which no worker would start.
    """
    transform = model.transform
    preset = recipe.transforms(mean=transform.mean, std=transform.std)
    files = read_images(plan.golden) if plan.golden else {}
    golden = make_golden(model.network, preset, labels, files)
    if plan.golden:
        check_decoding(golden.only([*files]), transform)
        check_trainer(plan.golden, plan.golden_logits, golden, labels, model.network, preset)
    return golden


def convert(
    plan: PackagePlan, model: Model, golden: Golden, calibration: CalibrationSet | None
) -> tuple[dict[str, openvino.Model], dict[str, Any] | None]:
    """The models for OpenVINO, by their files in the archive, and the report of int8.

    There is no model if the archive is for torch alone, and none in int8 without images for it.
    Raises InvalidModel if OpenVINO gives other answers to the golden images, or int8 is not
    accurate enough.
    """
    if not plan.holds_openvino:
        return {}, None
    fp32 = to_openvino(model.network, model.transform)
    check_conversion(fp32, golden)
    if calibration is None:
        return {OPENVINO_FILE: fp32}, None
    int8, report = quantize(fp32, calibration.images, calibration.labels, plan.minimum_agreement)
    return {OPENVINO_FILE: fp32, INT8_FILE: int8}, asdict(report)


def without_refused(
    converted: Mapping[str, openvino.Model], golden: Golden
) -> Mapping[str, openvino.Model]:
    """The models that workers take by themselves: not int8 if its answers are others, with a word.

    The archive holds it all the same, for `--precision int8`.
    """
    if INT8_FILE not in converted:
        return converted
    found = compare(converted[INT8_FILE], golden)
    if found.fits(limit_of("int8")):
        return converted
    _warn(
        f"int8 gives other answers to the golden images ({found.describe()}): --precision auto "
        "takes a finer precision, and --calibrate fits on fp32"
    )
    return {name: model for name, model in converted.items() if name != INT8_FILE}


def make_card(
    plan: PackagePlan,
    recipe: WeightsEnum,
    labels: Sequence[str],
    source: Source,
    model: Model,
    golden: Golden,
    int8_report: dict[str, Any] | None,
    fitted: Fitted | None,
    reference: Reference | None,
    inputs_sha256: str,
) -> ModelCard:
    parameters = [*model.network.parameters()]
    return ModelCard(
        architecture=plan.name,
        recipe=str(recipe),
        transform=model.transform,
        labels=tuple(labels),
        parameters={
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        },
        weights=source.facts,
        int8=int8_report,
        confidence=fitted.facts if fitted else None,
        reference=reference,
        golden_images=len(golden.files) - len(DRAWN),
        golden_logits=plan.golden_logits is not None,
        inputs_sha256=inputs_sha256,
        code_sha256=code_sha256(plan.card),
        packaged_with={name: version(name) for name in LIBRARIES},
        files={},  # seal() lists them
    )


def write_archive(
    plan: PackagePlan,
    card: ModelCard,
    model: Model,
    converted: Mapping[str, openvino.Model],
    golden: Golden,
    fitted: Fitted | None,
) -> None:
    """Put the archive in its place, whole or not at all. Raises SetupError."""
    archive = plan.archive
    try:
        with TemporaryFolder(".packaging-", archive.parent) as folder, Guardian(folder):
            made = _archive(folder, plan, card, model, converted, golden, fitted)
            for warning in make_way(archive, card, named=plan.weights is not None):
                _warn(warning)
            made.replace(archive)
    except (OSError, SafetensorError) as exc:
        raise SetupError(f"{archive} cannot be written: {exc}") from exc


def _archive(
    folder: Path,
    plan: PackagePlan,
    card: ModelCard,
    model: Model,
    converted: Mapping[str, openvino.Model],
    golden: Golden,
    fitted: Fitted | None,
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
    save_file(model.state, folder / WEIGHTS_FILE)
    golden.write(stage)
    if fitted:
        save_numpy(fitted.arrays, stage / CONFIDENCE_FILE)
    for name, openvino_model in converted.items():
        openvino.save_model(openvino_model, stage / name, compress_to_fp16=False)
    (folder / CONFIG_FILE).write_text(dump_config(plan.config), "utf-8")
    command = [
        Path(sys.executable).with_name("torch-model-archiver"),
        *("--model-name", plan.name),
        *("--version", plan.version),
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
    made = folder / f"{plan.name}.mar"
    seal(made, card)
    return made

"""Make model_store/{model}.mar: weights and labels in, a self-contained archive out."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openvino
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torchvision.models import WeightsEnum

from handler.engines import find_hardware
from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.model_card import CARD_FILE, INT8_FILE, OPENVINO_FILE, WEIGHTS_FILE, ModelCard
from handler.networks import empty_network, get_recipe, input_transform, load_state
from handler.selection import select
from handler.settings import Settings
from service.archive.calibration import read_calibration
from service.archive.conversion import check_answers, to_openvino
from service.archive.fitting import fit_checkpoint, two_outputs
from service.archive.labels import check_labels, read_labels
from service.archive.quantization import check_images, import_nncf, quantize
from service.archive.store import (
    HANDLER,
    LIBRARIES,
    archive_path,
    check_limits,
    configure,
    digest,
    find_current,
    has_openvino,
    model_config,
    read_card,
    read_digest,
)
from service.archive.weights import (
    DownloadFailed,
    Source,
    find_weights,
    read_weights,
    scales_input_again,
)
from service.options import parse_package
from service.processes import Guardian
from service.torchserve.server import CONFIG_FILE, dump_config, read_config, read_path
from service.tuning.tuned import describe_differences


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_package(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half made is cleaned up
    os.environ["CI"] = "true"  # or OpenVINO's converter reports its use to its makers
    try:
        store = read_path(read_config(), "model_store")
        for model in args.models:
            for line in describe_differences(model, args):
                print(line, file=sys.stderr)
            archive = package(model, args, store)
            print(f"{archive}  {archive.stat().st_size / 2**20:.1f} MiB")
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def package(model: str, options: Namespace, out_dir: Path) -> Path:
    """Make the archive of a model, or return the one that the same inputs made before.

    Raises SetupError where settings, weights, labels and model do not go together.
    """
    current = find_current(model, options, out_dir)
    if current is not None:
        configure(current, model_config(model, options))
        return current
    recipe = get_recipe(model, options.recipe)
    transform = input_transform(recipe)
    config = model_config(model, options)
    settings = Settings.load(config["handler"])
    for_openvino = has_openvino(config)
    if options.calibration and not (for_openvino and settings.engine in ("auto", "openvino")):
        raise InvalidSettings("--calibration makes an int8 model, which only runs on a CPU")
    select(settings, find_hardware(), converted=for_openvino, int8=bool(options.calibration))
    labels = read_labels(Path(options.labels)) if options.labels else recipe.meta["categories"]
    check_limits(settings, config, labels, read_config())
    calibration = None
    if options.calibration:
        import_nncf()
        calibration = read_calibration(Path(options.calibration), transform, settings)
        check_images(calibration.images, calibration.labels)
    archive = archive_path(model, options, out_dir)
    source = choose_weights(model, recipe, options.weights)
    if not source.facts.trained and not settings.allow_untrained:
        raise InvalidSettings(
            f"{model} would be untrained, and allow_untrained is false (CLASSIFIER_ENV is "
            f"{settings.env}); give --weights FILE or let pretrained weights be downloaded"
        )
    inputs = digest(model, options, config, source.facts)
    if read_digest(archive) == inputs:
        configure(archive, config)
        return archive

    _check_writable(archive)
    checkpoint = read_weights(source, recipe, model)
    try:
        fit = fit_checkpoint(checkpoint, recipe, model, options.weights_prefix)
        if fit.classes == 1:
            fit = two_outputs(fit, labels)
        check_labels(labels, fit.classes, own=bool(options.labels))
        again = scales_input_again(
            source, recipe, model, options.transform_input, fit.has_auxiliary
        )
    except InvalidModel as exc:
        raise InvalidModel(f"{source.path or source.facts.name}: {exc}") from exc
    for note in fit.notes:
        print(f"{source.facts.name}: {note}", file=sys.stderr)
    transform = input_transform(recipe, transform_input=again)
    network = empty_network(recipe, model, fit.classes)
    load_state(network, fit.state)
    parameters = [*network.parameters()]
    converted, int8, report = None, None, None
    if not has_openvino(config):
        check_answers(network, transform)
    else:
        converted = to_openvino(network, transform)
        if calibration:
            int8, report = quantize(
                converted, calibration.images, calibration.labels, options.minimum_agreement
            )
    card = ModelCard(
        architecture=model,
        recipe=str(recipe),
        transform=transform,
        labels=tuple(labels),
        parameters={
            "total": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        },
        weights=source.facts,
        int8=asdict(report) if report else None,
        inputs_sha256=inputs,
        packaged_with={name: version(name) for name in LIBRARIES},
    )
    try:
        packaging = tempfile.TemporaryDirectory(dir=out_dir, prefix=".packaging-")
        with packaging as folder, Guardian(folder):
            made = _archive(
                Path(folder),
                model,
                options.version,
                card,
                fit.state,
                {OPENVINO_FILE: converted, INT8_FILE: int8},
                config,
            )
            if not options.weights and not source.facts.trained:
                _keep_trained(archive)
            if int8 is None and (old := read_card(archive)) and old.int8:
                print(
                    f"warning: {archive.name} had an int8 model; --calibration DIR makes it again",
                    file=sys.stderr,
                )
            made.replace(archive)
    except (OSError, SafetensorError) as exc:
        raise SetupError(f"{archive} cannot be written: {exc}") from exc
    return archive


def _check_writable(archive: Path) -> None:
    """Raise SetupError now, and not after minutes of converting and measuring."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=archive.parent).close()
    except OSError as exc:
        raise SetupError(f"{archive} has to be made, and cannot be written: {exc}") from exc


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


def _archive(
    folder: Path,
    model: str,
    version: str,
    card: ModelCard,
    state: dict[str, torch.Tensor],
    converted: Mapping[str, openvino.Model | None],
    config: Any,
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
    for name, openvino_model in converted.items():
        if openvino_model:
            openvino.save_model(openvino_model, stage / name, compress_to_fp16=False)
    (folder / CONFIG_FILE).write_text(dump_config(config), "utf-8")
    command = [
        Path(sys.executable).with_name("torch-model-archiver"),
        *("--model-name", model),
        *("--version", version),
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

"""What a trainer gives with the weights, golden images, logits and names: whether ours agree."""

import csv
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from handler.certificate import MAX_DIFFERENCE, decode
from handler.decoders import CpuDecoder
from handler.diagnosis import NORMALISATIONS, distance, plain_image
from handler.engine import Sameness
from handler.errors import InvalidModel
from handler.golden import Golden
from handler.model_card import InputTransform
from handler.settings import Settings
from service.archive.calibration import LABELS_FILE
from service.archive.golden import reference_logits

MAX_IMAGES = 32  # each is another forward pass of every start
MAX_BYTES = 2**20  # of each
MAX_LOGITS_BYTES = 2**26
# Of the trainer's logits. With MobileNetV2 and 10 photos, torch's resize in place of Pillow's gives
# 0.03, a JPEG decoder set for speed 0.06, and the least of the faults below, bicubic, 0.11.
MAX_ERROR = 0.08
FEW = 8  # images with which a fault is looked for
LEAST_NAMES = 3  # that have to fit one class further: one alone can do so by chance
SORTED = 0.05  # logits, between those of an image in order


def check_given(folder: Path | None, logits: Path | None) -> None:
    """Raise InvalidModel now, and not after the model is made, for files that cannot be read."""
    if folder:
        read_images(folder)
    if logits and not logits.is_file():
        raise InvalidModel(f"--golden-logits {logits}: there is no such file")


def read_images(folder: Path) -> dict[str, bytes]:
    """The encoded images of --golden by name, in the order of their names. Raises InvalidModel."""
    try:
        paths = sorted(
            path
            for path in folder.iterdir()
            if path.name != LABELS_FILE and not path.name.startswith(".")
        )
        if not 0 < len(paths) <= MAX_IMAGES:
            raise InvalidModel(f"--golden {folder} has {len(paths)} images, not 1 to {MAX_IMAGES}")
        for path in paths:
            if path.stat().st_size > MAX_BYTES:
                raise InvalidModel(f"--golden {path} has more than {MAX_BYTES} bytes")
        return {path.name: path.read_bytes() for path in paths}
    except OSError as exc:
        raise InvalidModel(f"--golden {folder} cannot be read: {exc.strerror}") from exc


def check_decoding(golden: Golden, transform: InputTransform) -> None:
    """Raise InvalidModel for an image with which no worker would start.

    `golden` are the trainer's images alone. Pillow reads formats that are not served, and some
    transparent colours otherwise.
    """
    try:
        pixels = decode(golden, CpuDecoder(transform), Settings())
    except InvalidModel as exc:
        raise InvalidModel(f"--golden, {exc}") from exc
    for name, ours, expected in zip(golden.files, pixels, golden.pixels, strict=True):
        if (off := distance(ours, expected)) > MAX_DIFFERENCE:
            raise InvalidModel(
                f"--golden, decoder: its pixels of {name} differ from Pillow's by {off:.2f} levels "
                "of 255 on average; give the image in another form, such as 8-bit RGB"
            )


def check_names(folder: Path, golden: Golden, labels: Sequence[str]) -> None:
    """Raise InvalidModel if the names in labels.csv would fit better one class further.

    The names are of what is in the images, and the model may be wrong about some. So a mistake is
    told by other names fitting better: a list that begins with `background` moves all by one.
    """
    path = folder / LABELS_FILE
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = {row["file"]: row["label"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as exc:
        raise InvalidModel(f"--golden {path} must have the columns file and label") from exc
    best = dict(zip(golden.files, golden.logits.argmax(dim=1).tolist(), strict=True))
    for name in names:
        if name not in best:
            raise InvalidModel(f"--golden {path} has {name!r}, and the folder has no such image")

    def right(shift: int) -> int:
        return sum(
            labels[(best[name] + shift) % len(labels)] == label for name, label in names.items()
        )

    shift = max((0, 1, -1), key=right)
    if shift and right(shift) >= max(LEAST_NAMES, len(names) / 2):
        raise InvalidModel(
            f"labels: {right(0)} of {len(names)} golden images have their name, and with the names "
            f"of the classes {shift:+d} {right(shift)} would; correct --labels"
        )


def read_logits(path: Path, names: Sequence[str]) -> Tensor:
    """The trainer's logits float32 [N, C] for the images of these names. Raises InvalidModel.

    .npy: [N, C] in the order of the names; .safetensors: a tensor [C] for each name; .csv: a name
    and C numbers in each line.
    """
    try:
        if path.stat().st_size > MAX_LOGITS_BYTES:
            raise ValueError(f"it has more than {MAX_LOGITS_BYTES} bytes")
        match path.suffix:
            case ".npy":
                found = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
            case ".safetensors":
                tensors = load_file(path)
                found = torch.stack([tensors[name].float() for name in names])
            case ".csv":
                with path.open(encoding="utf-8-sig", newline="") as file:
                    rows = {row[0]: row[1:] for row in csv.reader(file) if row}
                found = torch.tensor([[float(value) for value in rows[name]] for name in names])
            case _:
                raise ValueError("its name must end in .npy, .safetensors or .csv")
        if found.ndim != 2 or len(found) != len(names):
            raise ValueError(f"its shape is {[*found.shape]}, and there are {len(names)} images")
    except KeyError as exc:
        raise InvalidModel(f"--golden-logits {path}: there are none for {exc.args[0]}") from exc
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, csv.Error) as exc:
        raise InvalidModel(f"--golden-logits {path}: {exc}") from exc
    return found


def check_logits(
    golden: Golden, theirs: Tensor, network: nn.Module, preset: ImageClassification
) -> None:
    """Raise InvalidModel, with the stage, if the trainer's logits are not those of the reference.

    `golden` are the trainer's images alone.
    """
    if theirs.shape[1] == 1 and golden.logits.shape[1] == 2:  # as in fitting.two_outputs
        theirs = torch.cat([torch.zeros_like(theirs), theirs], dim=1)
    if golden.judge(theirs.softmax(dim=1)).fits(MAX_ERROR):
        return
    if theirs.shape != golden.logits.shape:
        raise InvalidModel(
            f"--golden-logits, labels: they are of {theirs.shape[1]} classes, the network has "
            f"{golden.logits.shape[1]}"
        )
    raise InvalidModel(f"--golden-logits, {fault(golden, theirs, network, preset)}")


def fault(golden: Golden, theirs: Tensor, network: nn.Module, preset: ImageClassification) -> str:
    """The stage in which the trainer's logits are others, by a few of the images."""
    few = golden.only([*golden.files][:FEW])
    images = [plain_image(data) for data in few.files.values()]
    expected = theirs[:FEW].softmax(dim=1)

    def judge(prepare: Prepare) -> Sameness:
        logits = reference_logits(network, prepare, images)
        return Golden(few.files, few.pixels, logits, few.labels).judge(expected)

    known = dict(variants(preset))
    found = {stage: judge(prepare) for stage, prepare in known.items()}
    stage = min(found, key=lambda stage: found[stage].error)
    if found[stage].fits(MAX_ERROR):
        return stage
    if theirs.sort(dim=1)[0].allclose(golden.logits.sort(dim=1)[0], atol=SORTED):
        return "labels: the trainer's classes are in another order"
    return (
        "weights: the trainer's network is another, or gets its input in a way that is not known "
        f"here ({golden.judge(theirs.softmax(dim=1)).describe()})"
    )


Prepare = Callable[[Image.Image], Tensor]


def variants(preset: ImageClassification) -> Iterator[tuple[str, Prepare]]:
    """What trainers do otherwise, by its words: an image to the network's input [3, H, W]."""
    yield "channel order: the trainer's are of BGR", lambda image: preset(_bgr(image))
    for mean, std in NORMALISATIONS:
        other = copy(preset)
        other.mean, other.std = [*mean], [*std]
        yield f"normalisation: the trainer's have mean {mean} and std {std}", other
    [crop], [own] = preset.crop_size, preset.resize_size
    for size in dict.fromkeys((crop, 232, 256, *range(crop, crop * 4 // 3, 2))):
        if size != own:
            other = copy(preset)
            other.resize_size = [size]
            yield f"resize: the trainer's have resize_size {size}, and the recipe {own}", other
    for method in functional.InterpolationMode:
        if method != preset.interpolation and method.value in ("nearest", "bilinear", "bicubic"):
            other = copy(preset)
            other.interpolation = method
            yield f"resize: the trainer's have the interpolation {method.value}", other
    yield "resize: the trainer's are without antialias", _without_antialias(preset)
    yield (
        "resize: the trainer's squash images to a square",
        lambda image: preset(image.resize((own, own), Image.Resampling[preset.interpolation.name])),
    )


def _bgr(image: Image.Image) -> Image.Image:
    return Image.merge("RGB", image.split()[::-1])


def _without_antialias(preset: ImageClassification) -> Prepare:
    def prepare(image: Image.Image) -> Tensor:
        resized = functional.resize(
            functional.pil_to_tensor(image),
            preset.resize_size,
            preset.interpolation,
            antialias=False,
        )
        cropped = functional.center_crop(resized, preset.crop_size)
        return functional.normalize(cropped.float() / 255, preset.mean, preset.std)

    return prepare


def check_trainer(
    folder: Path,
    logits: Path | None,
    golden: Golden,
    labels: Sequence[str],
    network: nn.Module,
    preset: ImageClassification,
) -> None:
    """Hold the golden images against what the trainer says of them. Raises InvalidModel."""
    names = [*read_images(folder)]
    own = golden.only(names)
    check_names(folder, own, labels)
    if logits:
        check_logits(own, read_logits(logits, names), network, preset)

"""int8 at packaging time: calibrated on some images, measured on others, or refused.

NNCF quantises; service/archive/saturation.py makes the result right on CPUs without VNNI. Depthwise
convolutions stay in floating point: their few weights each carry the most error (MobileNetV2, mean
divergence 0.007 instead of 0.030 nats), and memory bounds their speed, so that int8 would make the
whole network only 7 to 14 % faster. If the answers to the held-out images differ too often, the
layers that cause most of the remaining error are given back to floating point as well.
"""

import contextlib
import io
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from handler.errors import InvalidModel, SetupError
from service.archive.inference import Image, Measurement, measure
from service.archive.progress import stage
from service.archive.ranking import rank_layers
from service.archive.saturation import (
    depthwise_layers,
    fit_ranges,
    int8_layers,
    weighted_layers,
)

# Half are measured, and of 50 one differing answer is 2 points: with fewer, nothing can be said
# about an agreement of 0.97 (its standard error is 2.4 points with 50).
MINIMUM_IMAGES = 100
MINIMUM_AGREEMENT = 0.97
RANKING_IMAGES = 32
OUTLIER = 0.05  # layers with a larger share of the error are the first to be given back
TRIES = 4  # after the one without layers in floating point
METHOD = "NNCF post-training, per-channel weights, ranges fitted to 16-bit saturation"
REQUIREMENTS = "requirements-int8.txt"


@dataclass(frozen=True, kw_only=True)
class Int8Report:
    """What was measured when a model was made int8."""

    method: str
    calibration_images: int
    measured_images: int  # none of which calibrated it
    agreement: float  # share of measured images with the same top-1 class as fp32
    accuracy_fp32: float | None  # top-1 on the measured images; None without labels
    accuracy_int8: float | None
    largest_probability_difference: float  # of any class of any measured image
    fp32_ms: float  # processor time, median of single images on one core
    int8_ms: float
    layers: int  # candidates for int8
    floating_point_layers: tuple[str, ...]  # the candidates that stayed
    cpu: str  # on which it was measured
    nncf: str
    openvino: str


def quantize(
    model: ov.Model,
    images: Sequence[Image],
    labels: Sequence[int] | None = None,
    minimum_agreement: float = MINIMUM_AGREEMENT,
) -> tuple[ov.Model, Int8Report]:
    """An int8 copy of a model of uint8 [B, 3, H, W] -> probabilities [B, C], and its report.

    Every other image calibrates, the rest measure. `labels` are class indices, one per image.
    Raises InvalidModel if there are too few images or the agreement with fp32 stays under the
    minimum; SetupError if NNCF is not installed.
    """
    check_images(images, labels)
    nncf = import_nncf()
    core = ov.Core()
    calibration, held_out = images[0::2], images[1::2]
    truth = None if labels is None else np.asarray(labels[1::2])
    fp32 = _measure("fp32", model, held_out, core)
    if truth is not None and truth.max() >= (classes := fp32.probabilities.shape[1]):
        raise InvalidModel(f"a label is class {truth.max()}, the model has {classes} classes")

    int8 = first = _quantize_once(nncf, model, calibration, (), core)
    if not (layers := len(int8_layers(first))):
        raise InvalidModel("int8: the model has no layer that can be int8")
    reports = []
    for kept in _choices(model, first, calibration, core):
        if kept:
            int8 = _quantize_once(nncf, model, calibration, kept, core)
        report = _report(
            fp32,
            _measure("int8", int8, held_out, core),
            truth,
            calibration_images=len(calibration),
            layers=layers,
            kept=tuple(readable_names(model, kept)),
        )
        print(_line(report), file=sys.stderr, flush=True)
        if report.agreement >= minimum_agreement:
            return int8, report
        reports.append(report)
    best = max(reports, key=lambda report: report.agreement)
    raise InvalidModel(f"int8 is refused: {_line(best)}; the minimum is {minimum_agreement:g}")


def check_images(images: Sequence[Image], labels: Sequence[int] | None) -> None:
    """Raise InvalidModel if there are too few images, or not one label for each."""
    if len(images) < MINIMUM_IMAGES:
        raise InvalidModel(
            f"int8 needs {MINIMUM_IMAGES} images or more (half calibrate, half measure), "
            f"got {len(images)}"
        )
    if labels is not None and len(labels) != len(images):
        raise InvalidModel(f"{len(labels)} labels for {len(images)} calibration images")


def import_nncf() -> Any:
    """NNCF, quiet. Raises SetupError if it is not installed."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use to its maker
    try:
        import nncf
    except ImportError as exc:
        raise SetupError(
            f"int8 needs NNCF, which is not installed: pip install -r {REQUIREMENTS}"
        ) from exc
    for name in ("nncf", "torch.utils.cpp_extension"):  # which warns that it finds no CUDA
        logging.getLogger(name).setLevel(logging.ERROR)
    return nncf


def _quantize_once(
    nncf: Any,
    model: ov.Model,
    images: Sequence[Image],
    floating_point: Sequence[str],
    core: ov.Core,
) -> ov.Model:
    """An int8 copy in which the named layers stay in floating point."""
    parameters = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.DISABLE  # fit_ranges does it better
    )

    def give(image: Image) -> Any:
        done()
        return image[None]

    silence = contextlib.redirect_stdout(io.StringIO())  # it has progress bars of its own
    with stage("Calibrating int8", len(images), "image") as done, silence:
        int8 = nncf.quantize(
            model.clone(),
            nncf.Dataset(images, give),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=[*depthwise_layers(model), *floating_point]),
            advanced_parameters=parameters,
        )
    fit_ranges(int8, model, images, core)
    return int8


def _choices(
    model: ov.Model, int8: ov.Model, images: Sequence[Image], core: ov.Core
) -> Iterator[tuple[str, ...]]:
    """Layers to keep in floating point: none, and if that does not do, the most harmful ones.

    `int8` is the model with none. Layers are ranked only if the second choice is asked for.
    """
    yield ()
    ranking = rank_layers(model, int8, images[:: -(-len(images) // RANKING_IMAGES)], core)
    for count in _counts([harm for _, harm in ranking]):
        yield tuple(name for name, _ in ranking[:count])


def _counts(harms: Sequence[float]) -> Iterator[int]:
    """Numbers of layers to keep: the outliers, at least one, then more, at most a third.

    Harms are those of all layers, the largest first.
    """
    most = len(harms) // 3
    count = max(1, sum(harm > OUTLIER * sum(harms) for harm in harms))
    for _ in range(TRIES):
        if (count := min(count, most)) == 0:
            return
        yield count
        if count == most:
            return
        count *= 2


def _measure(what: str, model: ov.Model, images: Sequence[Image], core: ov.Core) -> Measurement:
    with stage(f"Measuring {what}", len(images), "image") as done:
        return measure(model, images, core, done)


def readable_names(model: ov.Model, names: Sequence[str]) -> Iterator[str]:
    """The module's name in torch if one is near: the graph's own names may be numbers."""
    nodes = {node.get_friendly_name(): node for node in weighted_layers(model)}
    for name in names:
        users = nodes[name].output(0).get_target_inputs()
        near = [name, *sorted(user.get_node().get_friendly_name() for user in users)]
        module = next((text for text in near if text.startswith("__module.")), name)
        yield module.removeprefix("__module.").split("/")[0]


def _report(
    fp32: Measurement,
    int8: Measurement,
    truth: NDArray[Any] | None,
    *,
    calibration_images: int,
    layers: int,
    kept: tuple[str, ...],
) -> Int8Report:
    best_fp32, best_int8 = (m.probabilities.argmax(axis=1) for m in (fp32, int8))
    return Int8Report(
        method=METHOD,
        calibration_images=calibration_images,
        measured_images=len(best_fp32),
        agreement=float(np.mean(best_fp32 == best_int8)),
        accuracy_fp32=None if truth is None else float(np.mean(best_fp32 == truth)),
        accuracy_int8=None if truth is None else float(np.mean(best_int8 == truth)),
        largest_probability_difference=float(np.abs(fp32.probabilities - int8.probabilities).max()),
        fp32_ms=round(fp32.milliseconds, 3),
        int8_ms=round(int8.milliseconds, 3),
        layers=layers,
        floating_point_layers=kept,
        cpu=cpu_name(),
        nncf=version("nncf"),
        openvino=version("openvino"),
    )


def _line(report: Int8Report) -> str:
    """A report in one line."""
    accuracy = (
        f", accuracy {report.accuracy_int8:.3f} (fp32 {report.accuracy_fp32:.3f})"
        if report.accuracy_int8 is not None
        else ""
    )
    return (
        f"int8 agrees with fp32 on {report.agreement:.3f} of {report.measured_images} images"
        f"{accuracy}, {report.int8_ms:.1f} ms an image (fp32 {report.fp32_ms:.1f}), "
        f"{len(report.floating_point_layers)} of {report.layers} layers in floating point"
    )


def cpu_name() -> str:
    """The processor's name, and whether it has VNNI, which decides how int8 is computed."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # macOS
        return platform.processor() or platform.machine()
    facts = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    return f"{name}, {'with' if 'vnni' in facts.get('flags', '') else 'without'} VNNI"

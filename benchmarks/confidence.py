"""How well --calibrate works: coverage and size of sets, calibration error, unknown images.

    python -m benchmarks.confidence --weights FILE --recipe ENTRY --images DIR

DIR has images and labels.csv (file, class_id), as for --calibrate. It is split into halves again
and again: one is calibrated with, the other measured. Unknown images are drawn. Prints tables; the
last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_ood.detector import KNN, EnergyBased, Entropy, MaxLogit, MaxSoftmax, NNGuide, ViM
from scipy.stats import betabinom, binom
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.unknown import KINDS, draw
from handler.confidence import Confidence, calibrate, describe_answer, describe_pixels
from handler.errors import SetupError
from handler.images import read_picture
from handler.model_card import InputTransform
from handler.networks import empty_network, get_recipe, input_transform, load_state
from handler.settings import Settings
from handler.torch_engine import TorchEager
from service.archive.calibration import read_calibration
from service.archive.confidence import (
    calibration_error,
    distances,
    find_temperature,
    fit_answers,
    fit_gaussian,
)
from service.archive.fitting import fit_checkpoint
from service.archive.weights import find_weights, read_weights
from service.tables import text_table

LEVELS = (0.8, 0.9, 0.95)
DETECTOR_SEEDS = 20  # each fits ten detectors
IMAGES_OF_A_KIND = 50
PASS = 25  # images

ARCHIVES = "ours, archive's limit"

Floats = NDArray[np.float32]
Detector = Callable[["Answers", "Answers"], Floats]  # calibrated with, judged -> higher: unknown


@dataclass(frozen=True)
class Answers:
    """What a model says of images, and what they look like."""

    probabilities: Floats  # [N, C]
    features: Floats  # [N, K], what the last layer takes
    looks: Floats  # [N, 24]
    labels: NDArray[np.int64]  # [N]; of unknown images -1

    def of(self, chosen: NDArray[np.int64]) -> "Answers":
        return Answers(
            self.probabilities[chosen],
            self.features[chosen],
            self.looks[chosen],
            self.labels[chosen],
        )

    @classmethod
    def joined(cls, parts: Sequence["Answers"]) -> "Answers":
        return cls(
            np.concatenate([one.probabilities for one in parts]),
            np.concatenate([one.features for one in parts]),
            np.concatenate([one.looks for one in parts]),
            np.concatenate([one.labels for one in parts]),
        )


class Model:
    """A network whose last layer is linear, in torch and fp32."""

    def __init__(self, network: nn.Module, transform: InputTransform) -> None:
        self.last = [one for one in network.modules() if isinstance(one, nn.Linear)][-1]
        self._engine = TorchEager(network, transform)
        self._taken: list[Tensor] = []
        self.last.register_forward_pre_hook(lambda _, inputs: self._taken.append(inputs[0]))

    def answers(self, images: Sequence[NDArray[np.uint8]], labels: Sequence[int]) -> Answers:
        self._taken.clear()
        passes = torch.split(torch.from_numpy(np.stack(images)), PASS)
        answered = [self._engine.probabilities(one) for one in passes]
        return Answers(
            torch.cat(answered).numpy(),
            torch.cat(self._taken).numpy(),
            np.stack([describe_pixels(one) for one in images]),
            np.array(labels),
        )

    def detectors(self) -> dict[str, Detector]:
        """pytorch-ood's, each on what it needs, and ours."""
        weight, bias = self.last.weight.detach(), self.last.bias.detach()

        def of_logits(detector: Any) -> Detector:
            def judge(_: Answers, judged: Answers) -> Floats:
                logits = torch.from_numpy(judged.features) @ weight.T + bias
                return np.asarray(detector.score(logits))

            return judge

        def of_features(make: Callable[[], Any]) -> Detector:
            def judge(known: Answers, judged: Answers) -> Floats:
                detector = make().fit_features(
                    torch.from_numpy(known.features), torch.from_numpy(known.labels)
                )
                return np.asarray(detector.predict_features(torch.from_numpy(judged.features)))

            return judge

        return {
            "energy": of_logits(EnergyBased),
            "max logit": of_logits(MaxLogit),
            "max softmax": of_logits(MaxSoftmax),
            "entropy": of_logits(Entropy),
            "kNN": of_features(lambda: KNN(None)),
            "ViM": of_features(lambda: ViM(None, 64, weight, bias)),
            "NNGuide": of_features(lambda: NNGuide(None, self.last)),
            "ours, answer alone": lambda known, judged: ours(known, judged, np.s_[24:]),
            "ours, pixels alone": lambda known, judged: ours(known, judged, np.s_[:24]),
            "ours": lambda known, judged: ours(known, judged, np.s_[:]),
            ARCHIVES: lambda known, judged: ours(known, judged, np.s_[:]),
        }


def ours(known: Answers, judged: Answers, numbers: slice) -> Floats:
    """The distance of handler/confidence.py, of some of its numbers."""
    temperature = find_temperature(known.probabilities, known.labels)
    center, precision = fit_gaussian(_described(known, temperature)[:, numbers])
    return distances(_described(judged, temperature)[:, numbers], center, precision)


def _described(answers: Answers, temperature: float) -> Floats:
    calibrated = calibrate(answers.probabilities, temperature)
    return np.hstack([answers.looks, [describe_answer(row) for row in calibrated]])


def halves(count: int, seeds: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Indices to calibrate with, and the others."""
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(count)
        yield order[: count // 2], order[count // 2 :]


def measure_sets(real: Answers, seeds: int) -> list[dict[str, Any]]:
    """By level: how many of the other half have their class in its set, and how large it is.

    `in_binomial` is the share of seeds whose coverage lies within the 95 % of a binomial
    distribution about the level; `in_beta_binomial` allows for the chance in the calibration, too:
    there 95 % are expected.
    """
    covered: dict[float, list[int]] = {level: [] for level in LEVELS}
    sizes: dict[float, list[int]] = {level: [] for level in LEVELS}
    for known, other in halves(len(real.labels), seeds):
        fitted = fit_answers(
            real.probabilities[known], real.labels[known], real.looks[known], "torch-fp32"
        )
        confidence = Confidence(
            fitted.facts.temperature, limit=fitted.facts.unknown_limit, **fitted.arrays
        )
        calibrated = calibrate(real.probabilities[other], confidence.temperature)
        for level in LEVELS:
            sets = [confidence.likely(row, level) for row in calibrated]
            hits = [label in one for one, label in zip(sets, real.labels[other], strict=True)]
            covered[level].append(sum(hits))
            sizes[level] += [len(one) for one in sets]
    n, m = len(known), len(other)
    return [
        _describe_level(level, n, m, np.array(covered[level]), sizes[level]) for level in LEVELS
    ]


def _describe_level(
    level: float, n: int, m: int, covered: NDArray[np.int64], sizes: list[int]
) -> dict[str, Any]:
    rank = int(np.ceil(round((n + 1) * level, 6)))
    low, high = binom.interval(0.95, m, level)
    low_too, high_too = betabinom.interval(0.95, m, rank, n + 1 - rank)
    return {
        "level": level,
        "coverage": covered.mean() / m,
        "in_binomial": np.mean((low <= covered) & (covered <= high)),
        "in_beta_binomial": np.mean((low_too <= covered) & (covered <= high_too)),
        "mean_size": np.mean(sizes),
        "median_size": np.median(sizes),
        "largest": max(sizes),
    }


def measure_scores(real: Answers, seeds: int) -> list[dict[str, Any]]:
    """Sets at 90 % by the score that decides what is in them."""
    rows = []
    for name, score in SCORES.items():
        coverage, sizes = [], []
        for seed, (known, other) in enumerate(halves(len(real.labels), seeds)):
            temperature = find_temperature(real.probabilities[known], real.labels[known])
            calibrated = calibrate(real.probabilities, temperature)
            scores = score(calibrated, np.random.default_rng(seed))
            true = scores[np.arange(len(scores)), real.labels]
            rank = int(np.ceil(round((len(known) + 1) * 0.9, 6)))
            inside = scores[other] <= np.sort(true[known])[rank - 1]
            inside[np.arange(len(other)), calibrated[other].argmax(axis=1)] = True
            coverage.append(inside[np.arange(len(other)), real.labels[other]].mean())
            sizes.append(inside.sum(axis=1).mean())
        rows.append({"score": name, "coverage": np.mean(coverage), "mean_size": np.mean(sizes)})
    return rows


def label_score(calibrated: Floats, _: np.random.Generator) -> Floats:
    return 1 - calibrated


def aps_score(calibrated: Floats, rng: np.random.Generator, penalty: float = 0) -> Floats:
    """Romano 2020: the probability of all likelier classes, and a random share of its own."""
    order = (-calibrated).argsort(axis=1)
    ranked = np.take_along_axis(calibrated, order, axis=1)
    sums = ranked.cumsum(axis=1) - ranked * rng.random((len(ranked), 1))
    sums += penalty * np.maximum(np.arange(1, ranked.shape[1] + 1) - 5, 0)
    scores = np.empty_like(calibrated)
    np.put_along_axis(scores, order, sums.astype(np.float32), axis=1)
    return scores


def raps_score(calibrated: Floats, rng: np.random.Generator) -> Floats:
    """Angelopoulos 2021: APS with 0.01 for each class beyond the fifth."""
    return aps_score(calibrated, rng, penalty=0.01)


SCORES: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "LABEL": label_score,
    "APS": aps_score,
    "RAPS": raps_score,
}


def measure_calibration(real: Answers, seeds: int) -> list[dict[str, Any]]:
    """Expected calibration error of the other half, and that of all images, each half by the other.

    `floor` is what perfectly calibrated answers of the same confidences would show, because the
    images are few.
    """
    before, after, crossed, temperatures, floors = [], [], [], [], []
    rng = np.random.default_rng(0)
    for known, other in halves(len(real.labels), seeds):
        both = np.empty_like(real.probabilities)
        for fitted_on, applied_to in ((known, other), (other, known)):
            temperature = find_temperature(real.probabilities[fitted_on], real.labels[fitted_on])
            both[applied_to] = calibrate(real.probabilities[applied_to], temperature)
            temperatures.append(temperature)
        before.append(calibration_error(real.probabilities[other], real.labels[other]))
        after.append(calibration_error(both[other], real.labels[other]))
        crossed.append(calibration_error(both, real.labels))
        right = rng.random(len(both)) < both.max(axis=1)
        best = both.argmax(axis=1)
        floors.append(calibration_error(both, np.where(right, best, -1)))
    row = {
        "temperature": np.mean(temperatures),
        "halves_before": np.mean(before),
        "halves_after": np.mean(after),
        "all_before": calibration_error(real.probabilities, real.labels),
        "all_after": np.mean(crossed),
        "all_floor": np.mean(floors),
    }
    return [row]


def measure_alarms(real: Answers, seeds: int) -> list[dict[str, Any]]:
    """The share of the other half that an archive calls unknown, by its own threshold."""
    shares = []
    for known, other in halves(len(real.labels), seeds):
        half = real.of(known)
        fitted = fit_answers(half.probabilities, half.labels, half.looks, "torch-fp32")
        shares.append(np.mean(ours(half, real.of(other), np.s_[:]) > fitted.facts.unknown_limit))
    return [{"false_alarms": np.mean(shares), "least": min(shares), "most": max(shares)}]


def measure_detectors(
    model: Model, real: Answers, unknown: dict[str, Answers], seeds: int
) -> list[dict[str, Any]]:
    """By detector and kind: the area under the ROC curve, and the share found at 5 % false alarms.

    The threshold is the one that gives 5 % on the images measured; in the last row it is that of an
    archive, and `false_alarms` says what it gives.
    """
    rows = []
    for name, detector in model.detectors().items():
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in unknown}
        alarms = []
        for known, other in halves(len(real.labels), seeds):
            half = real.of(known)
            scores = detector(half, Answers.joined([real.of(other), *unknown.values()]))
            ends = np.cumsum([len(other), *(len(one.labels) for one in unknown.values())])
            usual, *parts = np.split(scores, ends[:-1])
            limit = float(np.quantile(usual, 0.95))
            if name == ARCHIVES:
                fitted = fit_answers(half.probabilities, half.labels, half.looks, "torch-fp32")
                limit = fitted.facts.unknown_limit
            alarms.append(np.mean(usual > limit))
            for kind, part in zip(unknown, parts, strict=True):
                truth = np.r_[np.zeros(len(usual)), np.ones(len(part))]
                area = roc_auc_score(truth, np.r_[usual, part])
                found[kind].append((float(area), float(np.mean(part > limit))))
        means = {kind: np.mean(pairs, axis=0) for kind, pairs in found.items()}
        rows.append(
            {"detector": name, "false_alarms": np.mean(alarms)}
            | {f"{kind}: AUROC": area for kind, (area, _) in means.items()}
            | {f"{kind}: found": share for kind, (_, share) in means.items()}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    return "\n".join(text_table([*rows[0]], [[*row.values()] for row in rows], digits=3))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.confidence", description=__doc__)
    parser.add_argument("--model", default="mobilenet_v2", help="default: %(default)s")
    parser.add_argument("--weights", required=True, metavar="FILE")
    parser.add_argument("--recipe", required=True, metavar="ENTRY")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seeds", default=100, type=int, help="default: %(default)s")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        recipe = get_recipe(options.model, options.recipe)
        source = find_weights(options.weights, recipe, options.model)
        fit = fit_checkpoint(read_weights(source, recipe, options.model), recipe, options.model)
        transform = input_transform(recipe)
        images = read_calibration(options.images, transform, Settings(), "--images")
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    if images.labels is None:
        print(f"error: {options.images} has no labels.csv", file=sys.stderr)
        return 2
    network = empty_network(recipe, options.model, fit.classes)
    load_state(network, fit.state)
    model = Model(network, transform)
    real = model.answers(images.images, images.labels)
    unknown = {}
    for kind in KINDS:
        files = draw(kind, IMAGES_OF_A_KIND)
        pixels = [np.asarray(read_picture(file, transform, Settings()).pixels) for file in files]
        unknown[kind] = model.answers(pixels, [-1] * len(pixels))
    found: dict[str, Any] = {"images": len(real.labels), "seeds": options.seeds}
    for name, measure in (
        ("sets", measure_sets),
        ("scores", measure_scores),
        ("calibration", measure_calibration),
        ("alarms", measure_alarms),
    ):
        found[name] = measure(real, options.seeds)
        print(table(found[name]), end="\n\n", flush=True)
    seeds = min(options.seeds, DETECTOR_SEEDS)
    found["detectors"] = measure_detectors(model, real, unknown, seeds)
    for number in ("AUROC", "found"):
        rows = [
            {"detector": row["detector"], "false alarms": row["false_alarms"]}
            | {kind: row[f"{kind}: {number}"] for kind in KINDS}
            for row in found["detectors"]
        ]
        print(f"{number}\n{table(rows)}\n")
    print(json.dumps(found, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main())

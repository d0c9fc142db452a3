"""What labelled answers say about a model, in figures.

Intervals are Wilson's score intervals at 95 %: E. B. Wilson, "Probable inference, the law of
succession, and statistical inference", JASA 22 (1927).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import binomtest

from handler.errors import SetupError
from service.evaluation.run import Outcome, Run

BINS = 15  # of the confidence, equally wide; what is usual for ECE since Guo et al. (2017)
MOST = 10  # classes and pairs that are listed
EXAMPLES = 4  # images of each pair
SIDES = (1, 128, 256, 512, 1024)  # pixels of the short side at which a slice begins
LIGHT = ("dark", "dim", "light", "bright")  # slices of the brightness
LEVELS = 256 // len(LIGHT)  # grey levels in each
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Share:
    """Hits among images, with the interval in which the share of all such images is."""

    hits: int
    of: int
    share: float
    low: float
    high: float

    @classmethod
    def count(cls, flags: Iterable[bool]) -> "Share":
        """Of at least one image."""
        hits = list(flags)
        interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        low, high = float(interval.low), float(interval.high)
        return cls(sum(hits), len(hits), sum(hits) / len(hits), low, high)


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is between two limits."""

    low: float
    high: float
    images: int
    confidence: float | None  # the mean; None without images
    right: float | None  # share


@dataclass(frozen=True)
class Calibration:
    """How far the confidence is from the share of right answers."""

    ece: float  # mean over the bins of |confidence - right|, weighted by their images
    confidence: float  # the mean
    right: float  # share of the classified images
    bins: list[Bin]


@dataclass(frozen=True)
class Sets:
    """How often the set of an answer holds the true class, and how many classes it has."""

    coverage: Share
    mean_size: float
    largest: int
    single: int  # sets of one class


@dataclass(frozen=True)
class Group:
    """Images of a class, or of another kind."""

    name: str
    top1: Share


@dataclass(frozen=True)
class Pair:
    """A class that is taken for another one."""

    truth: str
    predicted: str
    images: int
    examples: list[str]  # the surest first


@dataclass(frozen=True)
class Figures:
    """One target and all images."""

    target: str
    models: dict[str, int]  # images by what their answers say about the model
    images: int
    failed: dict[str, int]  # by type of error
    counted: int  # images in top1 and top5: all of them, or those that did not fail
    classes: int  # that the images show
    top1: Share
    top5: Share
    calibration: Calibration | None  # None if no image was classified
    sets: Sets | None  # None if they were not asked for
    unknown: Share | None  # likewise
    worst: list[Group]  # classes by the upper end of the interval: the surest to be bad first
    confused: list[Pair]
    slices: dict[str, list[Group]]  # by size, format and brightness


@dataclass(frozen=True)
class Comparison:
    """A and B on the same images, counted by which of them is right."""

    images: int
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float
    verdict: str


def measure(run: Run, *, without_failed: bool = False) -> Figures:
    """A failed image counts as wrong, unless those are left out. Raises SetupError if all are."""
    outcomes = counted(run, without_failed=without_failed)
    answered = [one for one in run.outcomes if one.classes]
    by_class = defaultdict(list)
    for one in outcomes:
        by_class[one.truth].append(one)
    classes = [_group(_named(run, index), group) for index, group in sorted(by_class.items())]
    return Figures(
        target=run.target,
        models=dict(run.models.most_common()),
        images=len(run.outcomes),
        failed=dict(Counter(one.error for one in run.outcomes if one.error).most_common()),
        counted=len(outcomes),
        classes=len(classes),
        top1=Share.count(one.is_right for one in outcomes),
        top5=Share.count(one.truth in one.classes for one in outcomes),
        calibration=calibrate(answered) if answered else None,
        sets=_sets(answered),
        unknown=_unknown(answered),
        worst=sorted(classes, key=lambda group: (group.top1.high, group.top1.share))[:MOST],
        confused=_pairs(run, answered),
        slices={
            "short side": _slices(outcomes, _side),
            "format": _slices(outcomes, lambda one: (0, one.format)),
            "brightness": _slices(outcomes, _light),
        },
    )


def counted(run: Run, *, without_failed: bool) -> list[Outcome]:
    """The images that count. Raises SetupError if there are none."""
    outcomes = [one for one in run.outcomes if one.classes or not without_failed]
    if not outcomes:
        raise SetupError(f"{run.target}: all {len(run.outcomes)} images failed")
    return outcomes


def calibrate(answered: Sequence[Outcome]) -> Calibration:
    """The expected calibration error of the first class of at least one image."""
    groups: list[list[Outcome]] = [[] for _ in range(BINS)]
    for one in answered:
        groups[min(int(one.confidence * BINS), BINS - 1)].append(one)
    bins, ece = [], 0.0
    for index, group in enumerate(groups):
        confidence = right = None
        if group:
            confidence = fmean(one.confidence for one in group)
            right = fmean(one.is_right for one in group)
            ece += len(group) / len(answered) * abs(confidence - right)
        bins.append(Bin(index / BINS, (index + 1) / BINS, len(group), confidence, right))
    mean = fmean(one.confidence for one in answered)
    return Calibration(ece, mean, fmean(one.is_right for one in answered), bins)


def compare(a: Run, b: Run, *, without_failed: bool = False) -> Comparison:
    """McNemar's exact test of two targets on the same images.

    Of the images for which only one of them is right, each has one half if they are equally good.
    An image that counts in one alone is left out. Raises SetupError if none is left.
    """
    right_a, right_b = (
        {one.path: one.is_right for one in counted(run, without_failed=without_failed)}
        for run in (a, b)
    )
    pairs = Counter((right, right_b[path]) for path, right in right_a.items() if path in right_b)
    if not pairs:
        raise SetupError("no image was classified by both")
    only_a, only_b = pairs[True, False], pairs[False, True]
    apart = only_a + only_b
    p_value = float(binomtest(only_b, apart).pvalue) if apart else 1.0
    verdict = "no difference shown"
    if p_value < SIGNIFICANT:
        verdict = f"{'B' if only_b > only_a else 'A'} is better"
    return Comparison(
        images=pairs.total(),
        both=pairs[True, True],
        only_a=only_a,
        only_b=only_b,
        neither=pairs[False, False],
        p_value=p_value,
        verdict=f"{verdict} (p={p_value:.2g})",
    )


def _named(run: Run, index: int) -> str:
    return f"{run.labels[index]} ({index})"


def _group(name: str, outcomes: Sequence[Outcome]) -> Group:
    return Group(name, Share.count(one.is_right for one in outcomes))


def _sets(answered: Sequence[Outcome]) -> Sets | None:
    asked = [one for one in answered if one.set_size is not None]
    sizes = [one.set_size for one in asked if one.set_size is not None]
    if not asked:
        return None
    coverage = Share.count(one.covered for one in asked)
    return Sets(coverage, fmean(sizes), max(sizes), sizes.count(1))


def _unknown(answered: Sequence[Outcome]) -> Share | None:
    flags = [one.unknown for one in answered if one.unknown is not None]
    return Share.count(flags) if flags else None


def _pairs(run: Run, answered: Sequence[Outcome]) -> list[Pair]:
    wrong = defaultdict(list)
    for one in answered:
        if not one.is_right:
            wrong[one.truth, one.classes[0]].append(one)
    most = sorted(wrong.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST]
    return [
        Pair(
            _named(run, truth),
            _named(run, predicted),
            len(group),
            [str(one.path) for one in sorted(group, key=lambda one: -one.confidence)[:EXAMPLES]],
        )
        for (truth, predicted), group in most
    ]


def _slices(
    outcomes: Sequence[Outcome], key_of: Callable[[Outcome], tuple[int, str]]
) -> list[Group]:
    """In the order of the key, whose second part is the slice's name."""
    groups = defaultdict(list)
    for one in outcomes:
        groups[key_of(one)].append(one)
    return [_group(key[1], groups[key]) for key in sorted(groups)]


def _side(one: Outcome) -> tuple[int, str]:
    """By the short side of the image."""
    if one.short_side is None:
        return 0, "not known"
    low = max(side for side in SIDES if side <= one.short_side)
    high = next((side for side in SIDES if side > one.short_side), None)
    return low, f"{low} to {high - 1} px" if high else f"{low} px or more"


def _light(one: Outcome) -> tuple[int, str]:
    """By the mean of the image's grey levels."""
    if one.brightness is None:
        return -1, "not known"
    level = min(int(one.brightness / LEVELS), len(LIGHT) - 1)
    return level, f"{LIGHT[level]}, {level * LEVELS} to {(level + 1) * LEVELS - 1}"

"""One or two targets on the same labelled images."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from handler.errors import SetupError
from service.evaluation.examples import read_examples, resolve
from service.evaluation.figures import compare, measure
from service.evaluation.report import Report
from service.evaluation.run import Run, classify_all
from service.evaluation.targets import Asking, Service, Target, predictions_url
from service.temporary import TemporaryFolder


def evaluate(
    images: Path, targets: Sequence[str], model: str, asking: Asking, *, without_failed: bool
) -> tuple[Report, list[Run]]:
    """Figures of one target or two, one after the other, and what became of each image.

    `without_failed` leaves failed images out, which count as wrong otherwise. Raises SetupError;
    OSError.
    """
    examples = read_examples(images)
    runs: list[Run] = []
    for where in targets:
        with open_target(where, model, asking) as target:
            truths = resolve(examples, target.labels)
            if runs:
                _check_same_classes(runs[0], truths, target.labels)
            runs.append(classify_all(target, truths))
    figures = [measure(run, without_failed=without_failed) for run in runs]
    if len(runs) == 1:
        return Report(figures[0]), runs
    compared = compare(runs[0], runs[1], without_failed=without_failed)
    return Report(figures[0], figures[1], compared), runs


@contextmanager
def open_target(where: str, model: str, asking: Asking) -> Iterator[Target]:
    """A service by its URL, to which /predictions/{model} is added if it has no path, or a .mar.

    Raises SetupError if it does not classify a drawn image with all its classes.
    """
    if urlsplit(where).scheme in ("http", "https"):
        yield Service(predictions_url(where, model), asking)
    elif where.endswith(".mar"):
        logging.getLogger("ts").setLevel(logging.ERROR)  # it warns of what it does without
        from service.evaluation.archive import Archive  # imports torch

        with TemporaryFolder(".evaluate-") as folder:
            yield Archive(Path(where), folder / "model", asking.options)
    else:
        raise SetupError(f"{where} is neither an http:// or https:// URL nor a .mar file")


def _check_same_classes(a: Run, truths: Mapping[Path, int], labels: Sequence[str]) -> None:
    """Raise SetupError if an index means one class for A and another for B."""
    if any(a.labels[one.truth] != labels[truths[one.path]] for one in a.outcomes):
        raise SetupError("A and B have other classes: label the images by name, not by index")

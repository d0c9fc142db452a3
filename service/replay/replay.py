"""An answer computed again, compared with the one in the log, and a difference explained."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from handler.accounting import COMPUTING
from handler.errors import SetupError
from service.archive.digest import code_sha256
from service.replay.archives import Archive, choose_archive, find_archives
from service.replay.logged import Best, Logged
from service.replay.trials import Computed, Trials, Way, alternatives
from service.tables import text_table
from service.temporary import TemporaryFolder

# How far the same computation may be from itself, because the log rounds to 6 digits, and other
# images share the forward pass each time. Over 100 real images OpenVINO's confidences moved by 0
# and torch's by 0.000002.
TOLERANCE = 0.00001


@dataclass(frozen=True)
class Trial:
    """One thing changed by itself, and the answer then; or why it cannot be tried."""

    changed: str
    to: str
    best: Best | None
    agrees: bool = False
    refused: str | None = None


@dataclass(frozen=True)
class Replay:
    """What was found out."""

    logged: Logged
    archive: str  # path
    engine: str
    best: Best
    same: bool
    checked: str | None  # what shows that the image is the one that was sent
    differences: dict[str, tuple[str | None, str | None]]  # by name: as it was logged, and here
    trials: list[Trial] = field(default_factory=list)

    @property
    def explained_by(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.agrees]

    def as_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "explained_by": [f"{trial.changed}: {trial.to}" for trial in self.explained_by],
            **asdict(self),
        }


def replay(logged: Logged, image: bytes, given: Sequence[Path], store: Path) -> Replay:
    """Compute an answer again, and try what explains a difference. Raises SetupError."""
    checked = check_image(logged, image)
    archives = find_archives(given, store, logged.model)
    archive = choose_archive(logged, archives)
    with TemporaryFolder("classifier-replay-") as folder:
        trials = Trials(image, folder)
        first = _first(trials, logged, archive)
        way = Way(archive, first.engine, logged.decode)
        decoder = logged.decoder and trials.decoder_of(logged.decoder)
        found = Replay(
            logged=logged,
            archive=str(archive.path),
            engine=first.engine,
            best=first.best,
            same=agree(first.best, logged.best),
            checked=checked,
            differences=dict(_differences(logged, way, (decoder, first.decoder))),
        )
        if not found.same:
            others = [each for each in archives if each.given]
            for changed, to, other in alternatives(way, others):
                found.trials.append(_try(trials, changed, to, other, logged.best))
    return found


def check_image(logged: Logged, image: bytes) -> str | None:
    """What shows that the image is the one that was sent. Raises SetupError if it is another."""
    if logged.image_sha256:
        actual = hashlib.sha256(image).hexdigest()
        if actual != logged.image_sha256:
            raise SetupError(
                f"this is another image: its sha256 is {actual}, the log has {logged.image_sha256}"
            )
        return "sha256"
    if logged.image_bytes:
        if len(image) != logged.image_bytes:
            raise SetupError(
                f"this is another image: it has {len(image)} bytes, the log {logged.image_bytes}"
            )
        return "number of bytes"
    return None


def agree(one: Best, other: Best) -> bool:
    return one.name == other.name and abs(one.confidence - other.confidence) <= TOLERANCE


def _first(trials: Trials, logged: Logged, archive: Archive) -> Computed:
    """The answer computed as it was logged, or as a worker here would."""
    if logged.engine:
        with suppress(SetupError):
            return trials.answer(Way(archive, logged.engine, logged.decode))
    return trials.answer(Way(archive, "auto", logged.decode))


def _differences(
    logged: Logged, way: Way, decoders: tuple[str | None, str]
) -> Iterator[tuple[str, tuple[str | None, str | None]]]:
    """What is not as it was logged; of what the log does not say, nothing."""
    card = way.archive.card
    library, precision = (logged.engine or way.engine).split("-")
    here = way.engine.split("-")
    pairs: dict[str, tuple[str | None, str | None]] = {
        "archive": (logged.archive, way.archive.digest),
        "weights": (logged.weights, card.weights.name),
        "engine": (library, here[0]),
        "precision": (precision, here[1]),
        "decoder": decoders,
    }
    pairs |= {f"library {name}": (logged.libraries.get(name), version(name)) for name in COMPUTING}
    for name, (then, now) in pairs.items():
        if then is not None and then != now:
            yield name, (then, now)
    if code_sha256(card)[1] != card.code_sha256[1]:
        yield "code", ("the archive's", "this checkout's")


def _try(trials: Trials, changed: str, to: str, way: Way, logged: Best) -> Trial:
    try:
        best = trials.answer(way).best
    except SetupError as exc:
        return Trial(changed, to, None, refused=str(exc))
    return Trial(changed, to, best, agree(best, logged))


def describe(found: Replay) -> str:
    """For people."""
    logged = found.logged
    lines = [
        f"logged    {logged.best}  archive {logged.archive or '?'}, {logged.engine or '?'}",
        f"replayed  {found.best}  {_shown(found.archive)}, {found.engine}",
    ]
    if logged.images > 1:
        lines.append(
            f"the line is of {logged.images} images, and has the answer to the first alone"
        )
    if found.checked != "sha256":
        known = f"only its {found.checked} is known" if found.checked else "nothing is known of it"
        lines.append(f"the image may be another than the one that was sent: {known}")
    differences = [
        f"{name}: {then} then, {now} now" for name, (then, now) in found.differences.items()
    ]
    if found.same:
        lines += ["same", *differences]
        return "\n".join(lines)
    rows = [
        (trial.changed, trial.to, str(trial.best), "yes" if trial.agrees else "no")
        for trial in found.trials
        if trial.best
    ]
    headings = ("changed by itself", "to", "answer", "as logged")
    lines += ["differs", "", *text_table(headings, rows, left=range(4)), ""]
    if found.explained_by:
        explained = ", ".join(f"{trial.changed} ({trial.to})" for trial in found.explained_by)
        lines.append(f"explained by: {explained}")
    elif differences:
        lines.append("no trial gives the logged answer; what cannot be tried here:")
    else:
        lines.append("nothing that is known explains it: is it the image that was sent?")
    return "\n".join([*lines, *differences])


def _shown(path: str) -> str:
    """From here, if it is below."""
    with suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path

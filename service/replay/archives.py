"""The archive that gave an answer, found by its digest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from handler.accounting import ARCHIVE_DIGITS
from handler.errors import InvalidModel, SetupError
from handler.model_card import ModelCard
from service.archive.mar import read_card, read_target
from service.replay.logged import Logged


@dataclass(frozen=True)
class Archive:
    """An archive that can be read."""

    path: Path
    name: str
    version: str
    card: ModelCard
    given: bool  # by itself or in a folder; else from the model store

    @property
    def digest(self) -> str:
        """As in the log and in the metric classifier_build_info."""
        return self.card.inputs_sha256[:ARCHIVE_DIGITS]


def find_archives(given: Sequence[Path], store: Path, model: str) -> list[Archive]:
    """The archives of a model: those given, in the folders given, and in the model store.

    Raises SetupError for a path that is given and not there, or an archive that cannot be read.
    """
    found = []
    for path in dict.fromkeys([*given, store]):
        if not path.exists() and path != store:
            raise SetupError(f"{path} does not exist")
        for file in sorted(path.glob("*.mar")) if path.is_dir() else [path] * path.exists():
            card = read_card(file)
            if card is None:
                if file in given:
                    raise InvalidModel(f"{file} is damaged, or was not made by this release")
                continue
            name, version = read_target(file)
            if name == model or file in given:
                found.append(Archive(file, name, version, card, given=path in given))
    return list({archive.digest: archive for archive in reversed(found)}.values())[::-1]


def choose_archive(logged: Logged, archives: Sequence[Archive]) -> Archive:
    """The one that gave the answer; or, if it is not there, the only one that was given.

    An answer has no digest: the model, its version and its weights' name must then tell. Raises
    SetupError if it cannot be told.
    """
    if logged.archive:
        fitting = [each for each in archives if each.digest == logged.archive]
        wanted = f"the archive {logged.archive}"
    else:
        identity = logged.model, logged.version, logged.weights
        fitting = [
            each
            for each in archives
            if (each.name, each.version, each.card.weights.name) == identity
        ]
        wanted = f"one archive of {' '.join(identity)}"
    if len(fitting) == 1:
        return fitting[0]
    given = [each for each in archives if each.given]
    if len(given) == 1:
        return given[0]
    there = ", ".join(f"{each.path} ({each.digest})" for each in archives) or "none"
    raise SetupError(f"{wanted} is needed: give it or its folder; found of {logged.model}: {there}")

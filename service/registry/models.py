"""Models of MLflow: which of their artefacts is what, and what their tags say."""

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from handler.errors import InvalidModel
from handler.model_card import CARD_FILE
from service.registry.cache import MAX_BYTES, kept
from service.registry.client import mlflow_client
from service.registry.downloads import bar
from service.registry.references import DIGEST, SUFFIXES, RegisteredModel, RunFile

LABELS = ("labels.txt", "labels.json")
MAX_TEXT_BYTES = 16 * 2**20  # of labels and of a card
MAX_FILES = 1000
MAX_DEPTH = 4  # of folders below the first
# What tags, or the card among the artefacts, may say, and how it is written.
FACTS = {
    "architecture": r"[a-z0-9_]{1,100}",
    "recipe": r"[A-Za-z0-9_]{1,100}\.[A-Za-z0-9_]{1,100}",
    "transform_input": r"on|off",
}


@dataclass(frozen=True)
class Found:
    """A model whose files are on this machine."""

    name: str  # NAME/VERSION, or the file's name
    source: str  # its reference, with the version that an alias stood for
    weights: Path
    labels: Path | None
    facts: Mapping[str, str]  # of FACTS


def find_model(reference: RegisteredModel | RunFile, sha256: str | None) -> Found:
    """Fetch what a reference names, unless it is in the cache.

    `sha256` of the weights; None: what the tags say, if anything. Raises SetupError if the tracking
    server has no such model or is at fault, InvalidModel if it is no model of one weights file.
    """
    with mlflow_client() as client:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        uri, path, tags = _resolve(client, reference)
        source = f"mlflow:{uri}{path and '/'}{path}"
        files = _Files(get_artifact_repository(uri), source, path)
        facts = dict(tags)
        if card := files.find("a card", lambda file: file.name == CARD_FILE):
            facts = _read_card(files.fetch(card, MAX_TEXT_BYTES), source) | tags
        labels = files.find("labels", lambda file: file.name in LABELS)
        if not (weights := files.find("weights", lambda file: file.suffix in SUFFIXES)):
            raise InvalidModel(f"{source} has no weights (*{', *'.join(SUFFIXES)}): {files}")
        return Found(
            name=uri.removeprefix("models:/") if uri.startswith("models:") else weights.name,
            source=source,
            weights=files.fetch(weights, MAX_BYTES, sha256 or _digest(tags, source)),
            labels=files.fetch(labels, MAX_TEXT_BYTES) if labels else None,
            facts=_check_facts(facts, source),
        )


def _resolve(client: Any, reference: RegisteredModel | RunFile) -> tuple[str, str, dict[str, str]]:
    """MLflow's URI of a model or run, the path in it, and the tags."""
    if isinstance(reference, RunFile):
        run = client.get_run(reference.run)
        tags = {name: value for name, value in run.data.tags.items() if name in FACTS}
        return f"runs:/{reference.run}", reference.path, tags
    if reference.alias:
        version = client.get_model_version_by_alias(reference.name, reference.alias)
    else:
        version = client.get_model_version(reference.name, reference.version)
    return f"models:/{reference.name}/{version.version}", "", dict(version.tags)


class _Files:
    """The artefacts of a model: listed at once, fetched one by one."""

    def __init__(self, repository: Any, source: str, path: str) -> None:
        """`path`: the folder among them that counts, or the one file of weights in it."""
        self._repository = repository
        self._source = source
        self._one = PurePosixPath(path) if path.endswith(SUFFIXES) else None
        self._sizes = dict[PurePosixPath, int]()
        top = str(self._one.parent) if self._one else path
        self._list("" if top == "." else top, MAX_DEPTH)

    def _list(self, folder: str, depth: int) -> None:
        for file in self._repository.list_artifacts(folder or None):
            if file.is_dir and depth:
                self._list(file.path, depth - 1)
            elif not file.is_dir:
                self._sizes[PurePosixPath(file.path)] = int(file.file_size or 0)
            if len(self._sizes) > MAX_FILES:
                raise InvalidModel(f"{self._source} has more than {MAX_FILES} files")

    def __str__(self) -> str:
        """For messages."""
        names = sorted(map(str, self._sizes))
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        return f"it has {', '.join(names[:20]) or 'no files'}{more}"

    def find(self, what: str, fits: Callable[[PurePosixPath], bool]) -> PurePosixPath | None:
        """The one file that fits; None if there is none. Raises InvalidModel for several."""
        if self._one and fits(self._one):
            return self._one if self._one in self._sizes else None
        found = sorted(file for file in self._sizes if fits(file))
        if len(found) > 1:
            listed = ", ".join(map(str, found[:20]))
            remedy = "; name one: mlflow:runs:/RUN_ID/PATH/FILE" if what == "weights" else ""
            raise InvalidModel(f"{self._source} has {what} {len(found)} times: {listed}{remedy}")
        return found[0] if found else None

    def fetch(self, file: PurePosixPath, limit: int, sha256: str | None = None) -> Path:
        """A file, from the cache or from where the artefacts are."""
        where, size = f"{file} of {self._source}", self._sizes.get(file, 0)

        def get(target: Path) -> None:
            if size > limit:
                raise InvalidModel(f"{where} has {size} bytes, at most {limit} are taken")
            if file.suffix in SUFFIXES:
                print(f"Downloading {where}", file=sys.stderr, flush=True)
            with _growing(target.parent, size):
                got = self._repository.download_artifacts(str(file), dst_path=str(target.parent))
            if target.parent in Path(got).parents:
                Path(got).replace(target)
            else:  # MLflow gives files of this machine as they lie
                shutil.copyfile(got, target)
            if target.stat().st_size > limit:
                raise InvalidModel(f"{where} has more than {limit} bytes")

        return kept(file.name, sha256, where, get)


@contextmanager
def _growing(folder: Path, total: int) -> Iterator[None]:
    """Show how a folder fills up, which is all that MLflow lets one see of a download."""
    with bar(total or None) as shown:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                shown.update(size - shown.n)

        watcher = threading.Thread(target=watch, daemon=True)
        if not shown.disable:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            if watcher.is_alive():
                watcher.join()


def _digest(tags: Mapping[str, str], source: str) -> str | None:
    """The tag `sha256`, if there is one. Raises InvalidModel if it is none."""
    sha256 = tags.get("sha256")
    if sha256 is not None and not re.fullmatch(DIGEST, sha256):
        raise InvalidModel(f"{source}: the tag sha256 must be 64 hexadecimal digits")
    return sha256


def _read_card(path: Path, source: str) -> dict[str, str]:
    """What model.json says, of FACTS; the archive's own is one of these. Raises InvalidModel."""
    try:
        content = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as exc:
        raise InvalidModel(f"{source}: {CARD_FILE} is not a JSON object") from exc
    return {name: str(content[name]) for name in FACTS if name in content}


def _check_facts(found: Mapping[str, str], source: str) -> dict[str, str]:
    """Those of FACTS. Raises InvalidModel: anyone who may tag a model writes them."""
    facts = {name: found[name] for name in FACTS if name in found}
    for name, value in facts.items():
        if not re.fullmatch(FACTS[name], value):
            raise InvalidModel(f"{source}: {value[:100]!r} is no {name}")
    return facts

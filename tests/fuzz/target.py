"""What is fuzzed: a check for any bytes, inputs to begin with, and words that it knows."""

import hashlib
import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent
NAMES = sorted(
    path.stem for path in (FOLDER / "targets").glob("*.py") if not path.stem.startswith("_")
)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parser, and what must hold for whatever it is given."""

    check: Callable[[bytes], None]  # raises anything: a finding
    seeds: Callable[[], list[bytes]]
    tokens: tuple[bytes, ...] = ()  # words of the format, for the mutations
    repair: Callable[[bytes], bytes] | None = None  # makes checksums right again, for half of them
    guides: tuple[tuple[Any, str], ...] = ()  # functions of libraries whose branches guide, too
    max_bytes: int = 4096
    cpu_seconds: float = 2.0  # of one execution


def load(name: str) -> Target:
    target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    assert isinstance(target, Target)
    return target


def regressions(name: str) -> list[Path]:
    """The inputs that once failed."""
    folder = FOLDER / "regressions" / name
    return sorted(folder.iterdir()) if folder.is_dir() else []


class Choices:
    """Decisions read off an input, so that a mutation of the bytes changes what is built.

    An input that is used up decides for the first of everything.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, below: int) -> int:
        width = 1 if below <= 256 else 4
        return int.from_bytes(self._take(width), "big") % below

    def chance(self) -> bool:
        return self.number(2) == 1

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]

    def blob(self, most: int) -> bytes:
        return self._take(self.number(most + 1))

    def text(self, most: int) -> str:
        return self.blob(most).decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self._take(len(self._data))

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken


_folder = tempfile.TemporaryDirectory(prefix="fuzz-")


def as_file(data: bytes, suffix: str = "") -> Path:
    """A file with this content; each has the name of the one before, if its suffix is the same."""
    path = Path(_folder.name) / f"input{suffix}"
    path.write_bytes(data)
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]

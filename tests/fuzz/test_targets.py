"""The short form: what once failed, then some thousand mutations of each target."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.fuzz.running import describe, keep_last_input, run
from tests.fuzz.target import FOLDER, NAMES, Target, load, regressions
from tests.fuzz.worker import Recorder

EXECUTIONS = 2000


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, id=f"{name}-{path.name}")
        for name in NAMES
        for path in regressions(name)
    ],
)
def test_what_once_failed(name: str, path: Path) -> None:
    load(name).check(path.read_bytes())


def test_every_regression_is_of_a_target() -> None:
    assert {folder.name for folder in (FOLDER / "regressions").iterdir()} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found(name: str) -> None:
    result = run(name, EXECUTIONS, 0, seed=1)
    said = "\n".join(map(result.text, result.findings))
    assert not result.findings, said
    assert result.executions >= EXECUTIONS, describe([result])


def planted(kind: str) -> Target:
    """A parser with a fault behind a word that only the tokens have."""

    def check(data: bytes) -> None:
        if b"word" in data and kind == "error":
            raise KeyError("planted")
        if b"word" in data and kind == "slow":
            sum(range(20_000_000))

    return Target(check=check, seeds=lambda: [b"seed"], tokens=(b"word",), cpu_seconds=0.1)


@pytest.mark.parametrize(("kind", "error"), [("error", "KeyError"), ("slow", "TimeoutError")])
def test_a_planted_fault_is_found_and_kept(kind: str, error: str, tmp_path: Path) -> None:
    target = planted(kind)
    tried = Recorder(target, tmp_path)
    for data in (b"seed", b"a word", b"word", b"words"):
        tried(data)
    [text] = tmp_path.glob("*.txt")
    assert error in text.read_text("utf-8")
    assert text.with_suffix("").read_bytes() == b"a word"


WITHOUT_ATHERIS = """
import sys
sys.modules["atheris"] = None  # as on the platforms for which it has no wheel
from tests.fuzz.worker import main
main(sys.argv[1:])
"""


def test_without_atheris_mutations_are_blind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_ATHERIS, "forms", "3000", "0", "1", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stat::number_of_executed_units: 3000" in done.stderr
    assert not [*tmp_path.glob("*.txt")]
    keep_last_input(tmp_path, "killed")  # as if it had died of the last one
    assert (tmp_path / "died").read_bytes()
    assert (tmp_path / "died.txt").read_text("utf-8") == "killed"


@pytest.mark.parametrize("planted", ["turn", "level", "refusal"])
def test_a_planted_difference_from_pillow_is_found(
    planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handler import images  # imports torch, which takes seconds

    target = load("images")
    if planted == "turn":
        monkeypatch.setitem(images.UPRIGHT, 6, images.UPRIGHT[8])
    elif planted == "level":
        monkeypatch.setattr(images, "to_rgb", lambda image: image.convert("RGB"))
    else:
        monkeypatch.setattr(images, "_open", lambda data: Image.open(BytesIO(data[:100])))

    def check_all() -> None:
        for seed in target.seeds():
            target.check(seed)

    with pytest.raises(AssertionError):
        check_all()

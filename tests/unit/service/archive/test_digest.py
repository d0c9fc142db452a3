"""What an archive is made from, and whether one is up to date."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from handler.errors import InvalidSettings
from service.archive import digest as digests
from service.archive import weights
from service.archive.digest import CODE, file_facts, is_current, untrained_facts
from service.archive.mar import read_card
from service.archive.packaging import package
from service.plan import PackagePlan
from service.torchserve.config import ROOT
from tests.drawing import encode, plain
from tests.unit.service.planning import MODEL, RECIPE, own_weights, planned


@pytest.fixture
def plan(tmp_path: Path) -> PackagePlan:
    return planned(tmp_path)


def digest(plan: PackagePlan, architecture: str = MODEL) -> str:
    return digests.digest(plan, untrained_facts(architecture))


def test_digest_is_the_same_for_what_decides_no_content(plan: PackagePlan) -> None:
    config = {"batchSize": 9, "handler": {"threads": 3, "engine": "openvino"}}
    assert digest(replace(plan, config=config)) == digest(plan)
    assert len(digest(plan)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"name": "alexnet"},
        {"version": "2.0"},
        {"recipe": "R2"},
        {"weights_prefix": ""},
        {"transform_input": "on"},
        {"config": {"handler": {"engine": "torch"}}},
        {"config": {"handler": {}, "deviceType": "gpu"}},
    ],
    ids=str,
)
def test_digest_changes_with_each_input(plan: PackagePlan, change: dict[str, Any]) -> None:
    assert digest(replace(plan, **change)) != digest(plan)


def test_digest_changes_with_the_labels_file(plan: PackagePlan, tmp_path: Path) -> None:
    seen = {digest(plan)}
    for name, content in (("a.txt", "a\nb"), ("a.txt", "b\na"), ("a.json", "b\na")):
        (tmp_path / name).write_text(content)
        seen.add(digest(replace(plan, labels=tmp_path / name)))
    assert len(seen) == 4


def test_digest_changes_with_the_weights(plan: PackagePlan, tmp_path: Path) -> None:
    seen = {digest(plan), digest(plan, "alexnet")}
    for name, content in (("a.pth", b"1"), ("a.pth", b"2"), ("b.pth", b"2")):
        (tmp_path / name).write_bytes(content)
        seen.add(digests.digest(plan, file_facts(tmp_path / name)))
    assert len(seen) == 5


def test_digest_changes_with_the_calibration(plan: PackagePlan, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes(encode(plain()))
    calibrated = replace(plan, calibration=folder)
    before = digest(calibrated)
    assert before not in (digest(plan), digest(replace(calibrated, minimum_agreement=0.9)))
    (folder / ".hidden").touch()
    assert digest(calibrated) == before
    (folder / "1.png").write_bytes(encode(plain()))
    assert digest(calibrated) != before


def test_digest_changes_with_the_libraries(
    plan: PackagePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(plan)
    monkeypatch.setattr(digests, "version", lambda name: "0.0.0")
    assert digest(plan) != before


# --- The code


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Copies of our folders in place of them, to be edited."""
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in CODE]
    monkeypatch.setattr(digests, "CODE", tuple(copies))
    return copies


@pytest.mark.parametrize("folder", [0, 1], ids=["handler", "archive"])
def test_digest_changes_with_the_code(plan: PackagePlan, code: list[Path], folder: int) -> None:
    path = sorted(code[folder].glob("*.py"))[-1]
    seen = {digest(plan)}
    path.write_text(path.read_text() + "\nSEED = 1\n")
    seen.add(digest(plan))
    (code[folder] / "new.py").write_text("")
    seen.add(digest(plan))
    path.unlink()
    seen.add(digest(plan))
    assert len(seen) == 4


def test_digest_is_the_same_for_comments_docstrings_and_layout(
    plan: PackagePlan, code: list[Path]
) -> None:
    path = code[0] / "edited.py"
    path.write_text('"""One."""\nclass A:\n  """Two."""\n  def f(self):\n    """Three."""\n')
    before = digest(plan)
    path.write_text(
        '# 1\nclass A:  # 2\n\n    """II."""\n\n    def f(self,\n    ):\n        """III."""\n'
    )
    assert digest(plan) == before
    path.write_text('class A:\n    """Two."""\n    def f(self):\n        return "Three."\n')
    assert digest(plan) != before


# --- Known to be up to date, without torch


def current(archive: Path, *argv: str) -> bool:
    return is_current(planned(archive.parent, *argv))


def test_options_and_comments_leave_an_archive_up_to_date(archive: Path, code: list[Path]) -> None:
    assert current(archive, "--batch-size", "3")
    with (code[0] / "images.py").open("a") as module:
        module.write("# a comment\n")
        module.flush()
        assert current(archive)
        module.write("A = 1\n")
    assert not current(archive)


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", RECIPE],
        ["--precision", "int8"],
        ["--device", "cuda"],
        ["--labels", "missing.txt"],
        ["--weights", "missing.pth"],
        ["--weights", "pretrained"],
    ],
    ids=" ".join,
)
def test_whatever_differs_is_left_to_packaging(archive: Path, argv: list[str]) -> None:
    assert not current(archive, *argv)


def test_a_missing_or_damaged_archive_is_left_to_packaging(archive: Path) -> None:
    assert not is_current(planned(archive.parent, model="birdnet"))
    archive.write_bytes(archive.read_bytes()[:-100])
    assert not current(archive)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLASSIFIER_ENV", "production"),  # refuses untrained weights
        ("CLASSIFIER_PRECISION", "int8"),  # has no engine
        ("CLASSIFIER_DEVICE", "cuda"),  # there is none
    ],
)
def test_what_the_environment_alone_says_is_left_to_packaging(
    archive: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(digests, "has_gpu", lambda: False)
    monkeypatch.setenv(name, value)
    assert not current(archive)


def test_limits_are_held_against_an_archive_that_is_up_to_date(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_MAX_RESPONSE_SIZE", "1000000")
    with pytest.raises(InvalidSettings, match="max_response_size is 1000000"):
        current(archive)


def test_own_weights_are_known_by_their_bytes(tmp_path: Path) -> None:
    given = own_weights(tmp_path, 2, ["a", "b"])
    archive = package(planned(tmp_path / "store", *given))
    assert current(archive, *given)
    for choice in (None, "pretrained", "untrained"):
        assert not is_current(replace(planned(archive.parent), weights=choice))
    (tmp_path / "birds.txt").write_text("b\na\n")
    assert not current(archive, *given)
    (tmp_path / "birds.txt").write_text("a\nb\n")
    (tmp_path / "birds.pth").write_bytes(b"other")
    assert not current(archive, *given)


def test_pretrained_weights_once_packaged_are_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "cached.pth")
    monkeypatch.setattr(weights, "download", lambda *_: tmp_path / "cached.pth")
    archive = package(replace(planned(tmp_path), weights=None))
    card = read_card(archive)
    assert card is not None
    assert (card.weights.name, card.weights.source) == (RECIPE, "torchvision")
    (tmp_path / "cached.pth").unlink()
    monkeypatch.delattr(weights, "download")
    for choice in (None, "pretrained"):
        plan = replace(planned(tmp_path), weights=choice)
        assert is_current(plan)
        assert package(plan) == archive


def test_an_archive_is_known_again_without_torch(archive: Path) -> None:
    """What ./scripts/serve imports and calls before Java starts."""
    code = (
        "import sys; import scripts.serve; from service.archive.digest import is_current; "
        "from service.options import parse_serve; from service.plan import plan_service; "
        "assert is_current(plan_service(parse_serve(sys.argv[1:])).packages[0]); "
        "print({'torch', 'torchvision', 'safetensors', 'numpy', 'PIL'} & {*sys.modules})"
    )
    argv = ["--model", MODEL, "--weights", "untrained", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        env=os.environ | {"TS_MODEL_STORE": str(archive.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "set()\n", done.stderr

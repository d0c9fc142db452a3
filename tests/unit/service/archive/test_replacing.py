"""What becomes of an archive whose place another takes."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.model_card import ModelCard, WeightsFacts
from service.archive import packaging
from service.archive.mar import put, read_card
from service.archive.packaging import package
from service.archive.weights import Source, find_weights
from tests.unit.service.planning import MODEL, RECIPE, own_weights, planned

IMAGENET = WeightsFacts(name=RECIPE, trained=True, source="torchvision", sha256="0" * 64)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrained weights are there, which are random ones here."""

    def find(choice: str, *given: Any) -> Source:
        return Source(IMAGENET, None) if choice == "pretrained" else find_weights(choice, *given)

    monkeypatch.setattr(packaging, "find_weights", find)


def make(store: Path) -> ModelCard:
    """The card of an archive for which no weights are named."""
    card = read_card(package(replace(planned(store), weights=None)))
    assert card
    return card


def kept(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if path.suffix != ".mar")


def change_card(archive: Path, **changes: object) -> None:
    with zipfile.ZipFile(archive) as content:
        facts = json.loads(content.read("model.json"))
    put(archive, "model.json", json.dumps(facts | changes).encode())


@pytest.mark.usefixtures("online")
def test_own_weights_are_kept_each_time_that_pretrained_ones_take_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    for aside in (f"{MODEL}.mar.trained", f"{MODEL}.mar.trained-2"):
        before = package(planned(store, *own_weights(tmp_path, 2, ["a", "b"]))).read_bytes()
        assert make(store).weights == IMAGENET
        assert (store / aside).read_bytes() == before
        assert (
            f"warning: --weights is not given, so {MODEL}.mar gets {RECIPE}; "
            f"the archive with birds.pth is kept as {store / aside}\n"
        ) in capsys.readouterr().err


@pytest.mark.usefixtures("online")
def test_an_archive_of_another_release_is_kept_if_its_weights_are_nowhere_else(
    tmp_path: Path,
) -> None:
    archive = package(planned(tmp_path, *own_weights(tmp_path, 2, ["a", "b"])))
    change_card(archive, of_another_release=True)
    assert read_card(archive) is None
    before = archive.read_bytes()
    make(tmp_path)
    assert (tmp_path / f"{MODEL}.mar.trained").read_bytes() == before


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "weights", [{"trained": True, "source": "torchvision"}, {"trained": False, "source": "seed 0"}]
)
def test_pretrained_and_untrained_weights_are_not_kept(
    archive: Path, capsys: pytest.CaptureFixture[str], weights: dict[str, object]
) -> None:
    losses = {"int8": {"of": "another release"}, "confidence": {"images": 9}}
    change_card(archive, weights=weights, **losses, golden_images=2, golden_logits=True)
    assert read_card(archive) is None
    make(archive.parent)
    assert kept(archive.parent) == []
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {MODEL}.mar {loss}"
        for loss in (
            "had an int8 model; --calibration DIR makes it again",
            "was calibrated; --calibrate DIR does it again",
            "had golden images of yours; --golden DIR gives them again",
            "was compared with logits of yours; --golden-logits FILE does it again",
        )
    ]


@pytest.mark.usefixtures("online")
def test_what_cannot_be_read_is_kept(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive.write_bytes(b"of a release without cards, or damaged")
    make(archive.parent)
    assert kept(archive.parent) == [f"{MODEL}.mar.trained"]
    assert "the archive that was there, which cannot be read, is kept as" in capsys.readouterr().err


def test_weights_that_are_named_take_the_place_of_any(tmp_path: Path) -> None:
    archive = package(planned(tmp_path, *own_weights(tmp_path, 2, ["a", "b"])))
    assert package(planned(tmp_path, "--weights", "untrained")) == archive
    assert kept(tmp_path) == ["birds.pth", "birds.txt"]

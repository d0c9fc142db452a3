"""Answers of a worker, computed again from their log line; each difference has its name."""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.decoders import CpuDecoder
from handler.errors import SetupError
from handler.model_card import CARD_FILE, ModelCard
from scripts.replay import main
from service.archive.mar import seal
from service.replay.archives import find_archives
from service.replay.logged import read_logged
from service.replay.replay import Replay, describe, replay
from service.replay.trials import Trials, Way
from tests.drawing import encode, noise
from tests.unit.handler.conftest import isolation  # noqa: F401 - a fixture
from tests.unit.handler.worker import ask, b64, log, start
from tests.unit.tiny import make_model_dir, tiny_card

JPEG = encode(noise((1600, 1200)), "JPEG")  # large enough for `decode: fast`
OTHER = encode(noise((300, 200), seed=1), "JPEG")
Line = dict[str, Any]


def make_archive(path: Path, folder: Path, card: ModelCard) -> Path:
    """Of an unpacked one, with another card."""
    with zipfile.ZipFile(path, "w") as content:
        for file in folder.iterdir():
            if file.name != CARD_FILE:
                content.write(file, file.name)
        model = {"modelName": "birds", "modelVersion": "1.0"}
        content.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))
    seal(path, card)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_dir(tmp_path_factory.mktemp("archives") / "birds", openvino=True)
    return make_archive(folder.with_suffix(".mar"), folder, tiny_card())


@pytest.fixture(scope="module")
def small(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive that differs in the recipe's resize."""
    card = tiny_card()
    card = replace(card, inputs_sha256="4" * 64, transform=replace(card.transform, resize_size=232))
    path = tmp_path_factory.mktemp("others") / "small.mar"
    return make_archive(path, archive.with_suffix(""), card)


@pytest.fixture
def line(
    archive: Path,
    isolation: list[object],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., Line]:
    """The log's line of a request, with settings, to a worker of the archive."""

    def ask_worker(image: bytes = JPEG, **settings: Any) -> Line:
        # The card in the folder has the digest of the archive's.
        ask(start(archive.with_suffix(""), **settings), {"body": image})
        return log(caplog, "request")[-1]

    return ask_worker


def replayed(line: Line, *given: Path, image: bytes = JPEG) -> Replay:
    return replay(read_logged(json.dumps(line), "x.jpg"), image, given, Path("no-store"))


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "openvino", "precision": "fp32", "cache_bytes": 10**6},
        {"engine": "torch", "precision": "bf16"},
        {"engine": "torch", "decode": "fast"},
    ],
    ids=str,
)
def test_the_same_answer(
    archive: Path, line: Callable[..., Line], settings: dict[str, Any]
) -> None:
    logged = line(**settings)
    found = replayed(logged, archive)
    assert found.same
    assert found.best.confidence == pytest.approx(logged["confidence"], abs=1e-5)
    assert found.engine == logged["engine"]
    assert found.checked == ("sha256" if "cache_bytes" in settings else "number of bytes")
    assert set(found.differences) == {"code"}, "tests/unit/tiny.py invents that digest"


@pytest.mark.parametrize(
    ("settings", "claimed", "explained"),
    [
        ({"engine": "torch", "precision": "bf16"}, {"engine": "torch-fp32"}, "precision: bf16"),
        ({"engine": "torch", "decode": "fast"}, {"decode": "exact"}, "decode: fast"),
    ],
)
def test_one_thing_was_another_then(
    archive: Path, line: Callable[..., Line], settings: Line, claimed: Line, explained: str
) -> None:
    found = replayed(line(**settings) | claimed, archive)
    assert not found.same
    assert found.as_json()["explained_by"] == [explained]
    assert f"explained by: {explained.replace(': ', ' (')})" in describe(found)


@pytest.mark.parametrize("in_folders", [False, True])
def test_another_archive_or_recipe_explains_it(
    archive: Path, small: Path, line: Callable[..., Line], in_folders: bool
) -> None:
    logged = line(engine="torch")
    given = [path.parent if in_folders else path for path in (archive, small)]
    found = replayed(logged | {"archive": "444444444444"}, *given)
    assert found.archive == str(small)
    assert [trial.changed for trial in found.explained_by] == ["recipe", "archive"]
    recipe, other = found.explained_by
    assert recipe.to == tiny_card().recipe
    assert str(archive) in other.to
    assert replayed(logged | {"archive": "5"}, given[1]).differences["archive"] == ("5", "4" * 12)


def test_what_cannot_be_tried_is_named(archive: Path, line: Callable[..., Line]) -> None:
    old = line(engine="torch")
    old |= {"libraries": old["libraries"] | {"pillow": "1.0"}, "confidence": 0.5}
    found = replayed(old | {"decoder": "nvjpeg"}, archive)
    assert (found.same, found.explained_by) == (False, [])
    assert set(found.differences) == {"library pillow", "decoder", "code"}
    assert "library pillow: 1.0 then" in describe(found)


def test_an_engine_that_is_not_here(archive: Path, line: Callable[..., Line]) -> None:
    found = replayed(line(engine="torch") | {"engine": "cuda-fp16"}, archive)
    assert found.engine.startswith("openvino-")
    assert found.differences["engine"] == ("cuda", "openvino")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("here", ["cpu", "nvjpeg"])
def test_the_decoder_of_a_gpu_takes_jpegs_alone(
    archive: Path,
    line: Callable[..., Line],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    here: str,
) -> None:
    """The line has the worker's decoder, whatever decoded the image."""
    image = encode(noise(), kind)
    monkeypatch.setattr(CpuDecoder, "name", here)
    logged = line(image, engine="torch") | {"decoder": "nvjpeg"}
    found = replayed(logged, archive, image=image)
    differs = kind == "JPEG" and here == "cpu"
    assert found.differences.get("decoder") == (("nvjpeg", "cpu") if differs else None)


def test_an_answer_in_place_of_a_line(archive: Path, isolation: list[object]) -> None:  # noqa: F811
    worker = start(archive.with_suffix(""), engine="torch")
    [one] = ask(worker, {"file": JPEG, "filename": b"a.jpg"})
    logged = read_logged(json.dumps(one.body), "other.jpg")
    assert replay(logged, JPEG, [archive], Path("no-store")).same
    [several] = ask(worker, {"body": {"images": [b64(OTHER), b64(JPEG)]}})
    with pytest.raises(SetupError, match="2 images, 0 of them"):
        read_logged(json.dumps(several.body), "a.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive": "9" * 12}, "the archive 999999999999 is needed"),
        ({"image_bytes": 3}, "another image: it has"),
        ({"image_sha256": "0" * 64}, "another image: its sha256"),
        ({"top_class": None, "status": 400, "error": "NoImage"}, "status 400, NoImage"),
        ({"engine": "abacus-fp32"}, "the engine 'abacus-fp32'"),
        ({"confidence": "?"}, "no line of a request"),
        ({"event": "ready"}, "neither"),
    ],
)
def test_what_cannot_be_told(
    archive: Path, line: Callable[..., Line], change: Line, message: str
) -> None:
    text = json.dumps(line(engine="torch") | change)
    with pytest.raises(SetupError, match=message):
        replay(read_logged(text, "x.jpg"), JPEG, [], store=archive.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("{}\n{}", "2 lines"), ("[]", "none"), ("{}" + " " * 2**24, "more than")],
)
def test_what_is_no_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "line").write_text(text)
    with pytest.raises(SetupError, match=message):
        read_logged(str(tmp_path / "line"), "x.jpg")


def test_the_command(
    archive: Path,
    line: Callable[..., Line],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged = line(engine="torch")
    image = tmp_path / "x.jpg"
    image.write_bytes(JPEG)
    assert main([json.dumps(logged), str(image), str(archive)]) == 0
    assert "\nsame\n" in capsys.readouterr().out
    stdin = io.TextIOWrapper(io.BytesIO(json.dumps(logged | {"confidence": 0.5}).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["-", str(image), str(archive), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False
    assert main([json.dumps(logged), str(tmp_path / "none.jpg"), str(archive)]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_damaged_archive_is_not_computed_with(archive: Path, tmp_path: Path) -> None:
    """Its card has the sha256 of each file."""
    broken = make_archive(tmp_path / "broken.mar", archive.with_suffix(""), tiny_card())
    with zipfile.ZipFile(broken, "a") as content:
        content.writestr("extra.py", "")
    [found] = find_archives([broken], Path("no-store"), "birds")
    with pytest.raises(SetupError, match=r"extra\.py"):
        Trials(JPEG, tmp_path / "unpacked").answer(Way(found, "auto"))

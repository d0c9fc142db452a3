"""./scripts/evaluate with a real service and the archive that it serves."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.colours import LABELS, encoded
from tests.server.serving import Server, run_script

# Rows: the folder that an image is in. Columns: its colour, which is what the model answers.
CONFUSION = ((6, 1, 0), (0, 3, 3), (0, 0, 2))
RIGHT, IMAGES = 6 + 3 + 2, 15


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of known colours in folders that are wrong for some, and one that is no image."""
    folder = tmp_path_factory.mktemp("evaluate") / "images"
    formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    for label, row in zip(LABELS, CONFUSION, strict=True):
        (folder / label).mkdir(parents=True)
        for colour, count in zip(LABELS, row, strict=True):
            for index in range(count):
                body = encoded(colour, formats[index % len(formats)], (300 + index, 200))
                (folder / label / f"{colour}{index}.img.png").write_bytes(body)
    assert sum(map(sum, CONFUSION)) == IMAGES
    (folder / "blue" / "broken.jpg").write_text("no image")
    return folder


def evaluate(folder: Path, *argv: str | Path) -> tuple[int, dict[str, Any], str]:
    done = run_script("evaluate", folder, *map(str, argv), "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def without_names(figures: dict[str, Any]) -> dict[str, Any]:
    return figures | {"target": ""}


def test_a_service_and_its_archive_have_the_figures_of_the_images(
    server: Server, store: Path, tree: Path, tmp_path: Path
) -> None:
    archive = store / f"{server.model}.mar"
    url = ["--url", server.url, "--model", server.model]
    status, served, _ = evaluate(tmp_path, tree, *url, "--against", archive)
    assert status == 0
    assert without_names(served["a"]) == without_names(served["b"])
    figures, compared = served["a"], served["comparison"]
    assert figures["failed"] == {"UnreadableImage": 1}
    assert (figures["top1"]["hits"], figures["top1"]["of"]) == (RIGHT, IMAGES + 1)
    assert figures["top5"]["hits"] == IMAGES, "there are three classes"
    pairs = [(p["truth"], p["predicted"], p["images"]) for p in figures["confused"]]
    assert pairs == [("green (1)", "blue (2)", 3), ("red (0)", "green (1)", 1)]
    assert {group["name"] for group in figures["slices"]["format"]} > {"JPEG", "WEBP", "GIF"}
    assert (compared["both"], compared["neither"]) == (RIGHT, IMAGES + 1 - RIGHT)
    assert compared["verdict"] == "no difference shown (p=1)"


def test_the_bound_decides_the_exit_status(store: Path, tree: Path, tmp_path: Path) -> None:
    [archive] = store.glob("*.mar")
    share = RIGHT / IMAGES
    argv: list[str | Path] = [tree, "--archive", archive, "--without-failed"]
    assert evaluate(tmp_path, *argv, "--min-top1", str(share))[0] == 0
    status, _, said = evaluate(tmp_path, *argv, "--min-top1", str(share + 1e-9))
    assert status == 1
    assert "is below" in said
    assert "Traceback" not in said

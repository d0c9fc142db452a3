"""./scripts/predict with many images: what it writes, prints and returns."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from service.bulk import report
from service.bulk.formats import COLUMNS
from service.bulk.summary import Summary
from tests import ROOT
from tests.drawing import encode, noise, plain
from tests.unit.service.bulk.serving import Says, Service, failure, serving, success

EVIL = "<img src=x onerror=alert(1)>&'\".png"


def predict(service: Service, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), *map(str, argv)]
    return subprocess.run(
        [*command, "--url", service.url, "--model", "m", "--concurrency", "4"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images, of which the service is less sure of each than of the one before, and a text."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["1.png", "2.png", "3.png", "=4.png", "Käfer 猫.png", EVIL]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encode(noise(seed=number)))
    (folder / "bad.jpg").write_text("no image")
    return folder


def says(image: bytes, time: int) -> Says:
    if image == b"no image":
        return failure(400, "UnreadableImage")
    order = [encode(noise(seed=number)) for number in range(6)].index(image)
    return success("<b>cat</b>" if order == 5 else "cat", round(0.9 - order / 10, 2))


def test_a_folder_becomes_lines_a_summary_and_a_report(images: Path, tmp_path: Path) -> None:
    output, html = tmp_path / "r.jsonl", tmp_path / "r.html"
    key = tmp_path / "key"
    key.write_text("s3cret-of-mine\n")
    argv = (images, "--output", output, "--html", html, "--key-file", key)
    with serving(says) as service:
        first = predict(service, *argv, "--json")
        second = predict(service, *argv)
    assert (first.returncode, first.stderr) == (1, "")
    assert service.keys == {"s3cret-of-mine"}
    [line] = first.stdout.splitlines()
    summary = json.loads(line)
    assert summary["images"] == 7
    assert summary["classified"] == 6
    assert summary["failed"] == {"UnreadableImage": 1}
    assert summary["classes"] == [
        {"class": "cat", "class_id": 3, "images": 5},
        {"class": "<b>cat</b>", "class_id": 3, "images": 1},
    ]
    assert summary["models"] == {"m 1.0": 6}
    assert (summary["new"], summary["skipped"]) == (7, 0)
    assert sorted(record["image"] for record in records(output)) == sorted(
        str(path) for path in images.iterdir()
    )
    assert "7 images: 6 classified, 1 failed" in second.stdout
    assert "this run: 0 in" in second.stdout
    assert all(len(times) == 1 for times in service.asked.values())
    written = [output.read_text(), html.read_text(), first.stdout, second.stdout]
    assert not any("s3cret" in text for text in written)


def test_the_report_escapes_names_and_is_sorted(images: Path, tmp_path: Path) -> None:
    html = tmp_path / "r.html"
    with serving(says) as service:
        predict(service, images, "--output", tmp_path / "r.jsonl", "--html", html)
    text = html.read_text("utf-8")
    assert re.findall(r"<strong>(.+?) %", text) == [f"{p}0.00" for p in range(4, 10)]
    assert text.count('<img src="data:image/jpeg;base64,') == 6
    assert "<b>cat</b>" not in text
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&#39;&#34;.png" in text
    assert not re.search(r"<script|https?:|(?:src|href)=\"(?!data:image/jpeg;base64,)", text)
    assert "UnreadableImage it is" in text


def test_the_report_is_bounded_and_keeps_the_least_sure(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_IMAGES", 2)
    rows = [{"status": "success", "image": str(images / name), "sha256": "of another"}
            | {"predictions": [{"class": "c", "class_id": 1, "confidence": p}]}
            for name, p in (("1.png", 0.5), ("2.png", 0.1), ("3.png", 0.3))]  # fmt: skip
    summary = Summary(images=3, classified=3)
    report.write_report(rows, images.iterdir(), summary, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text("utf-8")
    assert re.findall(r"<strong>(.+?) %", text) == ["10.00", "30.00"]
    assert "2 of 3 classified images" in text
    assert text.count("no thumbnail") == 2, "the files are others now"


def test_thumbnails_are_of_what_can_be_opened_here() -> None:
    wide = report.draw_thumbnail(encode(plain(size=(1000, 500)), "JPEG"))
    assert wide is not None
    assert len(wide) < 2000
    for body in (b"", b"no image", encode(plain(), "GIF"), encode(plain())[:40]):
        assert report.draw_thumbnail(body) is None


def test_one_image_is_no_plural() -> None:
    assert Summary(images=1, classified=1).lines()[0] == "1 image: 1 classified, 0 failed"
    assert Summary().lines()[0] == "0 images: 0 classified, 0 failed"


def test_csv_and_parquet_have_what_the_lines_have(images: Path, tmp_path: Path) -> None:
    paths = {kind: tmp_path / f"r.{kind}" for kind in ("csv", "parquet")}
    with serving(says) as service:
        for path in paths.values():
            assert predict(service, images, "--output", path).returncode == 1
    with paths["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(paths["parquet"])
    assert tuple(rows[0]) == tuple(table.column_names) == COLUMNS
    lines = records(Path(f"{paths['csv']}.jsonl"))
    assert [row["image"] for row in rows] == [record["image"] for record in lines]
    by_name = {Path(row["image"]).name: row for row in rows}
    first, bad = by_name["1.png"], by_name["bad.jpg"]
    assert (first["class"], first["confidence"], first["width"]) == ("cat", "0.9", "64")
    assert [p["class"] for p in json.loads(first["predictions"])] == ["cat", "dog"]
    assert (bad["status"], bad["error"], bad["class"]) == ("error", "UnreadableImage", "")
    found = {Path(row["image"]).name: row for row in table.to_pylist()}
    assert found.keys() == by_name.keys()
    assert found["1.png"]["confidence"] == 0.9
    assert found["1.png"]["predictions"][1] == {"class": "dog", "class_id": 4, "confidence": 0.1}
    assert found["bad.jpg"]["class_id"] is None


def test_a_spreadsheet_computes_no_name(tmp_path: Path) -> None:
    """A name that is given without a folder begins the cell."""
    (tmp_path / "=HYPERLINK(1).png").write_bytes(encode(plain()))
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), "=HYPERLINK(1).png"]
    with serving(lambda image, time: success("@SUM(1)")) as service:
        subprocess.run(
            [*command, "--url", service.url, "--model", "m", "--output", "r.csv"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        )
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["image"], row["class"]) == ("'=HYPERLINK(1).png", "'@SUM(1)")


def test_mistakes_are_named_before_anything_is_sent(images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "key").write_text("two words")
    mistakes: dict[tuple[str | Path, ...], str] = {
        ("--html", "x.html"): "--html and --format need --output FILE",
        ("--output", tmp_path / "r.txt"): "end its name with .jsonl, .csv, .parquet",
        ("--output", tmp_path / "mine.csv"): "exists, and no",
        ("--output", tmp_path / "r.jsonl", "--key-file", tmp_path / "key"): "must have one key",
    }
    with serving(lambda image, time: success()) as service:
        for argv, message in mistakes.items():
            done = predict(service, images, *argv)
            assert done.returncode == 2
            assert message in done.stderr
            assert "two words" not in done.stderr
        done = predict(service, tmp_path / "empty", "--output", tmp_path / "r.jsonl")
        assert (done.returncode, "no images" in done.stderr) == (2, True)
    assert not service.asked
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_without_an_output_a_folder_is_answered_in_order(images: Path) -> None:
    with serving(says) as service:
        done = predict(service, images, "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    best = [answer["predictions"][0]["confidence"] for answer in answers[:6]]
    assert best == [0.9, 0.8, 0.7, 0.4, 0.6, 0.5], "by name: <img… before =4.png"
    assert [answer["type"] for answer in answers[6:]] == ["UnreadableImage"]
    assert done.returncode == 1


def test_a_path_that_does_not_exist_is_a_mistake(images: Path, tmp_path: Path) -> None:
    with serving(says) as service:
        done = predict(service, images, "missing", "--output", tmp_path / "r.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: missing does not exist\n"
    assert not service.asked
    assert list(tmp_path.iterdir()) == [images]


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").touch()
    with serving(says) as service:
        done = predict(service, tmp_path / "broken.zip")
    assert done.returncode == 1
    assert done.stdout.count("broken.zip") == 1

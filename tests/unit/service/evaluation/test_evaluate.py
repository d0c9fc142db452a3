"""./scripts/evaluate with a service that has a script: what it prints, writes and returns."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.evaluate import main
from service.evaluation.targets import drawn_image
from tests.drawing import encode, noise, plain
from tests.unit.service.bulk.serving import Says, Service, failure, serving, success

LABELS = ("<b>cat</b>", "dog", "owl")
EVIL = "<img src=x onerror=alert(1)>&'\".png"


def classes(*names: str) -> list[dict[str, Any]]:
    return [{"class": name, "class_id": LABELS.index(name)} for name in names]


def answer(*class_ids: int, sure: float = 0.75, **more: Any) -> Says:
    status, body, headers = success()
    assert isinstance(body, dict)
    predictions = [
        {"class": LABELS[index], "class_id": index, "confidence": sure / 4**rank}
        for rank, index in enumerate(class_ids)
    ]
    return status, body | {"predictions": predictions} | more, headers


def service_of(answers: dict[bytes, Says]) -> Callable[[bytes, int], Says | None]:
    """One with three classes, which refuses images that are not among these."""

    def says(image: bytes, time: int) -> Says:
        if image == drawn_image():
            message = "top_k must be a whole number from 1 to 3"
            wrong = {"status": "error", "code": 400, "type": "InvalidTopK", "message": message}
            return (400, wrong, {}) if time == 1 else answer(1, 2, 0)
        if image == b"busy" and time < 3:
            return failure(503, "Busy", Retry_After="0")
        return answers.get(image) or failure(400, "UnreadableImage")

    return says


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Evaluate = Callable[..., Done]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The command in this process."""

    def run(*argv: str | Path) -> Done:
        status = main([*map(str, argv), "--concurrency", "4"])
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of three classes, one of which is no image, and one that is not there."""
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        writer.writerows(
            [
                ("1.jpg", "dog"),
                (EVIL, "dog"),
                ("busy", "owl"),
                ("bad.png", "owl"),
                ("no.png", "owl"),
            ]
        )
    (folder / "1.jpg").write_bytes(encode(plain((250, 250, 250)), "JPEG"))
    (folder / EVIL).write_bytes(encode(noise()))
    (folder / "busy").write_bytes(b"busy")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def answers(images: Path) -> dict[bytes, Says]:
    return {
        (images / "1.jpg").read_bytes(): answer(1, 0, 2, set=classes("dog"), unknown=False),
        (images / EVIL).read_bytes(): answer(
            0, 1, 2, set=classes("dog", "<b>cat</b>"), unknown=True
        ),
        b"busy": answer(2, 1, 0, set=classes("<b>cat</b>"), unknown=False),
    }


def test_figures_as_json(
    evaluate: Evaluate, images: Path, answers: dict[bytes, Says], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("s3cret-of-mine")
    with serving(service_of(answers)) as service:
        done = evaluate(
            images, "--url", service.url, "--model", "m", "--json", "--key-file", tmp_path / "key"
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert service.keys == {"s3cret-of-mine"}
    assert "s3cret" not in done.stdout
    found = json.loads(done.stdout)
    assert (found["b"], found["comparison"]) == (None, None)
    figures = found["a"]
    assert figures["target"] == f"{service.url}/predictions/m"
    assert figures["images"] == 5
    assert figures["failed"] == {"UnreadableImage": 1, "UnreadableFile": 1}
    assert (figures["top1"]["hits"], figures["top1"]["of"]) == (2, 5)
    assert figures["top5"]["hits"] == 3
    assert (figures["sets"]["coverage"]["hits"], figures["sets"]["coverage"]["of"]) == (2, 3)
    assert figures["unknown"]["hits"] == 1
    formats = {group["name"]: group["top1"]["of"] for group in figures["slices"]["format"]}
    assert formats == {"JPEG": 1, "PNG": 1, "other": 3}
    light = {group["name"]: group["top1"]["of"] for group in figures["slices"]["brightness"]}
    assert light.pop("bright, 192 to 255") == 1, light


def test_the_report_escapes_names_and_loads_nothing(
    evaluate: Evaluate, images: Path, answers: dict[bytes, Says], tmp_path: Path
) -> None:
    html = tmp_path / "report.html"
    with serving(service_of(answers)) as service:
        done = evaluate(images, "--url", service.url, "--html", html)
    assert done.returncode == 0, done.stderr
    text = html.read_text("utf-8")
    assert "<b>cat</b>" not in text
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&#39;&#34;.png" in text
    assert text.count('<img src="data:image/jpeg;base64,') == 1, "the one that is confused"
    assert not re.search(r"<script|https:|url\(|(?:src|href)=\"(?!data:image/jpeg;base64,)", text)
    assert "UnreadableImage it is" in text
    assert "no such file" in text


def test_two_targets_are_compared(
    evaluate: Evaluate, images: Path, answers: dict[bytes, Says], tmp_path: Path
) -> None:
    """B is right where A is not, and the other way round."""
    html = tmp_path / "report.html"
    others = answers | {
        (images / "1.jpg").read_bytes(): answer(0, 1),
        (images / EVIL).read_bytes(): answer(1, 0),
    }
    with serving(service_of(answers)) as a, serving(service_of(others)) as b:
        against = f"{b.url}/predictions/m/2.0"
        done = evaluate(images, "--url", a.url, "--against", against, "--html", html)
    assert done.returncode == 0, done.stderr
    assert "5 images: both right 1, only A 1, only B 1, neither 2" in done.stdout
    assert "no difference shown (p=1)" in done.stdout
    assert f"B {against}" in done.stdout
    text = html.read_text("utf-8")
    assert "Only B is right" in text
    assert text.count('<img src="data:image/jpeg;base64,') == 3


@pytest.mark.parametrize(
    ("bound", "options", "status"),
    [("0.4", [], 0), ("0.41", [], 1), ("0.66", ["--without-failed"], 0)],
)
def test_the_bound_is_held_against_what_was_measured(
    evaluate: Evaluate,
    images: Path,
    answers: dict[bytes, Says],
    bound: str,
    options: list[str],
    status: int,
) -> None:
    with serving(service_of(answers)) as service:
        done = evaluate(images, "--url", service.url, "--min-top1", bound, *options)
    assert done.returncode == status, done.stderr
    assert ("reaches" if status == 0 else "is below") + f" {bound}" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--url", "http://user:secret@127.0.0.1:1"], "no user and password"),
        (["--url", "127.0.0.1:1"], "neither an http:// or https:// URL nor a .mar file"),
        (["--url", "http://127.0.0.1:1"], "does not answer"),
        (["--archive", "missing.mar"], "missing.mar is missing, damaged or no model archive"),
    ],
)
def test_a_target_that_is_wrong_is_named(
    evaluate: Evaluate, images: Path, argv: list[str], message: str
) -> None:
    done = evaluate(images, *argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr


def test_levels_are_those_of_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["images", "--set", "0.995"])
    assert ended.value.code == 2
    assert "--set: must be 0.5 to 0.99, got '0.995'; see" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 404])
def test_a_service_that_refuses_all_is_not_measured(
    evaluate: Evaluate, images: Path, status: int
) -> None:
    with serving(lambda image, time: failure(status, "Refused")) as service:
        done = evaluate(images, "--url", service.url)
    assert done.returncode == 2
    assert "Refused it is" in done.stderr


def test_an_option_that_the_service_does_not_have_is_not_measured(
    evaluate: Evaluate, images: Path
) -> None:
    said: Service
    with serving(lambda image, time: failure(400, "MalformedRequest")) as said:
        done = evaluate(images, "--url", said.url, "--set", "0.9", "--unknown")
    assert done.returncode == 2
    assert "MalformedRequest it is" in done.stderr
    assert len(said.asked[drawn_image()]) == 1


def test_an_unknown_label_stops_before_any_image_is_sent(
    evaluate: Evaluate, images: Path, answers: dict[bytes, Says]
) -> None:
    (images / "labels.csv").write_text("file,label\n1.jpg,dogs\n")
    with serving(service_of(answers)) as service:
        done = evaluate(images, "--url", service.url)
    assert done.returncode == 2
    assert "no class of the model: 'dogs'" in done.stderr
    assert set(service.asked) == {drawn_image()}


def renamed(answers: dict[bytes, Says]) -> Callable[[bytes, int], Says | None]:
    """A service whose classes 1 and 2 have each other's names."""

    def says(image: bytes, time: int) -> Says | None:
        text = json.dumps(service_of(answers)(image, time))
        text = text.replace('"dog"', '"wolf"').replace('"owl"', '"dog"').replace("wolf", "owl")
        status, body, headers = json.loads(text)
        return status, body, headers

    return says


@pytest.mark.parametrize("column", ["class_id", "label"])  # a folder may be named "1", too
@pytest.mark.parametrize(("index", "status"), [(0, 0), (1, 2)])
def test_an_index_that_means_another_class_is_not_compared(
    evaluate: Evaluate,
    images: Path,
    answers: dict[bytes, Says],
    column: str,
    index: int,
    status: int,
) -> None:
    (images / "labels.csv").write_text(f"file,{column}\n1.jpg,{index}\n")
    with serving(service_of(answers)) as a, serving(renamed(answers)) as b:
        done = evaluate(images, "--url", a.url, "--against", b.url)
    assert done.returncode == status, done.stderr
    assert ("label the images by name" in done.stderr) == bool(status)


def test_names_are_compared_across_other_orders_of_the_classes(
    evaluate: Evaluate, images: Path, answers: dict[bytes, Says]
) -> None:
    (images / "labels.csv").write_text("file,label\n1.jpg,dog\n")
    others = {(images / "1.jpg").read_bytes(): answer(2, 1, 0)}
    with serving(service_of(answers)) as a, serving(renamed(others)) as b:
        done = evaluate(images, "--url", a.url, "--against", b.url)
    assert "1 image: both right 1" in done.stdout, done.stderr

"""The output survives whatever its writer did not, and goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from handler.errors import SetupError
from service.bulk.results import Results
from service.bulk.sources import Image
from tests.unit.service.bulk.serving import failure, success

ONE, TWO, THREE = (Image(f"{name}.jpg", name.encode()) for name in ("one", "two", "three"))
GOOD: Any = success()[1]
BAD: Any = failure(400, "UnreadableImage")[1]
LATER: Any = failure(503, "Unavailable")[1]


def written(path: Path, *pairs: tuple[Image, Any]) -> Path:
    with Results(path) as results:
        for image, answer in pairs:
            results.add(image, answer)
    return path


def names(path: Path) -> list[str]:
    return [json.loads(line)["image"] for line in path.read_text().splitlines()]


def test_what_the_server_has_judged_is_not_asked_about_again(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", (ONE, GOOD), (TWO, BAD), (THREE, LATER))
    assert names(path) == ["one.jpg", "two.jpg", "three.jpg"]
    with Results(path) as results:
        assert [results.claim(image) for image in (ONE, TWO, THREE)] == [False, False, True]
        assert names(path) == ["one.jpg", "two.jpg"]
        results.add(THREE, GOOD)
    assert names(path) == ["one.jpg", "two.jpg", "three.jpg"]


def test_a_changed_image_is_a_new_one_and_so_is_another_name(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", (ONE, GOOD))
    with Results(path) as results:
        assert results.claim(Image("one.jpg", b"ONE"))
        assert results.claim(Image("copy.jpg", ONE.body))
        assert not results.claim(Image("copy.jpg", ONE.body)), "it is the second time"


def test_a_last_line_torn_anywhere_is_mended(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", (ONE, GOOD), (TWO, GOOD))
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    for cut in (end + 1, end + 40, end + 200, len(whole) - 1, end):
        path.write_bytes(whole[:cut])
        with Results(path) as results:
            assert [results.claim(image) for image in (ONE, TWO)] == [False, True]
            results.add(TWO, GOOD)
        assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("text", ["notes\n", '{"a": 1}\n', "[]\n", "1\nnotes", '{"image": "x"}\n'])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(SetupError, match="did not write"):
        Results(path)
    assert path.read_text() == text


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", (ONE, LATER))
    for _ in range(2):  # the first run replaces the file, the second finds nothing to mend
        with Results(path), pytest.raises(SetupError, match="another"):
            Results(path)
    with Results(path) as results:
        assert results.claim(ONE)


def test_a_name_that_is_no_text_is_escaped(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", (Image("\udcff\n\u202e.jpg", b"x"), GOOD))
    assert names(path) == ["\\udcff\n\u202e.jpg"]
    assert path.read_bytes().count(b"\n") == 1


def test_what_could_not_be_read_has_no_digest(tmp_path: Path) -> None:
    unreadable = Image("x.jpg", problem=("UnreadableFile", "x.jpg: Permission denied"))
    path = written(tmp_path / "r.jsonl", (unreadable, failure(0, "UnreadableFile")[1]))
    with Results(path) as results:
        assert results.claim(unreadable)

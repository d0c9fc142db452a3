"""Labelled images as they are given, and what is wrong with them."""

import csv
import json
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.evaluation.examples import Example, read_examples, resolve

LABELS = ("red", "green", "blue")
FILES = {"red/1.png": 0, "red/deep/2.JPG": 0, "green/3.webp": 1, "blue/4.gif": 2}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four images of three classes, and files that are no images."""
    folder = tmp_path / "images"
    for name in [*FILES, "red/notes.txt", "red/.hidden.png", ".cache/5.png"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def test_a_folder_csv_and_json_lines_say_the_same(tree: Path) -> None:
    by_name, by_index = tree / "names.csv", tree / "classes.csv"
    with by_name.open("w", newline="") as names, by_index.open("w", newline="") as indices:
        writers = csv.writer(names), csv.writer(indices)
        writers[0].writerow(["label", "file"])
        writers[1].writerow(["file", "class_id", "label"])
        for name, index in FILES.items():
            writers[0].writerow([LABELS[index], name])
            writers[1].writerow([name, index, "the index counts"])
    lines = tree / "lines.jsonl"
    rows = [{"file": name, "class_id": index} for name, index in FILES.items()]
    rows[0] = {"file": str(tree / "red/1.png"), "label": "red"}  # an absolute path
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    expected = {tree / name: index for name, index in FILES.items()}
    for given in (tree, by_name, by_index, lines):
        assert resolve(read_examples(given), LABELS) == expected
    by_index.rename(tree / "labels.csv")
    (tree / "blue" / "not in the file.png").write_bytes(b"x")
    assert resolve(read_examples(tree), LABELS) == expected


def test_a_name_goes_before_an_index() -> None:
    examples = [Example(Path(text), text) for text in ("1", "2", "0")]
    assert list(resolve(examples, ("1", "7", "2")).values()) == [0, 2, 0]


def test_a_name_of_two_classes_is_refused_and_their_indices_are_not() -> None:
    labels = ("heron", "crane", "crane")
    with pytest.raises(SetupError, match="'crane' names the classes 1 and 2: give class_id"):
        resolve([Example(Path("a"), "crane")], labels)
    examples = [Example(Path("a"), 1), Example(Path("b"), "2")]
    assert list(resolve(examples, labels).values()) == [1, 2]


def test_unknown_labels_are_named_before_any_image_is_sent() -> None:
    wrong: list[str | int] = [-1, 3, "pink", "3", "²", "9" * 5000, ""]
    examples = [Example(Path(str(n)), label) for n, label in enumerate(wrong)]
    with pytest.raises(SetupError) as caught:
        resolve(examples, LABELS)
    assert "no class of the model: -1, 3, 'pink', '3', '²' and 2 more" in str(caught.value)
    assert "such as 'red', or an index from 0 to 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\n1.png,red\n", "needs the columns file, and class_id or label"),
        ("a.csv", "", "needs the columns file"),
        (
            "a.csv",
            "file,class_id\n1.png,one\n",
            "line 2: class_id must be a class index, got 'one'",
        ),
        ("a.csv", "file,class_id\n1.png,-1\n", "line 2: class_id must be a class index"),
        ("a.csv", "file,class_id\n1.png\n", "line 2: 1.png needs class_id"),
        ("a.csv", "file,label\n,red\n", "line 2: file must be the path of an image"),
        ("a.csv", "file,label\n1.png,red\n./1.png,red\n", "has a label already"),
        ("a.csv", "file,label\n", "has no labelled images"),
        ("a.csv", "file,label\n\xff", "cannot be read as CSV"),
        ("a.jsonl", "[]", "line 1 must be an object"),
        ("a.jsonl", '{"file": "1.png"', "line 1 is no JSON"),
        ("a.jsonl", '\n{"file": "1.png"}', "line 2: 1.png needs class_id"),
        ("a.jsonl", '{"file": "1.png", "class_id": true}', "needs class_id"),
        ("a.jsonl", '{"file": "1.png", "class_id": "1", "label": "red"}', "needs class_id"),
        ("a.jsonl", '{"file": ["1.png"], "class_id": 1}', "file must be the path"),
        ("a.jsonl", '{"file": "1\\u0000.png", "class_id": 1}', "file must be the path"),
        ("a.jsonl", "{" + " " * 70_000 + "}", "line 1 has more than 65536 bytes"),
        ("a.jsonl", "[" * 60_000, "line 1 is no JSON"),
        ("a.txt", "1.png red", "is no folder, .csv or .jsonl"),
    ],
)
def test_a_list_that_is_wrong_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, "latin-1")
    with pytest.raises(SetupError) as caught:
        read_examples(tmp_path / name)
    assert message in str(caught.value)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"x")
    with pytest.raises(SetupError, match=r"a folder needs labels\.csv, or a folder for each class"):
        read_examples(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none.csv")

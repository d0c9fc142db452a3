"""Class names from every file in which people keep them."""

import json
from pathlib import Path
from typing import Any

import pytest

from handler.errors import InvalidModel
from service.archive.labels import check_labels, read_labels


def labels(path: Path, content: str | list[Any] | dict[str, Any]) -> list[str]:
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_text(content, "utf-8")
    return read_labels(path)


@pytest.mark.parametrize(
    "text",
    [
        "heron\ncrane\nowl",
        "heron\ncrane\nowl\n",
        "heron\r\ncrane\r\nowl\r\n",
        "  heron \n\tcrane\nowl\n\n\n  \n",
        "\ufeffheron\ncrane\nowl\n",
    ],
    ids=["plain", "last line end", "Windows", "blanks", "BOM"],
)
def test_labels_from_text(tmp_path: Path, text: str) -> None:
    assert labels(tmp_path / "labels.txt", text) == ["heron", "crane", "owl"]


ANIMALS = ["heron", "crane", "owl"]


@pytest.mark.parametrize(
    "text",
    [
        '["heron", "crane", "owl"]',
        "['heron', 'crane', 'owl']",
        '{"heron": 0, "crane": 1, "owl": 2}',
        "{0: 'heron', 1: 'crane', 2: 'owl'}",
        "- heron\n- crane\n- owl\n",
        "names:\n  - heron\n  - crane\n  - owl\n",
        "---\n- heron\n- crane\n- owl\n",
        "0 heron\n1 crane\n2 owl\n",
        "2 owl\n0 heron\n1 crane\n",
        "0: heron\n1: crane\n2: owl\n",
        "0. heron\n1. crane\n2. owl\n",
        "0\theron\n1\tcrane\n2\towl\n",
        "0,heron\n1,crane\n2,owl\n",
        "class_id,label\n1,crane\n0,heron\n2,owl\n",
        "heron,0\ncrane,1\nowl,2\n",
        "heron: 0\nowl: 2\ncrane: 1\n",
        "heron 0\nowl 2\ncrane 1\n",
        '"heron"\n"crane"\n"owl"\n',
        "'heron',\n'crane',\n'owl',\n",
        "n02009912 heron\nn02012849 crane\nn01622779 owl\n",
    ],
)
@pytest.mark.parametrize("name", ["labels.txt", "LABELS.names"])
def test_other_forms_are_known_by_their_content(tmp_path: Path, name: str, text: str) -> None:
    assert labels(tmp_path / name, text) == ANIMALS


@pytest.mark.parametrize(
    "text",
    [
        "heron\ncrane\nowl\n",
        "label\nheron\ncrane\nowl\n",
        "0,heron\n1,crane\n2,owl\n",
        "index;name\n2;owl\n1;crane\n0;heron\n",
        "name,class_id\nheron,0\ncrane,1\nowl,2\n",
        "id,wnid,label\n0,n02009912,heron\n1,n02012849,crane\n2,n01622779,owl\n",
        "n02009912,heron\nn02012849,crane\nn01622779,owl\n",
        "0 heron\n1 crane\n2 owl\n",
        "id,name,size\n0,heron,1\n1,crane,0\n2,owl,2\n",
    ],
)
def test_labels_from_csv(tmp_path: Path, text: str) -> None:
    assert labels(tmp_path / "x.csv", text) == ANIMALS
    assert labels(tmp_path / "x.CSV", text) == ANIMALS


def test_commas_in_names(tmp_path: Path) -> None:
    text = '1,"crane, bird"\n0,"crane, machine"\n'
    assert labels(tmp_path / "x.csv", text) == ["crane, machine", "crane, bird"]
    assert labels(tmp_path / "x.txt", text) == ["crane, machine", "crane, bird"]
    text = "tench, Tinca tinca\ngoldfish, Carassius auratus\n"  # ImageNet's, one a line
    assert labels(tmp_path / "x.txt", text) == text.splitlines()


@pytest.mark.parametrize(
    "text",
    [
        "5 euro\n10 euro\n20 euro\n",
        "class 0\nclass 1\nclass 2\n",
        "0\n1\n2\n",
        "[unknown]\nant\nbee\n",
        "7-spot ladybird\n2-spot ladybird\n10-spot ladybird\n",
        "- ant\nbee\ncat\n",
        "names:\nant\nbee\n",
    ],
)
def test_names_that_only_look_like_another_form_stay(tmp_path: Path, text: str) -> None:
    assert labels(tmp_path / "x.txt", text) == text.split("\n")[:-1]


@pytest.mark.parametrize(
    "text",
    [
        "- heron\n- crane\n- owl\n",
        "0: heron\n2: owl\n1: crane\n",
        "heron: 0\nowl: 2\ncrane: 1\n",
        "path: data\nnc: 3\nnames:\n  0: heron\n  1: crane\n  2: owl\n",
        "names: [heron, crane, owl]\nnc: 3\n",
    ],
)
@pytest.mark.parametrize("name", ["data.yaml", "data.YML"])
def test_labels_from_yaml(tmp_path: Path, name: str, text: str) -> None:
    assert labels(tmp_path / name, text) == ANIMALS


def test_names_in_yaml_are_as_they_are_written(tmp_path: Path) -> None:
    text = "- no\n- 007\n- 1.50\n- null\n- 2020-01-01\n"
    assert labels(tmp_path / "x.yaml", text) == ["no", "007", "1.50", "null", "2020-01-01"]


@pytest.mark.parametrize(
    "content",
    [
        ["heron", "crane", "owl"],
        {"0": "heron", "1": "crane", "2": "owl"},
        {"2": "owl", "0": "heron", "1": "crane"},
        {"0": ["n02009912", "heron"], "1": ["n02012849", "crane"], "2": ["n01622779", "owl"]},
        [["n02009912", "heron"], ["n02012849", "crane"], "owl"],
        {"heron": 0, "crane": 1, "owl": 2},
        {"owl": 2, "heron": 0, "crane": 1},
        {"class_to_idx": {"owl": 2, "heron": 0, "crane": 1}},
        {"classes": ["heron", "crane", "owl"]},
        {
            "model_type": "resnet",
            "id2label": {"0": "heron", "1": "crane", "2": "owl"},
            "label2id": {"heron": 0, "crane": 1, "owl": 2},
        },
    ],
)
def test_labels_from_json(tmp_path: Path, content: list[Any] | dict[str, Any]) -> None:
    assert labels(tmp_path / "index_to_name.json", content) == ["heron", "crane", "owl"]


def test_class_to_idx_of_names_that_are_numbers(tmp_path: Path) -> None:
    """ImageFolder sorts names as text: class "10" is before class "2"."""
    content = {name: index for index, name in enumerate(sorted(map(str, range(12))))}
    given = labels(tmp_path / "class_to_idx.json", content)
    assert given == ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]


def test_more_than_ten_classes_keep_their_order(tmp_path: Path) -> None:
    content = {str(index): f"class {index}" for index in sorted(range(120), key=str)}
    assert labels(tmp_path / "x.json", content) == [f"class {index}" for index in range(120)]


def labels_refusal(path: Path, content: str | list[Any] | dict[str, Any]) -> str:
    with pytest.raises(InvalidModel) as refused:
        labels(path, content)
    assert f"--labels {path}" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("[", "is not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "is empty"),
        ("{}", "is empty"),
        ('"heron"', "must hold a list of names, index to name, or name to index, got 'heron'"),
        ("3", "must hold a list"),
        ("null", "must hold a list"),
        ('["heron", ""]', "class 1 has no name"),
        ('["heron", 3]', "class 1 must have a name, got 3"),
        ('["heron", null]', "class 1 must have a name, got None"),
        ('["heron", ["a", "b", "c"]]', "class 1 must have a name, got ['a', 'b', 'c']"),
        ('["heron", ["a", " "]]', "class 1 has no name"),
        ('[{"id": 1, "name": "heron"}]', "class 0 must have a name, got {'id': 1,"),
        ('{"1": "heron", "2": "owl"}', "they must be 0 to 1, each once: 0 is missing"),
        ('{"heron": 0, "owl": 2}', "they must be 0 to 1, each once: 1 is missing"),
        ('{"heron": 0, "owl": 0}', "they must be 0 to 1, each once: 0 is there twice"),
        ('{"heron": 0, "owl": true}', "neither the keys nor the values are the class indices"),
        ('{"0": "heron", "01": "owl"}', "neither the keys nor the values are the class indices"),
        ('{"heron": "a", "owl": "b"}', "the first keys are 'heron', 'owl'"),
        ('{"0": "heron", "1": "owl", "1": "crane"}', "the key '1' is there twice, for 'owl' and"),
        ('{"heron": 0, "owl": 1, "heron": 2}', "the key 'heron' is there twice, for '0' and"),
        ('["ant", "\\ud800", "cat"]', "the name of class 1, '\\ud800', holds half of a surrogate"),
        ('{"a\\udfff": 0}', "the name of class 0, 'a\\udfff', holds half of a surrogate"),
    ],
)
def test_bad_labels_in_json(tmp_path: Path, content: str, message: str) -> None:
    assert message in labels_refusal(tmp_path / "x.json", content)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "heron\n\nowl\n", "class 1 has no name"),
        ("x.txt", "\n \n", "is empty"),
        ("x.txt", "0 ant\n1 bee\n1 cat\n", "they must be 0 to 2, each once: 1 is there twice"),
        ("x.txt", "0 ant\n1 bee\n3 cat\n", "they must be 0 to 2, each once: 2 is missing"),
        ("x.txt", "1 ant\n2 bee\n3 cat\n", "are numbered from 1, and class indices begin at 0"),
        ("x.txt", '["ant",\n"bee"\n', "begins as JSON does, and is not valid JSON"),
        ("x.txt", '["ant", "ant"]}', "begins as JSON does, and is not valid JSON"),
        ("x.txt", '{"ant": 0, "ant": 1}', "the key 'ant' is there twice"),
        ("x.yaml", "ant: 0\nbee: 1\nant: 2\n", "the key 'ant' is there twice, for '0' and for '2'"),
        ("x.yaml", "names: {0: ant, 0: bee}", "the key '0' is there twice"),
        ("x.yaml", "0: 1\n1: 0\n", "which are names is unclear"),
        ("x.yaml", "ant\nbee\n", "must hold a list of names"),
        ("x.yaml", "a: [", "is not valid YAML"),
        ("x.yaml", "[" * 3000, "nested too deep"),
        ("x.yaml", "- ant\n- [a, b, c]\n", "class 1 must have a name"),
        ("x.yaml", '- ant\n- "\\uD800"\n', "holds half of a surrogate"),
        ("x.csv", "0,ant\n1,bee,insect\n", "row 2 has 3 columns, row 1 has 2"),
        ("x.csv", "0,ant\n\n1,bee\n", "row 2 has 0 columns"),
        ("x.csv", "ant,insect\nbee,insect\n", "which column holds the names is not certain"),
        ("x.csv", "tench, Tinca\nowl, Strix\n", "which column holds the names is not certain"),
        ("x.csv", "id,name\n1,ant\n2,bee\n", "holds the class indices 0 to 1, each once, in row"),
        ("x.csv", "0,ant,a\n1,bee,b\n", "which column holds the names is not certain"),
        ("x.csv", "file,label\na.jpg,ant\nb.jpg,bee\n", "holds the class indices 0 to 1"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert message in labels_refusal(tmp_path / name, text)


@pytest.mark.parametrize("data", [b"\xff\xfeh\0e\0", b"caf\xe9\n", None])
def test_labels_that_cannot_be_read_are_refused(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(InvalidModel, match=r"--labels .*x\.txt cannot be read as text"):
        read_labels(tmp_path / "x.txt")


def test_numbers_of_labels_and_classes_must_agree() -> None:
    check_labels(["a", "b"], 2, own=True)
    with pytest.raises(InvalidModel, match="--labels has 3 names, the weights have 5 classes"):
        check_labels(["x"] * 3, 5, own=True)
    with pytest.raises(InvalidModel, match="no --labels given, and the recipe has 1000 names, the"):
        check_labels(["x"] * 1000, 5, own=False)

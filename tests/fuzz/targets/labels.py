"""Files of class names: any bytes, and lists of names written in each form, which come back.

The first byte says which suffix the file has, or that it is built.
"""

import csv
import io
import json

import yaml

from handler.errors import InvalidModel
from service.archive.labels import read_labels
from tests.fuzz.target import Choices, Target, as_file

SUFFIXES = (".txt", ".json", ".yaml", ".csv", ".tsv", "")
BUILT = len(SUFFIXES)


def check(data: bytes) -> None:
    kind = data[0] % (BUILT + 1) if data else 0
    if kind == BUILT:
        check_built(Choices(data[1:]))
        return
    try:
        labels = read_labels(as_file(data[1:], SUFFIXES[kind]))
    except InvalidModel:
        return
    assert labels
    for label in labels:
        assert label.strip()
        label.encode()


def check_built(choices: Choices) -> None:
    """Names in a form that leaves no doubt are read, in their order."""
    names = [name_of(choices, index) for index in range(2 + choices.number(5))]
    form = choices.number(5)
    if form == 0:
        path = as_file(json.dumps(names).encode(), choices.one_of((".json", ".txt", "")))
    elif form == 1:
        by_index = {str(index): name for index, name in enumerate(names)}
        path = as_file(json.dumps(by_index).encode(), choices.one_of((".json", ".txt")))
    elif form == 2:
        text = yaml.safe_dump({"names": names}, allow_unicode=choices.chance())
        path = as_file(text.encode(), ".yaml")
    elif form == 3:
        order = sorted(range(len(names)), key=lambda index: choices.number(4))
        table = io.StringIO()
        writer = csv.writer(table, delimiter=choices.one_of(",;"))
        writer.writerows([("index", "name"), *((index, names[index]) for index in order)])
        path = as_file(table.getvalue().encode(), ".csv")
    else:
        lines = (f"{index}: {name}" for index, name in enumerate(names))
        path = as_file("\n".join(lines).encode(), ".txt")
    assert read_labels(path) == names, (path.read_bytes(), names)


def name_of(choices: Choices, index: int) -> str:
    """A name with a letter first, and its own number last, so that no two are equal."""
    inside = "".join(mark for mark in choices.text(12) if mark.isprintable() and mark not in ",;\t")
    return f"n{inside.replace(chr(34), '')}x{index}"


def seeds() -> list[bytes]:
    texts = [
        b"cat\ndog\n",
        b"0 cat\n1 dog",
        b"cat: 0\ndog: 1",
        b'["cat", "dog"]',
        b'{"0": ["n1", "cat"], "1": ["n2", "dog"]}',
        b"names:\n  0: cat\n  1: dog\n",
        b"{cat: 0, dog: 1}",
        b'index,name\n0,cat\n1,"dog, big"\n',
        b"- cat\n- no\n",
        b"n01440764 tench\nn01443537 goldfish",
        b"'cat',\n'dog',",
        b"\xef\xbb\xbfcat\r\ndog",
        b"[" * 600,
        b"&a [*a]",
        b'{"id2label": {"0": "a"}, "0": 1}',
    ]
    built = [bytes([BUILT, 2, 3, 97, 98, 99, 4, form, 5, 6, 7, 1, 2]) for form in range(8)]
    return [bytes([kind]) + text for kind in range(BUILT) for text in texts] + built


TOKENS = (
    b"class_to_idx",
    b"id2label",
    b"names:",
    b"index,name",
    b"n01440764",
    b'"',
    b"'",
    b"\\ud800",
    b"\x0c",
    b"\xe2\x80\xa8",
    b"- ",
    b": ",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"0\t",
)
TARGET = Target(check=check, seeds=seeds, tokens=TOKENS)

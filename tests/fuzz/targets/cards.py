"""model.json of an archive."""

import json

from handler.errors import InvalidModel
from handler.model_card import InputTransform, ModelCard, WeightsFacts
from tests.fuzz.target import Target


def check(data: bytes) -> None:
    try:
        card = ModelCard.from_json(data)
    except InvalidModel:
        return
    assert isinstance(card.weights, WeightsFacts)
    assert isinstance(card.transform, InputTransform)
    assert isinstance(card.labels, tuple)
    assert ModelCard.from_json(card.to_json()) == card


def seeds() -> list[bytes]:
    card = ModelCard(
        architecture="a",
        recipe="R",
        transform=InputTransform(
            resize_size=8,
            crop_size=8,
            interpolation="bilinear",
            antialias=True,
            mean=(1.0,),
            std=(),
        ),
        labels=("a", "é"),
        parameters={"total": 1},
        weights=WeightsFacts(name="n", trained=True, source="file", sha256="0"),
        int8=None,
        inputs_sha256="0",
        code_sha256=("0", "1"),
        packaged_with={},
        files={"b": "0"},
    )
    text = json.dumps(json.loads(card.to_json())).encode()
    deep = b'{"weights": ' + b"[" * 3000
    return [
        text,
        deep,
        b"[" * 3000,
        text.replace(b'"a"', b"9" * 3000),
        text.decode().encode("utf-16"),
    ]


TARGET = Target(
    check=check,
    seeds=seeds,
    tokens=(
        b'"weights": ',
        b'"labels": ',
        b'"transform": ',
        b'"files": ',
        b"null",
        b"NaN",
        b"1e999",
        b"\\ud800",
    ),
)

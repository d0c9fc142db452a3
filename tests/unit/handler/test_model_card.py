"""The facts in an archive: written, read back, and refused if they are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handler.errors import InvalidModel
from handler.model_card import CARD_FILE, ModelCard
from tests.unit.tiny import tiny_card


@pytest.mark.parametrize("trained", [True, False])
def test_a_card_survives_its_file(tmp_path: Path, trained: bool) -> None:
    (tmp_path / CARD_FILE).write_text(tiny_card(trained=trained).to_json(), "utf-8")
    assert ModelCard.read(tmp_path) == tiny_card(trained=trained)


def test_names_of_any_language_stay_readable(tmp_path: Path) -> None:
    facts = json.loads(tiny_card().to_json()) | {"labels": ["Käuzchen", "鷺", "сова"]}
    (tmp_path / CARD_FILE).write_text(json.dumps(facts), "utf-8")
    card = ModelCard.read(tmp_path)
    assert card.labels == ("Käuzchen", "鷺", "сова")
    assert "鷺" in card.to_json()


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("labels"),
        lambda facts: facts.pop("inputs_sha256"),
        lambda facts: facts.pop("files"),  # as before archives had them
        lambda facts: facts.update(files=[["weights.safetensors", "0"]]),
        lambda facts: facts["weights"].pop("trained"),
        lambda facts: facts.update(surprise=1),
        lambda facts: facts.update(labels=None),
        lambda facts: facts.update(weights=[]),
    ],
)
def test_a_card_of_another_version_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads(tiny_card().to_json())
    change(facts)
    with pytest.raises(InvalidModel, match="is not a model card"):
        ModelCard.from_json(json.dumps(facts))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"card"', "{}", b"\xff\xfe", "[" * 3000]
)
def test_what_is_no_card_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidModel, match="is not a model card"):
        ModelCard.from_json(text)


def test_a_missing_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel) as refusal:
        ModelCard.read(tmp_path)
    assert str(refusal.value) == "the archive has no model.json: package it again"

"""An archive in whose place another is put: what would be lost is kept, or said."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handler.model_card import ModelCard, WeightsFacts
from service.archive.mar import read_facts

# What the card of an archive has if it was made with an option, and what the option does.
LOSSES = (
    ("int8", "had an int8 model; --calibration DIR makes it again"),
    ("confidence", "was calibrated; --calibrate DIR does it again"),
    ("golden_images", "had golden images of yours; --golden DIR gives them again"),
    ("golden_logits", "was compared with logits of yours; --golden-logits FILE does it again"),
)


def make_way(archive: Path, card: ModelCard, named: bool) -> list[str]:
    """Keep an archive of which a new one, of `card`, would destroy the weights; the warnings.

    `named`: whether the user has named the weights of the new one. Else an archive that cannot be
    read is kept as well: it may be of another release. Raises OSError.
    """
    if not archive.exists():
        return []
    old = read_facts(archive)
    if named or not (what := _only_copy(old, card.weights)):
        return [f"{archive.name} {loss}" for loss in _losses(old, card)]
    aside = _free_name(archive)
    archive.replace(aside)
    return [
        f"--weights is not given, so {archive.name} gets {card.weights.name}; {what} is kept as "
        f"{aside}"
    ]


def _only_copy(old: Mapping[str, Any], new: WeightsFacts) -> str:
    """What the archive is called if its weights may be nowhere else; "" if they are not lost."""
    try:
        weights = old["weights"]
        if not weights["trained"] or weights["source"] == new.source:  # torchvision has its own
            return ""
        return f"the archive with {weights['name']}"
    except (KeyError, TypeError):
        return "the archive that was there, which cannot be read,"


def _losses(old: Mapping[str, Any], card: ModelCard) -> Iterator[str]:
    for field, loss in LOSSES:
        if old.get(field) and not getattr(card, field):
            yield loss


def _free_name(archive: Path) -> Path:
    """Of none that was kept before."""
    name, number = f"{archive.name}.trained", 1
    aside = archive.with_name(name)
    while aside.exists():
        number += 1
        aside = archive.with_name(f"{name}-{number}")
    return aside

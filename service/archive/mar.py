"""A model archive (.mar) as a file: what it says about itself, read, repacked and unpacked."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from handler.errors import InvalidModel, SetupError
from handler.model_card import CARD_FILE, ModelCard
from service.temporary import TemporaryFolder

CONFIG_FILE = "model-config.yaml"
DELAY = "maxBatchDelayOfServe"


def read_card(archive: Path) -> ModelCard | None:
    """The card of an archive; None if there is no archive or it is damaged anywhere."""
    try:
        with zipfile.ZipFile(archive) as content:
            return None if content.testzip() else ModelCard.from_json(content.read(CARD_FILE))
    except Exception:  # zipfile has many words for damage, and the cure is the same: make it again
        return None


def read_target(archive: Path) -> tuple[str, str]:
    """The name and the version under which an archive is served.

    Raises InvalidModel if it is no archive.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            model = json.loads(content.read("MAR-INF/MANIFEST.json"))["model"]
            return str(model["modelName"]), str(model["modelVersion"])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as exc:
        raise InvalidModel(f"{archive} cannot be read as a model archive") from exc


def read_config(archive: Path) -> dict[str, Any]:
    """The model configuration in an archive whose card could be read."""
    with zipfile.ZipFile(archive) as content:
        return parse_config(content.read(CONFIG_FILE))


def parse_config(text: str | bytes) -> dict[str, Any]:
    """What `dump_config` made a text of."""
    config = dict(yaml.safe_load(text))
    delay = config.pop(DELAY, None)
    return config if delay is None else config | {"maxBatchDelay": delay}


def dump_config(config: Mapping[str, Any]) -> str:
    """A model configuration as the YAML that an archive holds.

    TorchServe takes a maxBatchDelay of 0 for 100 ms. So it finds the least that it reads, and the 0
    stands beside it for ./scripts/serve, under a name that TorchServe ignores.
    """
    own = {"maxBatchDelay": 1, DELAY: 0} if config.get("maxBatchDelay") == 0 else {}
    return str(yaml.safe_dump({**config, **own}, sort_keys=False))


def configure(archive: Path, config: Mapping[str, Any]) -> None:
    """Put a configuration into an archive, if it has another. Raises SetupError."""
    if read_config(archive) == config:
        return
    try:
        with (
            zipfile.ZipFile(archive) as old,
            TemporaryFolder(".packaging-", archive.parent) as folder,
        ):
            made = folder / archive.name
            with zipfile.ZipFile(made, "w") as new:
                for item in old.infolist():
                    if item.filename == CONFIG_FILE:
                        new.writestr(item, dump_config(config))
                    else:  # piece by piece: an archive may be larger than the memory
                        with old.open(item) as source, new.open(item, "w") as target:
                            shutil.copyfileobj(source, target)
            made.replace(archive)
    except OSError as exc:
        raise SetupError(f"{archive} cannot be written: {exc}") from exc


def unpack(
    archive: Path, config: Mapping[str, Any] | None, folder: Path, digest: str | None = None
) -> Path:
    """Lay an archive out in `folder`, with this configuration in place of its own unless None.

    TorchServe takes such a folder as it takes an archive, and does not unpack it again.
    Raises SetupError, also if the archive was not made from the inputs with this digest.
    """
    try:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        if config is not None:
            (folder / CONFIG_FILE).write_text(dump_config(config), "utf-8")
    except (OSError, zipfile.BadZipFile) as exc:
        raise SetupError(f"{archive} cannot be unpacked in {folder}: {exc}") from exc
    if digest is not None and ModelCard.read(folder).inputs_sha256 != digest:
        raise SetupError(f"{archive} was replaced by another while this started: start again")
    return folder

"""A model archive (.mar) as a file: what it says about itself, read, repacked and unpacked."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from handler.errors import InvalidModel, SetupError
from handler.model_card import CARD_FILE, ModelCard
from service.archive.signing import check_signature
from service.temporary import TemporaryFolder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

CONFIG_FILE = "model-config.yaml"
SIGNATURE_FILE = "model.json.sig"  # of CARD_FILE
UNHASHED = {CARD_FILE, SIGNATURE_FILE, CONFIG_FILE}  # the configuration is each start's own
DELAY = "maxBatchDelayOfServe"


def read_card(archive: Path) -> ModelCard | None:
    """The card of an archive; None if there is no archive or it is damaged anywhere."""
    try:
        with zipfile.ZipFile(archive) as content:
            return None if content.testzip() else ModelCard.from_json(content.read(CARD_FILE))
    except Exception:  # zipfile has many words for damage, and the cure is the same: make it again
        return None


def read_facts(archive: Path) -> dict[str, Any]:
    """What the card of an archive of whatever release says; empty if it cannot be read."""
    try:
        with zipfile.ZipFile(archive) as content:
            return dict(json.loads(content.read(CARD_FILE)))
    except Exception:  # as above
        return {}


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


def member_sha256(archive: Path, name: str) -> str:
    """Of one file in an archive. Raises InvalidModel."""
    try:
        with zipfile.ZipFile(archive) as content:
            return hashlib.sha256(content.read(name)).hexdigest()
    except (OSError, zipfile.BadZipFile, KeyError) as exc:
        raise InvalidModel(f"{archive} cannot be read as a model archive") from exc


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
    if read_config(archive) != config:
        put(archive, CONFIG_FILE, dump_config(config).encode())


def seal(archive: Path, card: ModelCard) -> None:
    """Add the card to an archive without one, with the sha256 of each of its files. Raises OSError.

    The archiver adds a manifest of its own to what it is given, so this comes after it.
    """
    with zipfile.ZipFile(archive, "a") as content:
        files = {}
        for item in content.infolist():
            if not item.is_dir() and item.filename not in UNHASHED:
                digest = hashlib.sha256()
                with content.open(item) as file:
                    while chunk := file.read(2**20):
                        digest.update(chunk)
                files[item.filename] = digest.hexdigest()
        content.writestr(CARD_FILE, replace(card, files=files).to_json())


def sign(archive: Path, key: "Ed25519PrivateKey") -> None:
    """Put the signature of its card into an archive. Raises SetupError."""
    with zipfile.ZipFile(archive) as content:
        card = content.read(CARD_FILE)
    put(archive, SIGNATURE_FILE, key.sign(card))


def put(archive: Path, name: str, content: bytes) -> None:
    """Put a file into an archive, in place of the one of this name. Raises SetupError."""
    try:
        with (
            zipfile.ZipFile(archive) as old,
            TemporaryFolder(".packaging-", archive.parent) as folder,
        ):
            made = folder / archive.name
            with zipfile.ZipFile(made, "w") as new:
                for item in old.infolist():
                    if item.filename == name:
                        new.writestr(item, content)
                    else:  # piece by piece: an archive may be larger than the memory
                        with old.open(item) as source, new.open(item, "w") as target:
                            shutil.copyfileobj(source, target)
                if name not in old.namelist():
                    new.writestr(name, content)
            made.replace(archive)
    except OSError as exc:
        raise SetupError(f"{archive} cannot be written: {exc}") from exc


def unpack(
    archive: Path,
    config: Mapping[str, Any] | None,
    folder: Path,
    card: ModelCard | None = None,
    public_key: "Ed25519PublicKey | None" = None,
) -> Path:
    """Lay an archive out in `folder`, with this configuration in place of its own unless None.

    TorchServe takes such a folder as it takes an archive, and does not unpack it again.
    Raises SetupError, also if the card in it is not `card`, its files are not those that the card
    lists, or the card is not signed for `public_key`. What is checked is the folder, and not the
    archive, which others may write in the meantime. An archive without `card` is not checked.
    """
    try:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        if card is not None:
            check_folder(folder, archive, card, public_key)
        if config is not None:
            (folder / CONFIG_FILE).write_text(dump_config(config), "utf-8")
    except (OSError, zipfile.BadZipFile) as exc:
        raise SetupError(f"{archive} cannot be unpacked in {folder}: {exc}") from exc
    return folder


def check_folder(
    folder: Path, archive: Path, card: ModelCard, public_key: "Ed25519PublicKey | None"
) -> None:
    """Hold an unpacked archive against its card. Raises SetupError."""
    if ModelCard.read(folder) != card:
        raise SetupError(f"{archive} was replaced by another while this started: start again")
    try:
        if public_key:
            check_signature(folder / CARD_FILE, folder / SIGNATURE_FILE, public_key)
        found = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        }
        # Whatever it is called, the worker's Python might import it: the folder is on its path.
        if unknown := sorted(found - UNHASHED - card.files.keys()):
            raise InvalidModel(f"{unknown[0]} was not packaged with it")
        card.check_files(folder)
    except InvalidModel as exc:
        raise InvalidModel(f"{archive}: {exc}") from exc

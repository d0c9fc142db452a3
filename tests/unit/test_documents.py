"""What the documents say is held against the code."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from handler import errors
from handler.settings import PREFIX, Settings
from service.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
GATEWAY = (ROOT / "docs" / "gateway.md").read_text("utf-8")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_readme_shows_every_command(script: Path) -> None:
    """Modules with a main are commands; scripts/serve and scripts/test stand for two of them."""
    if "def main(" in script.read_text() and script.stem != "bootstrap":
        assert f"scripts/{script.name}" in README or f"scripts/{script.stem}" in README


@pytest.mark.parametrize("spec", fields(Settings), ids=lambda spec: spec.name)
def test_readme_lists_every_setting_with_its_default(spec: object) -> None:
    default = str(spec.default).lower()
    row = rf"\| `{PREFIX}{spec.name.upper()}` \| `{spec.name}` \| `?{default}`? \|"
    assert re.search(row, README)


def test_readme_lists_no_other_setting() -> None:
    named = set(re.findall(rf"{PREFIX}(\w+)", README))
    assert named <= {spec.name.upper() for spec in fields(Settings)}


@pytest.mark.parametrize("spec", fields(GatewaySettings), ids=lambda spec: spec.name)
def test_every_setting_of_the_gateway_is_listed_with_its_default(spec: object) -> None:
    default = f"`{spec.default}`" if spec.default != "" else ""
    assert f"| `GATEWAY_{spec.name.upper()}` | {default}".rstrip() in GATEWAY


def test_no_other_setting_of_the_gateway_is_named() -> None:
    named = set(re.findall(r"GATEWAY_(\w+)", README + GATEWAY))
    assert named <= {spec.name.upper() for spec in fields(GatewaySettings)}


def test_readme_lists_every_error_under_its_status() -> None:
    listed = dict[str, int]()
    for status, names in re.findall(r"^\| (\d{3}) \| (`.+?`) \|", README, re.MULTILINE):
        listed |= {name: int(status) for name in re.findall(r"`(\w+)`", names)}
    known = {
        cls.__name__: cls.status
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.RequestError)
    }
    known.pop("RequestError")
    assert listed == known


def test_readme_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "serve.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    options = set(re.findall(r"^\s+(--[a-z-]+)", done.stdout, re.MULTILINE))
    assert len(options) >= 13
    for option in options:
        assert f"`{option}" in README


def test_readme_links_lead_somewhere() -> None:
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (ROOT / target.partition("#")[0]).exists()


def test_every_line_of_config_properties_is_explained() -> None:
    explained = False
    for line in (ROOT / "config.properties").read_text().splitlines():
        if line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        else:
            assert explained, line

"""What the documents name exists, and the site that is made of them has no broken link."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from handler import errors
from handler.metrics import FAMILIES
from handler.settings import PREFIX, Settings
from service.chaos.checker import rules
from service.chaos.cluster import RESPONSE_SECONDS
from service.chaos.schedule import KINDS
from service.gateway.settings import GatewaySettings
from tests import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text("utf-8") for page in PAGES}
COMMANDS = sorted(p.name for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix)
FOLDERS = "handler|service|scripts|deploy|tests|docs|examples|benchmarks"
# Made by whoever follows the page, by a run, or for Grafana alone.
OTHER_FILES = {"deploy/keys/keys"}
OTHER_VARIABLES = {"CLASSIFIER_DASHBOARDS"}
RULES = (ROOT / "deploy" / "monitoring" / "rules.yml").read_text("utf-8")
RECORDED = set(re.findall(r"record: (classifier_\w+)", RULES))  # what Prometheus computes


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """mkdocs.yml is strict: a link or an anchor that leads nowhere fails the build."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "docs/api.html" in page
    assert not re.search(
        r"<(?:script|img|iframe)[^>]* src=.https?:|<link[^>]*stylesheet.*https?:", page
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_shown_with_options_that_it_has(name: str) -> None:
    """The tables of options are generated from the parsers."""
    lines = re.findall(rf"\./scripts/{name}\b([^`#\n]*)", "\n".join(TEXTS.values()))
    assert lines
    tables = re.findall(r"generated: options (\w+) -->(.+?)<!-- end", TEXTS["settings.md"], re.S)
    takes = {name, "serve"} if name in ("package", "tune") else {name}
    rows = "\n".join(rows for command, rows in tables if command in takes)
    known = set(re.findall(r"^\| `(--[\w-]+)", rows, re.MULTILINE)) | {"--help"}
    assert {option for line in lines for option in re.findall(r"--[a-z][\w-]+", line)} <= known


@pytest.mark.parametrize("page", TEXTS)
def test_no_other_setting_is_named(page: str) -> None:
    known = {f"GATEWAY_{spec.name.upper()}" for spec in fields(GatewaySettings)}
    known |= {f"{PREFIX}{spec.name.upper()}" for spec in fields(Settings)}
    named = set(re.findall(r"\b(?:GATEWAY|CLASSIFIER)_[A-Z_]+\b", TEXTS[page]))
    assert named - OTHER_VARIABLES <= known


@pytest.mark.parametrize("page", TEXTS)
def test_no_other_metric_is_named(page: str) -> None:
    series = {name for family, spec in FAMILIES.items() for name in spec.series(family)}
    named = set(re.findall(r"\bclassifier_\w+", TEXTS[page]))
    assert named <= series | FAMILIES.keys() | RECORDED


def test_every_metric_of_the_gateway_is_listed() -> None:
    """Those of a rollout as one."""
    code = [path.read_text("utf-8") for path in (ROOT / "deploy" / "gateway").glob("*.lua")]
    written = set(re.findall(r"# TYPE (gateway_(?:rollout_|\w+))", "\n".join(code)))
    listed = re.findall(r"^\| `(gateway_\w+)(?:…?)` \|", TEXTS["metrics.md"], re.MULTILINE)
    assert sorted(listed) == sorted(written)


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_is_named_exists(page: str) -> None:
    named = re.findall(rf"(?<![\w/.-])(?:\./)?((?:{FOLDERS})/[\w./-]*\w)", TEXTS[page])
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing <= OTHER_FILES


def test_every_rule_of_a_campaign_is_one_of_a_promise() -> None:
    """And no promise names another."""
    promises = re.findall(r"\*In a campaign.*?(?=\n\n)", TEXTS["reliability.md"], re.DOTALL)
    rows = [" ".join(text.split()) for text in promises[1:]]
    assert len(rows) == 6
    named = {name for row in rows for name in re.findall(r"`([\w ]+)`", row)}
    assert named - KINDS.keys() == {rule.name for rule in rules(RESPONSE_SECONDS)}


def test_every_error_is_listed_under_its_status() -> None:
    listed = dict[str, int]()
    rows = re.findall(r"^\| (\d{3}) \| (`.+?`) \|", TEXTS["api.md"], re.MULTILINE)
    for status, names in rows:
        listed |= {name: int(status) for name in re.findall(r"`(\w+)`", names)}
    known = {
        cls.__name__: cls.status
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.RequestError)
    }
    known.pop("RequestError")
    assert listed == known


def events_of(path: Path) -> set[str]:
    """The events that a module writes into the log; levels, which are in capitals, are none."""
    found = set[str]()
    for call in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name | ast.Attribute):
            name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
            named = [word.value for word in call.keywords if word.arg == "event"]
            if name in ("log", "log_line", "log_lines", "event"):
                named += call.args[:2]
            found |= {word.value for word in named if isinstance(word, ast.Constant)}  # type: ignore[misc]
    return {word for word in found if word == word.lower()}


def test_every_event_of_the_log_is_explained() -> None:
    code = [path for top in ("handler", "service") for path in (ROOT / top).rglob("*.py")]
    written = set[str]().union(*map(events_of, code))
    gateway = [path.read_text("utf-8") for path in (ROOT / "deploy" / "gateway").glob("*.*")]
    written |= set(re.findall(r'"event": "(\w+)"', "\n".join(gateway)))
    assert len(written) > 25
    table = TEXTS["operations.md"].partition("| event | meaning |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", "\n".join(cells)))
    assert written - {"request"} <= listed

"""What docs/deploy.md says is held against the code, and its figures against the reports."""

import re
from dataclasses import fields

import pytest

from handler.settings import Settings
from service.gateway.settings import GatewaySettings
from service.options import parse_serve
from tests.container.known import ROOT, dockerfile

TEXT = (ROOT / "docs" / "deploy.md").read_text("utf-8")
REPORTS = {"mobilenet_v2": "benchmarks/REPORT.md", "resnet50": "benchmarks/resnet50/REPORT.md"}


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (ROOT / "docs" / target).exists(), target


def test_every_build_argument_is_listed_and_no_other() -> None:
    table = TEXT[TEXT.index("| build argument") :].split("\n\n")[0]
    listed = {
        name
        for row in re.findall(r"^\| (`.+?) \|", table, re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == dockerfile()["ARG"].keys()


def test_variables_are_known() -> None:
    known = {f"GATEWAY_{spec.name.upper()}" for spec in fields(GatewaySettings)}
    known |= {f"CLASSIFIER_{spec.name.upper()}" for spec in fields(Settings)}
    assert set(re.findall(r"(?:GATEWAY|CLASSIFIER)_[A-Z_]+\b", TEXT)) <= known


def test_files_that_are_named_are_there() -> None:
    named = set(re.findall(r"\b(?:deploy|scripts)/[\w./-]*\w", TEXT)) - {"deploy/keys/keys"}
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "options", re.findall(r"\./scripts/serve((?: --?[\w-]+(?: [\w./]+)?)+)", TEXT), ids=str.strip
)
def test_command_lines_are_taken(options: str) -> None:
    parse_serve(options.split())


def rows() -> list[tuple[str, str, float, int, int]]:
    table = re.findall(r"^\| (\w+) \| (\w+) \| ([\d.]+) \| (\d+) \| (\d+) \|$", TEXT, re.MULTILINE)
    return [(m, p, float(rps), int(core), int(p99)) for m, p, rps, core, p99 in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1]}")
def test_capacity_is_that_of_the_reports(row: tuple[str, str, float, int, int]) -> None:
    model, precision, rps, per_core, p99_ms = row
    report = (ROOT / REPORTS[model]).read_text("utf-8")
    subject = f"ours-{precision}"
    cells = re.search(rf"^\| \*\*{subject}\*\*: .*?\| [\d.]+ \| ([\d.]+) \|", report, re.MULTILINE)
    p99 = re.search(rf"^\| {subject} \| 8 \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", report, re.MULTILINE)
    cores = re.search(r"^\| machine \| .*?(\d+) cores", report, re.MULTILINE)
    assert cells
    assert p99
    assert cores
    assert float(cells[1]) == rps
    assert round(rps / int(cores[1])) == per_core
    assert round(float(p99[1])) == p99_ms


def test_the_table_has_all_that_was_measured() -> None:
    assert len(rows()) == 2 * len(REPORTS)

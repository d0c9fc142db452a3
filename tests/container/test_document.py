"""The build arguments in docs/deploy.md are the Dockerfile's, its figures the reports'."""

import re

import pytest

from tests import ROOT
from tests.container.known import dockerfile

TEXT = (ROOT / "docs" / "deploy.md").read_text("utf-8")
CELL = r"\| ([\d.]+)(?: \([\d.–]+\))? "  # a median, and from several rounds its range
REPORTS = {"mobilenet_v2": "benchmarks/REPORT.md", "resnet50": "benchmarks/resnet50/REPORT.md"}


def test_every_build_argument_is_listed_and_no_other() -> None:
    table = TEXT[TEXT.index("| build argument") :].split("\n\n")[0]
    listed = {
        name
        for row in re.findall(r"^\| (`.+?) \|", table, re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == dockerfile()["ARG"].keys()


def rows() -> list[tuple[str, str, float, int, int]]:
    table = re.findall(r"^\| (\w+) \| (\w+) \| ([\d.]+) \| (\d+) \| (\d+) \|$", TEXT, re.MULTILINE)
    return [(m, p, float(rps), int(core), int(p99)) for m, p, rps, core, p99 in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1]}")
def test_capacity_is_that_of_the_reports(row: tuple[str, str, float, int, int]) -> None:
    model, precision, rps, per_core, p99_ms = row
    report = (ROOT / REPORTS[model]).read_text("utf-8")
    subject = f"ours-{precision}"
    cells = re.search(rf"^\| \*\*{subject}\*\*: .*?{CELL}{CELL}", report, re.MULTILINE)
    p99 = re.search(rf"^\| {subject} \| 8 {CELL}{CELL}{CELL}", report, re.MULTILINE)
    cores = re.search(r"^\| machine \| .*?(\d+) cores", report, re.MULTILINE)
    assert cells
    assert p99
    assert cores
    assert float(cells[2]) == rps
    assert round(rps / int(cores[1])) == per_core
    assert round(float(p99[3])) == p99_ms


def test_the_table_has_all_that_was_measured() -> None:
    assert len(rows()) == 2 * len(REPORTS)

"""metrics.yaml and the tables of the documents are as the code declares them."""

from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from handler.errors import SetupError
from handler.metrics import FAMILIES
from scripts.generate import PARSERS, main
from service.generated import ROOT, metrics_yaml, outdated, tables


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with an up-to-date metrics.yaml and one document."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "handler" / "configs").mkdir(parents=True)
    (tmp_path / "handler" / "configs" / "metrics.yaml").write_text(metrics_yaml(), "utf-8")
    return tmp_path


def document(repository: Path, text: str) -> Path:
    path = repository / "docs" / "page.md"
    path.write_text(text)
    return path


def test_everything_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_command_has_a_table() -> None:
    files = (ROOT / "scripts").glob("*.py")
    assert PARSERS.keys() == {path.stem for path in files if path.with_suffix("").exists()}


@pytest.mark.parametrize("name", [*tables({}), *(f"options {name}" for name in PARSERS)])
def test_every_table_is_in_a_document(name: str) -> None:
    documents = [path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")]
    assert any(f"<!-- generated: {name} -->" in text for text in documents)


def test_a_stale_table_is_replaced_and_the_rest_is_left_alone(repository: Path) -> None:
    path = document(
        repository,
        "# Before\n<!-- generated: buckets -->\nold\n<!-- end -->\nbetween\n"
        "<!-- generated: settings -->\n<!-- end -->\nafter\n",
    )
    text = outdated({}, repository)[path]
    assert text.startswith("# Before\n<!-- generated: buckets -->\n| histogram |")
    assert "old" not in text
    assert "<!-- end -->\nbetween\n<!-- generated: settings -->\n| variable |" in text
    assert text.endswith(" |\n<!-- end -->\nafter\n")
    path.write_text(text, "utf-8")
    assert outdated({}, repository) == {}


def test_a_changed_metrics_yaml_is_stale(repository: Path) -> None:
    path = repository / "handler" / "configs" / "metrics.yaml"
    path.write_text(path.read_text("utf-8") + "\n")
    assert outdated({}, repository) == {path: metrics_yaml()}


def test_a_table_that_there_is_not_is_refused(repository: Path) -> None:
    document(repository, "<!-- generated: metrix -->\n<!-- end -->\n")
    with pytest.raises(SetupError, match=r"page.md: the table metrix is unknown; known: metrics, "):
        outdated({}, repository)


def test_the_frontend_finds_all_that_makes_a_histogram() -> None:
    declared = yaml.safe_load(metrics_yaml())["model_metrics"]["counter"]
    found = {metric["name"]: metric["dimensions"] for metric in declared}
    labels = ["model", "version", "stage"]
    assert found["classifier_stage_seconds_bucket"] == [*labels, "le"]
    assert found["classifier_stage_seconds_sum"] == labels
    assert found["classifier_stage_seconds_count"] == labels
    assert "classifier_stage_seconds" not in found
    assert "classifier_stage_seconds" in FAMILIES


def test_options_are_listed_as_help_explains_them() -> None:
    serve, other = ArgumentParser(), ArgumentParser()
    for parser in (serve, other):
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of a worker")
    other.add_argument("images", nargs="+", metavar="IMAGE")
    other.add_argument("--tuned", nargs="?", metavar="FILE", help="best so far (default: not used)")
    other.add_argument("--seconds", type=float, default=2.0, help="measured (default: %(default)s)")
    other.add_argument("--json", action="store_true", help="for machines")
    found = tables({"serve": serve, "other": other})
    assert found["options serve"][2:] == ["| `--device cpu/cuda` | cpu | of a worker |"]
    assert found["options other"][2:] == [
        "| `IMAGE …` |  |  |",
        "| `--tuned [FILE]` | not used | best so far |",
        "| `--seconds SECONDS` | 2.0 | measured |",
        "| `--json` |  | for machines |",
    ]

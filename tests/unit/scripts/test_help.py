"""What the commands say of themselves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.generate import PARSERS

ROOT = Path(__file__).parents[3]
COMMANDS = sorted(
    path.stem for path in (ROOT / "scripts").glob("*.py") if (ROOT / "scripts" / path.stem).exists()
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_defaults_only_where_there_are_some(command: str) -> None:
    asked = [sys.executable, "-m", f"scripts.{command}", "--help"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"./scripts/{command}" in done.stdout
    assert "default: None" not in done.stdout
    assert "default: False" not in done.stdout


@pytest.mark.parametrize("command", PARSERS)
def test_defaults_are_named_in_one_form(command: str) -> None:
    parser = PARSERS[command]()
    for action in parser._actions:
        text = (action.help or "") % (vars(action) | {"prog": parser.prog})
        outside = re.sub(r"\(default: .*\)", "", text)
        assert f"({action.default})" not in outside
        assert "default: " not in outside
        assert "(the default" not in outside


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_options_is_one_line(command: str) -> None:
    asked = [sys.executable, "-m", f"scripts.{command}", "--modell=resnet50"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"; see ./scripts/{command} --help\n")
    assert done.stderr.count("\n") == 1

"""The unit against systemd and against the code. Nothing is started."""

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from service.options import parse_serve
from tests import ROOT
from tests.container.known import check_variables

UNIT = ROOT / "deploy" / "systemd" / "classifier.service"
HOME = "/opt/classifier"
MOST_EXPOSED = 15  # tenths of systemd's points, of 100

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze") and not os.environ.get("REQUIRE_EVERYTHING"),
    reason="systemd-analyze is not installed",
)


@pytest.fixture
def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def variables(service: configparser.SectionProxy) -> dict[str, str]:
    return dict(word.split("=", 1) for word in service["Environment"].split())


def test_the_command_is_one_of_the_code(service: configparser.SectionProxy) -> None:
    python, script, *options = service["ExecStart"].split()
    assert service["WorkingDirectory"] == HOME
    assert python == f"{HOME}/.venv/bin/python"
    assert script == "scripts/serve.py"
    args = parse_serve(options)
    assert (args.archives, args.gateway) == (("model_store",), True)


def test_variables_are_known_to_the_code(service: configparser.SectionProxy) -> None:
    check_variables(variables(service))


def test_jobs_are_kept_where_it_may_write(service: configparser.SectionProxy) -> None:
    folder = Path(variables(service)["GATEWAY_JOBS_FOLDER"])
    assert folder.parent == Path("/var/lib", service["StateDirectory"])


def test_a_stop_is_left_to_the_launcher(service: configparser.SectionProxy) -> None:
    """TorchServe and nginx would end at once on a SIGTERM of their own."""
    assert service["KillMode"] == "mixed"


@needs_systemd
def test_systemd_takes_it(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(HOME, str(ROOT)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_systemd_finds_it_hardened() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level" in done.stdout

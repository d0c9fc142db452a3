"""The Dockerfile against its linter and against the code. Nothing is built."""

import platform
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

from service.gateway.settings import GatewaySettings
from service.options import parse_serve
from tests import ROOT
from tests.container.known import check_variables, dockerfile, words

DOCKERFILE = ROOT / "Dockerfile"


def test_the_linter_has_nothing_to_say() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_whatever_the_linter_is_told_to_ignore_is_explained() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    ignored = [number for number, line in enumerate(lines) if "hadolint ignore" in line]
    assert ignored
    for number in ignored:
        assert re.match(r"# \w.*\.$", lines[number - 1]), lines[number]


def test_the_context_is_what_is_copied() -> None:
    copied = {
        source
        for line in dockerfile()["COPY"]
        if not line.startswith("--from=")
        for source in line.split()[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert let_through == copied | {"weights"}  # which WEIGHTS and LABELS are in
    assert all((ROOT / source).exists() for source in copied)


def test_the_base_is_pinned() -> None:
    assert re.fullmatch(
        r"docker\.io/library/python:3\.\d+\.\d+-slim-bookworm", dockerfile()["ARG"]["BASE"]
    )
    assert all(line.split()[0] in ("${BASE}", "libraries") for line in dockerfile()["FROM"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another OpenVINO than that of x86-64")
def test_what_is_left_out_is_there_with_the_pinned_versions() -> None:
    """The image would grow unnoticed else. -f, because arm64's OpenVINO lacks some of it."""
    (command,) = (line for line in dockerfile()["RUN"] if "site-packages && rm -r" in line)
    assert "&& rm -rf " in command
    patterns = command.split("rm -rf")[1].split("&&")[0].split()
    libraries = [name for name in patterns if re.match(r"(openvino|torch)/", name)]
    assert len(libraries) > 5
    (packages,) = site.getsitepackages()
    for pattern in libraries:
        assert list(Path(packages).glob(pattern)), pattern


def test_the_command_is_one_of_the_code() -> None:
    assert words("ENTRYPOINT") == ["python"]
    script, *options = words("CMD")
    assert script == "scripts/serve.py"
    args = parse_serve(options)
    assert args.archives == ("model_store",)
    assert args.models == ()
    assert args.gateway


def test_the_health_check_is_a_script() -> None:
    command, script = words("HEALTHCHECK")
    assert command == "python"
    assert (ROOT / script).is_file()


def test_variables_and_port_are_those_of_the_code() -> None:
    environment = dockerfile()["ENV"]
    check_variables(environment)
    assert environment["GATEWAY_HOST"] == "0.0.0.0"
    assert list(dockerfile()["EXPOSE"]) == [str(GatewaySettings.port)]


def test_nobody_is_root() -> None:
    assert list(dockerfile()["USER"]) == ["1000:1000"]

"""Starting, refusing to start, and stopping."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.gateway.clients import SMALL
from tests.gateway.conftest import Served
from tests.gateway.running import COMMAND, Load, kill, refused, running, settings
from tests.processes import free_port, wait_for
from tests.server.serving import environment, serving


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"GATEWAY_HOST": "0.0.0.0"}, ["GATEWAY_KEYS=off", "--new-key"]),
        ({"GATEWAY_PRT": "1"}, ["GATEWAY_PRT is unknown"]),
        ({"GATEWAY_PORT": "1;"}, ["GATEWAY_PORT", "'1;'"]),
        ({"GATEWAY_UPSTREAMS": "nowhere.invalid:1"}, ["nowhere.invalid"]),
        ({"GATEWAY_TLS_CERTIFICATE": __file__, "GATEWAY_TLS_KEY": __file__}, ["nginx refuses"]),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, env: dict[str, str], words: list[str]) -> None:
    line = refused(tmp_path, env)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(tmp_path, {"GATEWAY_PORT": str(port)})


def test_serve_without_nginx_says_so_first(tmp_path: Path, colours: list[str]) -> None:
    """On a machine without nginx: a copy of the repository that looks in no folder for it."""
    for name in ("handler", "service", "scripts", "config.properties", "examples"):
        path = ROOT / name
        shutil.copytree(path, tmp_path / name) if path.is_dir() else shutil.copy(path, tmp_path)
    gateway = tmp_path / "service" / "gateway" / "process.py"
    gateway.write_text(gateway.read_text().replace('"/usr/sbin"', '"/nowhere"'))
    programs = tmp_path / "bin"
    programs.mkdir()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "serve.py", *colours, "--gateway"],
        env=environment(tmp_path, {"PATH": str(programs), "PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: the gateway needs nginx: apt-get install nginx libnginx-mod-http-lua lua-cjson\n"
    )
    assert time.monotonic() - started < 60


def test_the_gateway_ends_when_nginx_does(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, {"GATEWAY_PORT": str(port)}) as gateway:
        nginx, *_ = psutil.Process(gateway.process.pid).children()
        children = nginx.children()
        nginx.kill()
        assert gateway.process.wait(30) == 1
        for child in children:
            child.kill()
    assert "nginx ended" in gateway.stderr.read_text()


def test_serve_ends_when_nginx_does(tmp_path: Path, colours: list[str], store: Path) -> None:
    env = {"TS_MODEL_STORE": str(store)}
    options = [*colours, "--gateway", "--gateway-port", str(free_port())]
    with serving(tmp_path, *options, env=env) as server:
        children = psutil.Process(server.process.pid).children()
        kill(next(child.pid for child in children if child.name() == "nginx"))
        assert server.process.wait(60) == 1
        assert "nginx ended with status -9" in server.text()
        wait_for(lambda: not [child for child in children if child.is_running()])


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    env = environment(tmp_path, {"TMPDIR": str(folder), "GATEWAY_PORT": str(free_port())})
    process = subprocess.Popen(COMMAND, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "Gateway on" in process.stderr.readline()
        assert list(folder.iterdir())
        process.terminate()
        assert process.wait(30) == 0
        assert not list(folder.iterdir())
    finally:
        process.kill()


def test_stopping_the_gateway_loses_no_accepted_request(gateway: Served, tmp_path: Path) -> None:
    with running(tmp_path, settings([gateway.server])) as other:
        with Load(f"{other.url}/predict", SMALL, clients=16) as load:
            load.wait(200)
            assert other.stop() == 0
        lines = other.lines()
    assert {line["status"] for line in lines} == {200}
    assert {line["request_id"] for line in lines} == load.answered


def test_serve_with_gateway_stops_gracefully(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    """First the gateway, then TorchServe: what was taken in is answered, and all is in the log."""
    port = free_port()
    env = {"TS_MODEL_STORE": str(store), "GATEWAY_RATE": "0"}
    options = [*colours, "--gateway", "--gateway-port", str(port)]
    with serving(tmp_path, *options, env=env) as server:
        started = psutil.Process(server.process.pid).children(recursive=True)
        with Load(f"http://127.0.0.1:{port}/predict", SMALL, clients=16) as load:
            load.wait(200)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
        taken = server.log("gateway")
        handled = server.log("request")
        assert not [child for child in started if child.is_running()]
    assert {line["status"] for line in taken} == {200}
    assert {line["request_id"] for line in taken} == load.answered
    assert {line["request_id"] for line in handled} == load.answered

"""Starting, refusing to start, and stopping."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from handler.errors import SetupError
from service.gateway import process
from service.logs import Log
from service.options import parse_serve
from service.plan import plan_service
from service.serving import prepare
from tests import skip
from tests.gateway.clients import SMALL
from tests.gateway.conftest import Served, serving_with_gateway
from tests.gateway.running import kill, refused, running, settings, variables
from tests.load import Load
from tests.processes import alive, wait_for


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


def test_serve_without_nginx_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    with pytest.raises(SetupError, match="the gateway needs nginx: apt-get install"):
        prepare(plan_service(parse_serve(["--gateway"])), Log("json"))
    assert not (tmp_path / "store").exists(), "nothing has been packaged"


def test_the_gateway_ends_when_nginx_does(tmp_path: Path) -> None:
    with running(tmp_path, {}) as gateway:
        nginx, *_ = psutil.Process(gateway.process.pid).children()
        children = nginx.children()
        nginx.kill()
        assert gateway.process.wait(30) == 1
        for child in children:
            child.kill()
    assert "nginx ended" in gateway.stderr.read_text()


def test_serve_ends_when_nginx_does(tmp_path: Path, colours: list[str], store: Path) -> None:
    with serving_with_gateway(tmp_path, colours, store) as served:
        launcher = served.server.process
        children = psutil.Process(launcher.pid).children()
        kill(next(child.pid for child in children if child.name() == "nginx"))
        assert launcher.wait(60) == 1
        assert "nginx ended with status -9" in served.server.text()
        wait_for(lambda: not alive(children))


def test_nothing_is_left_behind(tmp_path: Path, temporary: Path) -> None:
    with running(tmp_path, {"TMPDIR": str(temporary)}) as gateway:
        assert list(temporary.iterdir())
        assert gateway.stop() == 0
        assert not list(temporary.iterdir())


def test_a_closed_folder_is_refused(tmp_path: Path, temporary: Path) -> None:
    """nginx's workers, who are nobody's if we are root, could not get to pages and sockets."""
    if os.geteuid():
        skip("root's rights are needed")
    folder = temporary / "closed" / "tmp"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)
    said = refused(tmp_path, variables(upstreams="127.0.0.1:1") | {"TMPDIR": str(folder)})
    assert said.startswith(f"error: TMPDIR: {folder.parent} is closed to nobody")
    assert not list(folder.iterdir())


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
    with serving_with_gateway(tmp_path, colours, store) as served:
        server = served.server
        started = psutil.Process(server.process.pid).children(recursive=True)
        with Load(f"{served.url}/predict", SMALL, clients=16) as load:
            load.wait(200)
            server.process.terminate()
            assert server.process.wait(60) == 0
        assert not alive(started)
    assert {line["status"] for line in server.log("gateway")} == {200}
    for event in ("gateway", "request"):
        assert {line["request_id"] for line in server.log(event)} == load.answered

"""Ports, Java, and the process that is TorchServe's."""

import json
import os
import re
import select
import socket
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.ports import check_ports, free_ports
from service.torchserve import server as torchserve
from service.torchserve.config import ServerConfig
from service.torchserve.java import JAVA_CDS, find_java, memory_bounds
from service.torchserve.server import Served, TorchServe

# --- Ports


def test_free_ports_pass() -> None:
    one, other = free_ports(2)
    check_ports({"a": ("127.0.0.1", one), "b": ("0.0.0.0", other)})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_taken_port_is_named_with_its_purpose(silent_port: int, host: str) -> None:
    with pytest.raises(SetupError) as refused:
        check_ports({"predictions (--port)": (host, silent_port)})
    message = str(refused.value)
    assert message.startswith(f"{host}:{silent_port} for predictions (--port) cannot be used: ")
    assert "in use" in message


def test_port_just_left_is_free() -> None:
    """After a restart the old connections still wait for their end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = listener.accept()
        accepted.close()  # the server closes first, so its side lingers
        client.close()
    check_ports({"a": ("127.0.0.1", port)})


def test_one_port_for_two_is_refused() -> None:
    (port,) = free_ports(1)
    with pytest.raises(SetupError) as refused:
        check_ports({"metrics": ("127.0.0.1", port), "gRPC": ("127.0.0.1", port)})
    assert str(refused.value) == f"port {port} is given twice, for metrics and for gRPC"


@pytest.mark.parametrize("port", [0, 65536])
def test_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(SetupError, match=f"port {port} for metrics is out of range"):
        check_ports({"metrics": ("127.0.0.1", port)})


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 70, "exa mple"])
def test_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(SetupError, match=rf"{host}:\d+ for predictions cannot be used: "):
        check_ports({"predictions": (host, free_ports(1)[0])})


# --- Java


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_java_of_java_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = script(tmp_path / "bin" / "java", "exit 0")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java() == java


@pytest.mark.parametrize("mode", [None, 0o644], ids=["no java", "not executable"])
def test_java_home_without_java(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    if mode:
        script(tmp_path / "bin" / "java", "").chmod(mode)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SetupError) as refused:
        find_java()
    assert str(refused.value) == f"JAVA_HOME is {tmp_path}, and there is no bin/java in it"


def test_java_without_java_home_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", "")
    done = subprocess.run([find_java(), "-version"], capture_output=True, text=True, check=True)
    assert re.search(r'version "(1[7-9]|[2-9]\d)', done.stderr)  # TorchServe needs 17


# --- Java's memory


@pytest.mark.parametrize(
    ("available", "megabytes"),
    [(None, 4096), (0, 256), (2**29, 256), (2 * 2**30, 512), (8 * 2**30, 2048), (2**40, 4096)],
)
def test_javas_memory_is_bounded(available: int | None, megabytes: int) -> None:
    bounds = [f"-Xmx{megabytes}m", f"-XX:MaxDirectMemorySize={megabytes}m"]
    assert memory_bounds(available) == bounds


SAW = "#  fatal error: Saw java.lang.OutOfMemoryError"
RESERVE = ": Cannot reserve 16777216 bytes of direct buffer memory (allocated: 5, limit: 6)"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"{SAW}, aborting", "java.lang.OutOfMemoryError"),  # Java 17
        (f"{SAW}{RESERVE}, aborting", f"java.lang.OutOfMemoryError{RESERVE}"),  # 21, 25
        (
            "#  fatal error: Saw io.netty.util.internal.OutOfDirectMemoryError, aborting",
            "io.netty.util.internal.OutOfDirectMemoryError",
        ),
        (
            "Terminating due to java.lang.OutOfMemoryError: Java heap space",
            "java.lang.OutOfMemoryError: Java heap space",
        ),
        # What clients or models can have written is no such line.
        (f'{{"event": "torchserve", "message": "{SAW}, aborting"}}', None),
        ('{"event": "failure", "cause": "torch.OutOfMemoryError: CUDA out of memory"}', None),
        ("#  SIGSEGV (0xb) at pc=0x0, pid=1, tid=1", None),
    ],
)
def test_what_java_had_no_memory_for(tmp_path: Path, line: str, found: str | None) -> None:
    server = server_of(tmp_path, "exit 0")
    server.read(line.encode())
    server.read(b"# ")
    assert server.out_of_memory() == found


def test_why_a_model_does_not_load(tmp_path: Path) -> None:
    server = server_of(tmp_path, "exit 0")
    for model, message in (("birds", "first"), ("birds", "last"), ("cats", "another")):
        facts = {"time": "", "event": "startup_failed", "model": model, "message": message}
        assert server.read(json.dumps(facts).encode())
    assert server.read(b'x "event": "startup_failed"')
    assert server.startup_failure("birds") == server.startup_failure("birds/1.0") == "last"
    assert server.startup_failure("dogs") is None


def test_what_log4j_prints_at_each_start_is_not_written(tmp_path: Path) -> None:
    server = server_of(tmp_path, "exit 0")
    noise = b"WARNING: sun.reflect.Reflection.getCallerClass is not supported. This will impact"
    assert not server.read(noise)
    assert server.read(b"WARNING: something else")


# --- The process, with a shell script for Java


class Pipe:
    """A named pipe that a script writes to, read without waiting for ever."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self.end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait(self) -> None:
        ready, _, _ = select.select([self.end], [], [], 10)
        assert ready, "nothing within 10 s"

    def line(self) -> str:
        self.wait()
        return os.read(self.end, 65536).decode()

    def rest(self) -> str:
        """Everything until no process has the pipe open any more."""
        text = b""
        while True:
            self.wait()
            part = os.read(self.end, 65536)
            if not part:
                return text.decode()
            text += part


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    pipe = Pipe(tmp_path / "pipe")
    yield pipe
    os.close(pipe.end)


@contextmanager
def running(server: TorchServe) -> Iterator[TorchServe]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def server_of(
    folder: Path, java: str, config: ServerConfig | None = None, **environ: str
) -> TorchServe:
    """Of two archives, with a script in place of Java."""
    served = [Served(folder / "birds.mar", {"batchSize": 3}), Served(folder / "fish.mar")]
    for one in served:
        with zipfile.ZipFile(one.archive, "w") as content:
            manifest = {"model": {"modelName": one.archive.stem, "modelVersion": "1.0"}}
            content.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            content.writestr("model-config.yaml", "batchSize: 1\n")
    java_file = script(folder / "java", java)
    return TorchServe(java_file, config or ServerConfig.load(), served, environ)


def test_java_is_asked_to_serve_the_archives(tmp_path: Path, pipe: Pipe) -> None:
    java = f'echo "$@" >{pipe.path}; exec sleep 600'
    vmargs = ("-Xmx1g", "-XX:+ExitOnOutOfMemoryError")
    config = replace(ServerConfig.load(), vmargs=vmargs, plugins_path="/plugins")
    with running(server_of(tmp_path, java, config)) as server:
        command = pipe.rest()
        assert server.exit_status() is None
    assert " -Xmx1g -XX:+ExitOnOutOfMemoryError " in command
    assert re.search(r" -Xmx\d+m -XX:MaxDirectMemorySize=\d+m .*-Xmx1g", command), "the last counts"
    assert f" -XX:SharedArchiveFile={JAVA_CDS} " in command
    assert re.search(r" -cp \S+/ts/frontend/\*:/plugins org\.pytorch\.serve\.ModelServer ", command)
    assert re.search(r" -f \S+/torchserve-\w+/config\.properties ", command)
    assert re.search(r" -s \S+/torchserve-\w+/store ", command)
    assert command.endswith(" -ncs\n")
    assert " -m " not in command  # the snapshot in config.properties names what is served


def test_shared_classes_of_another_java_are_ignored_in_silence(
    tmp_path: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes JAVA_HOME would find a warning, or an error, first in the log."""
    other = tmp_path / "other.jsa"
    other.write_bytes(struct.pack("=IiI", 0xF00BABA2, 0, 0xB) + bytes(4096))  # as Java 17 does
    monkeypatch.setattr(torchserve, "JAVA_CDS", other)
    options = 'while [ "$1" != -cp ]; do options="$options $1"; shift; done'
    java = f"{options}; {find_java()} $options -version >{pipe.path} 2>&1; exec sleep 600"
    with running(server_of(tmp_path, java)):
        assert pipe.rest().startswith("openjdk version ")


def test_what_is_served_is_a_copy_with_the_configuration_of_the_start(
    tmp_path: Path, pipe: Pipe
) -> None:
    java = f"cat store/*/model-config.yaml >{pipe.path}; exec sleep 600"
    with running(server_of(tmp_path, java)):
        assert pipe.rest() == "batchSize: 3\nbatchSize: 1\n"
    with zipfile.ZipFile(tmp_path / "birds.mar") as content:
        assert content.read("model-config.yaml") == b"batchSize: 1\n"


def test_an_archive_that_cannot_be_unpacked_is_named(tmp_path: Path) -> None:
    server = server_of(tmp_path, "exit 0")
    (tmp_path / "fish.mar").write_bytes(b"no zip")
    with pytest.raises(SetupError, match=r"fish\.mar cannot be unpacked"):
        server.start()
    server.stop()


def test_environment_of_java(tmp_path: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("TS_CONFIG_FILE", "/somewhere/config.properties")
    monkeypatch.setenv("CLASSIFIER_TOP_K", "3")
    java = f"{{ pwd; env; }} >{pipe.path}; exec sleep 600"
    with running(server_of(tmp_path, java, TS_NUMBER_OF_GPU="0")):
        folder, *lines = pipe.rest().splitlines()
        assert Path(folder).is_dir()
    environ = dict(line.split("=", 1) for line in lines if "=" in line)
    assert environ["TMPDIR"] == environ["TEMP"] == environ["LOG_LOCATION"] == folder
    assert environ["TS_NUMBER_OF_GPU"] == "0"
    assert environ["TS_DECODE_INPUT_REQUEST"] == "false"
    assert environ["CLASSIFIER_TOP_K"] == "3"
    assert not {"PYTHONPATH", "TS_CONFIG_FILE"} & set(environ)


def test_nothing_is_left_after_stop(tmp_path: Path, pipe: Pipe) -> None:
    """Neither the workers, which are children of Java, nor the folder."""
    worker = f"sh -c 'trap \"\" TERM; pwd; exec sleep 600' >{pipe.path} &"
    with running(server_of(tmp_path, f"{worker}\nexec sleep 600")) as server:
        folder = Path(pipe.line().strip())
        assert folder.is_dir()
    assert pipe.rest() == ""
    assert not folder.exists()
    assert server.exit_status() is not None


def test_java_that_does_not_stop_is_killed(
    tmp_path: Path,
    pipe: Pipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torchserve, "STOP_SECONDS", 0.2)
    java = f"trap '' TERM; exec 3>{pipe.path}; echo up >&3; sleep 600"
    with running(server_of(tmp_path, java)) as server:
        assert pipe.line() == "up\n"
    assert pipe.rest() == ""
    assert server.exit_status() == -9
    assert "did not stop in time" in capsys.readouterr().err


def test_exit_status_of_java(tmp_path: Path, pipe: Pipe) -> None:
    server = server_of(tmp_path, f"exec 3>{pipe.path}; echo up >&3; exit 3")
    assert server.exit_status() is None
    with running(server):
        assert pipe.rest() == "up\n"
    assert server.exit_status() == 3


def test_what_java_prints_is_relayed_to_its_end(tmp_path: Path, pipe: Pipe) -> None:
    """Both its streams; stop() returns when all has been read."""
    lines: list[bytes] = []
    java = f"echo out; echo err >&2; trap 'echo last; exit 0' TERM; echo up >{pipe.path}; "
    server = server_of(tmp_path, f"{java}while :; do sleep 0.05; done")
    server.start(lambda output: lines.extend(output))
    try:
        assert pipe.line() == "up\n"
    finally:
        server.stop()
    assert lines == [b"out\n", b"err\n", b"last\n"]


def test_stop_without_start_does_nothing(tmp_path: Path) -> None:
    server_of(tmp_path, "exit 0").stop()

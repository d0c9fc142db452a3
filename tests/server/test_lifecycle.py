"""Starting, refusing to start, and stopping."""

import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
import torch
import torchvision

import tests.server.serving
from tests import ROOT
from tests.drawing import encode, plain
from tests.load import Load
from tests.processes import alive, events, free_ports, wait_for
from tests.server.serving import (
    SERVE,
    copy_changed,
    environment,
    port_options,
    run_script,
    serving,
)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def two_classes(folder: Path) -> list[str]:
    """Options for a small model with two classes."""
    weights, labels = folder / "two.pth", folder / "two.txt"
    torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), weights)
    labels.write_text("yes\nno\n")
    return ["--model", "squeezenet1_1", "--weights", str(weights), "--labels", str(labels)]


def refused(folder: Path, *options: str, env: dict[str, str] | None = None) -> str:
    """The one line that ./scripts/serve ends with; it must end with 2 before Java starts."""
    done = run_script("serve", folder, *port_options(free_ports()), *options, env=env)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("Downloading ")]
    return line


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (["--wokers", "2"], {}, ["--wokers"]),
        (["--workers", "0"], {}, ["--workers", "1 to 1024", "'0'"]),
        (["--weights", "nowhere.pth"], {}, ["nowhere.pth"]),
        ([], {"CLASSIFIER_TOPK": "3"}, ["CLASSIFIER_TOPK", "CLASSIFIER_TOP_K"]),
        ([], {"CLASSIFIER_TOP_K": "0"}, ["CLASSIFIER_TOP_K must", "1 to 1000", "0"]),
        ([], {"CLASSIFIER_ENV": "prod"}, ["CLASSIFIER_ENV", "production", "'prod'"]),
        ([], {"JAVA_HOME": "/nowhere"}, ["JAVA_HOME", "/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, options: list[str], env: dict[str, str], words: list[str]
) -> None:
    """Of the launcher or, as for nowhere.pth, of packaging; tests/unit has the others."""
    line = refused(tmp_path, *options, env=env)
    for word in words:
        assert word in line


def test_a_taken_port_is_named_before_java_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(tmp_path, "--port", str(port))
    assert f"127.0.0.1:{port}" in line
    assert "--port" in line


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    weights, proof = tmp_path / "evil.pth", tmp_path / "proof"
    torch.save({"weight": Payload(proof)}, weights)
    assert "never unpickled" in refused(tmp_path, "--weights", str(weights))
    weights.write_bytes(pickle.dumps(Payload(proof)))
    assert "evil.pth" in refused(tmp_path, "--weights", str(weights))
    assert not proof.exists()


def test_paths_of_any_name_in_the_locale_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Java, too, reads and writes checkout, weights, archive and temporary folder."""
    folder = tmp_path / "übung 猫"
    for name in ("handler", "service", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "config.properties", folder)
    monkeypatch.setattr(
        tests.server.serving, "SERVE", [sys.executable, folder / "scripts/serve.py"]
    )
    options = [*two_classes(folder), "--workers", "1"]
    with tempfile.TemporaryDirectory(prefix="ü") as temporary:
        env = {"LC_ALL": "C", "TMPDIR": temporary, "PYTHONPATH": str(folder)}
        with serving(folder, *options, model="squeezenet1_1", env=env) as server:
            reply = requests.post(server.predictions, data=encode(plain()), timeout=60)
            assert reply.json()["status"] == "success"
            assert list(Path(temporary).glob("torchserve-*"))


@contextmanager
def starting(folder: Path, *options: str, env: Mapping[str, str]) -> Iterator[psutil.Popen]:
    """./scripts/serve in a process that ends at the latest after the test, and is silent."""
    process = psutil.Popen(
        [*SERVE, *options, *port_options(free_ports())],
        env=environment(folder, env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_signal_while_loading_stops_everything(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    env = {"TS_MODEL_STORE": str(store)}
    with starting(tmp_path, *colours, "--workers", "1", env=env) as process:
        wait_for(lambda: len(process.children(recursive=True)) >= 2)  # Java and its worker
        children = process.children(recursive=True)
        process.terminate()
        assert process.wait(30) == 0
        assert not alive(children)


def test_a_signal_stops_everything_and_leaves_answered_requests_in_the_log(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    """log4j's shutdown hook would close the log before the workers are through."""
    body = (ROOT / "examples" / "clock.jpg").read_bytes()
    with serving(tmp_path, *colours, env={"TS_MODEL_STORE": str(store)}) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) == 3, "Java and two workers"
        option = "-Djava.io.tmpdir="
        [temporary] = [word for word in server.java().cmdline() if word.startswith(option)]
        folder = Path(temporary.removeprefix(option))
        assert folder.is_dir()
        with Load(server.predictions, body) as load:
            load.wait(50)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(30) == 0
        assert not alive(children)
        assert not folder.exists()
    assert load.answered <= {line["request_id"] for line in server.log("request")}


def is_running(child: psutil.Process, command: str) -> bool:
    with suppress(psutil.Error):  # it may have ended
        return command in " ".join(child.cmdline())
    return False


def test_a_signal_while_packaging_stops_everything(tmp_path: Path) -> None:
    def is_archiving() -> bool:
        """The packaging process has started one of its own."""
        children = process.children(recursive=True)
        return any(is_running(child, "torch-model-archiver") for child in children)

    with starting(tmp_path, *two_classes(tmp_path), env={}) as process:
        wait_for(is_archiving)
        children = process.children(recursive=True)
        process.terminate()
        assert process.wait(30) == 130
        assert not process.stdout.read()
        assert not alive(children)
        assert not list(tmp_path.glob("store/.packaging-*"))


def test_a_launcher_killed_while_packaging_leaves_nothing(tmp_path: Path) -> None:
    with starting(tmp_path, *two_classes(tmp_path), env={}) as process:
        wait_for(lambda: list(tmp_path.glob("store/.packaging-*")))
        children = process.children(recursive=True)
        assert children
        process.kill()
        process.wait()

        def left() -> list[object]:
            return [*alive(children), *tmp_path.glob("store/.packaging-*")]

        try:
            wait_for(lambda: not left(), 10, left)
        finally:
            for child in alive(children):
                child.kill()


def test_a_model_that_cannot_load_ends_the_server(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    """An archive damaged after packaging: the worker's reason is the last line, the status is 1."""
    copy_changed(store, tmp_path, {"openvino.xml": "<"})
    options = [*colours, "--workers", "1", *port_options(free_ports())]
    done = subprocess.run(
        [*SERVE, *options],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    error = "mobilenet_v2 does not load: openvino.xml in the archive cannot be loaded"
    assert done.stdout.splitlines()[-1] == f"error: {error}; see the log above"
    [failed] = events(done.stdout, "failed")
    assert failed["message"] == error
    assert not events(done.stdout, "worker")  # the traceback is in the line with the reason
    failure, *_ = events(done.stdout, "startup_failed")
    assert failure["message"] == "openvino.xml in the archive cannot be loaded"
    assert "Traceback" in failure["cause"]

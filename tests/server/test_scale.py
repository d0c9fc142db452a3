"""./scripts/scale with the real TorchServe, and GPUs that are named, hidden or pretended."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tests import ROOT
from tests.driver import make_driver
from tests.load import Load
from tests.processes import free_ports, wait_for
from tests.server.colours import encoded
from tests.server.serving import STOP_SECONDS, Server, port_options, run_script, serving

SCALE = [sys.executable, str(ROOT / "scripts" / "scale.py"), "mobilenet_v2"]
UNKNOWN = "GPU-00000000-0000-0000-0000-000000000000"


def addresses(server: Server) -> list[str]:
    return ["--management", server.management, "--metrics", server.metrics]


def scale(server: Server, *argv: str) -> subprocess.CompletedProcess[str]:
    return run_script("scale", server.output.parent, "mobilenet_v2", *argv, *addresses(server))


def bounds(server: Server) -> tuple[int, int]:
    state = server.describe()
    return state["minWorkers"], state["maxWorkers"]


@pytest.fixture
def two_workers(server: Server) -> Iterator[Server]:
    """The shared server, left as it was found."""
    yield server
    assert scale(server, "2", "--force").returncode == 0


def test_up_and_down(two_workers: Server) -> None:
    before = two_workers.worker_pids()
    done = scale(two_workers, "3")
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(r"^(\d+) +(\d+) +cpu +\d+ MiB +READY$", done.stdout, re.MULTILINE)
    assert len(rows) == 2 + 3
    assert {int(pid) for _, pid in rows[2:]} == two_workers.worker_pids() > before
    assert bounds(two_workers) == (3, 3)
    with Load(two_workers.predictions, encoded("green"), clients=1, pause=2) as load:
        done = scale(two_workers, "1", "--version", "1.0")
    assert (done.returncode, done.stderr) == (0, "")
    assert load.failures == []
    assert bounds(two_workers) == (1, 1)


@pytest.mark.skipif(
    psutil.virtual_memory().available > 1024 * 100 * 2**20, reason="1024 workers could fit here"
)
def test_more_than_memory_holds(two_workers: Server) -> None:
    done = scale(two_workers, "1024")
    assert done.returncode == 1
    assert re.search(r"1022 more do not fit, \d+ do \(memory: a worker takes \d+ MiB", done.stderr)
    assert len(two_workers.worker_pids()) == 2


def test_unknown_models(two_workers: Server) -> None:
    done = scale(two_workers, "1", "--version", "9")
    assert done.returncode == 2
    assert "has no model mobilenet_v2/9; it has mobilenet_v2/1.0" in done.stderr
    assert scale(two_workers, "0").returncode == 2


def test_workers_follow_the_load(two_workers: Server, tmp_path: Path) -> None:
    assert scale(two_workers, "1").returncode == 0
    options = "--watch --maximum 2 --target 0.3 --interval 1 --cool-down 3".split()
    output = tmp_path / "watch.log"
    command = [*SCALE, *options, *addresses(two_workers)]
    with output.open("w") as file:
        watcher = subprocess.Popen(command, stdout=file, stderr=file)

    def wait_until(workers: int) -> None:
        def is_so() -> bool:
            assert watcher.poll() is None, output.read_text()
            return two_workers.statuses() == ["READY"] * workers

        wait_for(is_so, 120, output.read_text)

    try:
        with Load(two_workers.predictions, encoded("green")) as load:
            wait_until(2)
        wait_until(1)
        watcher.send_signal(signal.SIGTERM)
        assert watcher.wait(STOP_SECONDS) == 0
    finally:
        watcher.kill()
        watcher.wait()
    assert load.failures == []
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    steps = [(line["from"], line["to"]) for line in lines if line["from"] != line["to"]]
    assert steps == [(1, 2), (2, 1)]
    up = next(line for line in lines if line["to"] == 2)
    assert up["reason"] == "the load is high"
    assert up["capacity_ratio"] > 0.3
    assert up["requests"] > 0
    assert up["memory"][0]["free"] > up["memory"][0]["each"] > 0


# --- GPUs


def started_with(server: Server, name: str) -> set[str | None]:
    """A variable as the workers got it from TorchServe."""
    values: set[str | None] = set()
    for pid in server.worker_pids():
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        values.add(dict(line.split("=", 1) for line in lines if "=" in line).get(name))
    return values


shows_environments = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux shows a process's environment"
)


@shows_environments
def test_no_visible_gpu_is_a_cpu(tmp_path: Path, colour_model: list[str], store: Path) -> None:
    """TorchServe itself would end with NumberFormatException."""
    env = {"TS_MODEL_STORE": str(store), "CUDA_VISIBLE_DEVICES": UNKNOWN}
    with serving(tmp_path, *colour_model, "--workers", "1", env=env) as server:
        answer = requests.post(server.predictions, data=encoded("red"), timeout=60).json()
        assert answer["metadata"]["device"] == "cpu"
        assert [worker["gpu"] for worker in server.describe()["workers"]] == [False]
        assert started_with(server, "CUDA_VISIBLE_DEVICES") == {"-1"}
        warned = f"warning: CUDA_VISIBLE_DEVICES={UNKNOWN} names 1 GPUs, and CUDA finds 0"
        assert warned in server.text()


def test_no_visible_gpu_is_an_error_for_cuda(tmp_path: Path) -> None:
    options = ["--device", "cuda", *port_options(free_ports())]
    done = run_script("serve", tmp_path, *options, env={"CUDA_VISIBLE_DEVICES": UNKNOWN})
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: --device cuda, but CUDA_VISIBLE_DEVICES={UNKNOWN} ")


@shows_environments
def test_torchserve_counts_the_gpus_that_cuda_does(tmp_path: Path, colour_model: list[str]) -> None:
    """A driver that has two GPUs, as far as the launcher asks it; torch finds none behind it."""
    library = make_driver(tmp_path, version=99000, init=0, count=2)
    env = {"LD_LIBRARY_PATH": str(library.parent), "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    options = [*colour_model, *port_options(free_ports()), "--device-ids", "0,2"]
    done = run_script("serve", tmp_path, *options, env=env)
    assert done.returncode == 2
    assert done.stderr == "error: deviceIds must be 0 to 1, the GPUs here, got 2\n"
    with serving(tmp_path, *colour_model, "--workers-per-gpu", "1", env=env) as server:
        assert [worker["gpu"] for worker in server.describe()["workers"]] == [True, True]
        assert started_with(server, "CUDA_VISIBLE_DEVICES") == {"0,1"}
        assert started_with(server, "WORKERS_CUDA_VISIBLE_DEVICES") == {"GPU-a,GPU-b"}
        assert "Invalid" not in server.text()

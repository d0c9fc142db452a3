"""A worker whose GPU is lost, in the real TorchServe. The GPU is played by a changed engine."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import requests

from tests.server.colours import encoded
from tests.server.serving import ROOT, environment, serving

OPTIONS = ("--weights", "untrained", "--device", "cpu", "--workers", "1", "--precision", "fp32")
READY_AGAIN_SECONDS = 120

# Appended to the archive's engines.py: one error, as CUDA's are, where a file says so.
PLAY = """

import os

_load_engine = load_engine


def load_engine(*args, **kwargs):
    engine = _load_engine(*args, **kwargs)
    compute = engine.probabilities

    def probabilities(images):
        if os.path.exists(os.environ["LOSE_THE_GPU"]):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return compute(images)

    engine.probabilities = probabilities
    engine.is_lost = lambda: True
    return engine
"""


def change_engine(archive: Path) -> None:
    changed = archive.with_suffix(".changed")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(changed, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(
                item, data + PLAY.encode() if item.filename.endswith("engines.py") else data
            )
    changed.replace(archive)


def test_a_worker_with_a_lost_gpu_is_replaced(tmp_path: Path) -> None:
    switch = tmp_path / "lost"
    env = {"LOSE_THE_GPU": str(switch)}
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "package.py"), *OPTIONS],
        env=environment(tmp_path),
        check=True,
        timeout=300,
    )
    change_engine(tmp_path / "store" / "mobilenet_v2.mar")
    with serving(tmp_path, *OPTIONS, env=env) as server:
        jpeg = encoded("red")
        [before] = server.worker_pids()
        assert requests.post(server.predictions, data=jpeg, timeout=60).status_code == 200

        switch.touch()
        reply = requests.post(server.predictions, data=jpeg, timeout=60)
        switch.unlink()
        assert (reply.status_code, reply.json()["type"]) == (507, "OutOfResources")

        deadline = time.monotonic() + READY_AGAIN_SECONDS
        while requests.post(server.predictions, data=jpeg, timeout=60).status_code != 200:
            assert time.monotonic() < deadline, server.text()
            time.sleep(0.2)
        assert server.worker_pids() != {before}
        [line] = server.log("gpu_lost")
        assert "an illegal memory access was encountered" in line["cause"]
        assert line["requests"] == [reply.headers["x-request-id"]]

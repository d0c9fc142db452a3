"""Many images through the real server, while it and ./scripts/predict are each killed once.

BULK_IMAGES is how many; 10000 is what issue 18 asks for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.drawing import encode, noise
from tests.processes import alive, wait_for
from tests.server.serving import serving

IMAGES = int(os.environ.get("BULK_IMAGES", "600"))
SECONDS = 60 + IMAGES / 10  # for each of the waits


def draw(folder: Path) -> None:
    folder.mkdir()
    for seed in range(IMAGES):
        (folder / f"{seed:05}.jpg").write_bytes(encode(noise(seed=seed), "JPEG"))


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.timeout(600 + 3 * SECONDS)
def test_every_image_is_once_in_the_output(tmp_path: Path, colours: list[str], store: Path) -> None:
    """The server is killed with all its processes at a third, the client with its own at two."""
    draw(tmp_path / "images")
    output = tmp_path / "results.jsonl"
    env = {"TS_MODEL_STORE": str(store)}
    with serving(tmp_path, *colours, env=env) as server:
        command = [sys.executable, str(ROOT / "scripts" / "predict.py"), str(tmp_path / "images")]
        command += ["--url", server.url, "--output", str(output), "--json"]
        command += ["--concurrency", "4"]
        client = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: lines(output) >= IMAGES // 3, SECONDS)
            started = psutil.Process(server.process.pid).children(recursive=True)
            server.process.kill()
            for process in started:
                process.kill()
            server.process.wait()
            wait_for(lambda: not alive(started))
            at_the_kill = lines(output)
            assert client.poll() is None, "it waits for the server"
            server.start()
            wait_for(lambda: lines(output) >= max(2 * IMAGES // 3, at_the_kill + 1), SECONDS)
        finally:
            client.kill()
            client.wait()
        assert lines(output) < IMAGES, "it was killed in the middle"
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    expected = sorted(str(path) for path in (tmp_path / "images").iterdir())
    assert sorted(record["image"] for record in records) == expected
    assert {record["status"] for record in records} == {"success"}
    assert json.loads(done.stdout)["images"] == IMAGES

"""Workers that hang, in the real TorchServe under the real launcher."""

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import requests

from tests.server.colours import encoded
from tests.server.serving import ROOT, Server, environment, serving

NOTICED_SECONDS = 40  # some 12 on a quiet machine; TorchServe itself takes responseTimeout, 120 s
PAUSE_SECONDS = 15  # more than a worker may be silent
READY_AGAIN_SECONDS = 120

# Appended to the archive's engines.py: native code that has released Python's lock and does not
# return, while a file says so.
PLAY = """

import os
import time

_load_engine = load_engine


def load_engine(*args, **kwargs):
    engine = _load_engine(*args, **kwargs)
    launch = engine.launch

    def hang(images):
        while os.path.exists(os.environ["HANG"]):
            time.sleep(0.1)
        return launch(images)

    engine.launch = hang
    return engine
"""


def ask_until(server: Server, stop: threading.Event, seen: list[tuple[int, float]]) -> None:
    """One request after another: status and seconds of each."""
    with requests.Session() as session:
        while not stop.is_set():
            reply = session.post(server.predictions, data=encoded("red"), timeout=130)
            seen.append((reply.status_code, reply.elapsed.total_seconds()))
            time.sleep(0.05)


def wait_until_replaced(server: Server, pid: int) -> None:
    deadline = time.monotonic() + READY_AGAIN_SECONDS
    while True:
        workers = server.describe()["workers"]
        if len(workers) == 2 and all(
            worker["status"] == "READY" and worker["pid"] != pid for worker in workers
        ):
            return
        assert time.monotonic() < deadline, server.text()
        time.sleep(0.2)


def test_a_worker_that_was_stopped_is_replaced(tmp_path: Path) -> None:
    options = ("--weights", "untrained", "--device", "cpu", "--workers", "2")
    with serving(tmp_path, *options) as server:
        before = server.worker_pids()

        # A pause of the launcher, longer than the patience that it has with workers, kills nobody.
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(3)
        assert server.worker_pids() == before

        stop, seen = threading.Event(), list[tuple[int, float]]()
        clients = [threading.Thread(target=ask_until, args=(server, stop, seen)) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            time.sleep(2)
            hung = min(before)
            os.kill(hung, signal.SIGSTOP)
            wait_until_replaced(server, hung)
        finally:
            stop.set()
            for client in clients:
                client.join()

        assert max(seconds for _, seconds in seen) < NOTICED_SECONDS
        failed = [status for status, _ in seen if status != 200]
        assert 1 <= len(failed) <= 4, "what it had in hand, and no more"
        assert set(failed) <= {500, 507}
        [line] = server.log("worker_hung")
        assert (line["pid"], line["model"], line["level"]) == (hung, "mobilenet_v2", "ERROR")
        assert max(before) in server.worker_pids()
        page = requests.get(f"{server.metrics}/metrics", timeout=10).text
        counts = [line for line in page.splitlines() if line.startswith("classifier_worker_hung")]
        assert sorted(line.rpartition(" ")[2] for line in counts) == ["0.0", "1.0"]


def test_a_worker_whose_model_never_returns_is_replaced(tmp_path: Path) -> None:
    options = ("--weights", "untrained", "--device", "cpu", "--workers", "2", "--precision", "fp32")
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "package.py"), *options],
        env=environment(tmp_path),
        check=True,
        timeout=300,
    )
    archive = tmp_path / "store" / "mobilenet_v2.mar"
    with zipfile.ZipFile(archive) as content:
        whole = {name: content.read(name).decode() for name in content.namelist() if ".py" in name}
    changed = {
        "handler/engines.py": whole["handler/engines.py"] + PLAY,
        "handler/pulse.py": whole["handler/pulse.py"] + "\nMIN_PATIENCE_SECONDS = 3.0\n",
    }
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "changed", "w") as new:
        for item in old.infolist():
            new.writestr(item, changed.get(item.filename) or old.read(item))
    (tmp_path / "changed").replace(archive)

    switch = tmp_path / "hang"
    with serving(tmp_path, *options, env={"HANG": str(switch)}) as server:
        switch.touch()
        reply = requests.post(server.predictions, data=encoded("red"), timeout=130)
        switch.unlink()
        assert reply.status_code in (500, 507)
        assert reply.elapsed.total_seconds() < 30
        [stuck], [hung] = server.log("worker_stuck"), server.log("worker_hung")
        assert stuck["pid"] == hung["pid"]
        assert "in hang" in stuck["cause"]
        wait_until_replaced(server, hung["pid"])

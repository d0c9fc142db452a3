"""Workers that hang, in the real TorchServe under the real launcher."""

import os
import signal
import threading
import time
from pathlib import Path

import requests

from tests.processes import wait_for
from tests.server.colours import encoded
from tests.server.serving import Server, copy_changed, serving

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
    def is_replaced() -> bool:
        workers = server.describe()["workers"]
        ready = [worker["pid"] for worker in workers if worker["status"] == "READY"]
        return len(ready) == 2 and pid not in ready

    wait_for(is_replaced, READY_AGAIN_SECONDS, server.text)


def test_a_worker_that_was_stopped_is_replaced(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    with serving(tmp_path, *colours, env={"TS_MODEL_STORE": str(store)}) as server:
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


def test_a_worker_whose_model_never_returns_is_replaced(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    more = {"handler/engines.py": PLAY, "handler/pulse.py": "\nMIN_PATIENCE_SECONDS = 3.0\n"}
    copy_changed(store, tmp_path, more)
    switch = tmp_path / "hang"
    options = (*colours, "--precision", "fp32")
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

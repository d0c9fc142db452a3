"""Workers that hang, in the real TorchServe under the real launcher."""

import os
import signal
import time
from pathlib import Path

import requests

from tests.load import Load
from tests.processes import wait_for
from tests.server.colours import encoded
from tests.server.serving import Server, copy_with_engine, serving

NOTICED_SECONDS = 40  # some 12 on a quiet machine; TorchServe itself takes responseTimeout, 120 s
STUCK_SECONDS = 25  # likewise
PAUSE_SECONDS = 15  # more than a worker may be silent
READY_AGAIN_SECONDS = 120

# Native code that has released Python's lock and does not return, while a file says so.
HANG = """
launch = engine.launch

def hang(images):
    while os.path.exists(os.environ["HANG"]):
        time.sleep(0.1)
    return launch(images)

engine.launch = hang
"""


def wait_until_replaced(server: Server, pid: int) -> None:
    def is_replaced() -> bool:
        workers = server.describe()["workers"]
        ready = [worker["pid"] for worker in workers if worker["status"] == "READY"]
        return len(ready) == 2 and pid not in ready

    wait_for(is_replaced, READY_AGAIN_SECONDS, server.text)


def hung_counts(server: Server) -> list[str]:
    """How many workers of each slot have hung."""
    page = requests.get(f"{server.metrics}/metrics", timeout=10).text
    counts = [line for line in page.splitlines() if line.startswith("classifier_worker_hung")]
    return sorted(line.rpartition(" ")[2] for line in counts)


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

        hung = min(before)
        with Load(server.predictions, encoded("red"), clients=4, pause=0.05) as load:
            load.wait(20)
            os.kill(hung, signal.SIGSTOP)
            wait_until_replaced(server, hung)
        assert max(answer.seconds for answer in load.answers) < NOTICED_SECONDS
        assert 1 <= len(load.failures) <= 4, "what it had in hand, and no more"
        assert set(load.statuses) <= {200, 500, 507}
        [line] = server.log("worker_hung")
        assert (line["pid"], line["model"], line["level"]) == (hung, "mobilenet_v2", "ERROR")
        assert max(before) in server.worker_pids()
        assert hung_counts(server) == ["0.0", "1.0"]


def test_a_worker_whose_model_never_returns_is_replaced(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    copy_with_engine(store, tmp_path, HANG)
    switch = tmp_path / "hang"
    options = (*colours, "--precision", "fp32")
    with serving(tmp_path, *options, env={"HANG": str(switch)}) as server:
        switch.touch()
        reply = requests.post(server.predictions, data=encoded("red"), timeout=130)
        switch.unlink()
        assert reply.status_code in (500, 507)
        print(f"answered with {reply.status_code} after {reply.elapsed.total_seconds():.1f} s")
        assert reply.elapsed.total_seconds() < STUCK_SECONDS
        wait_for(lambda: server.log("worker_stuck"))
        [stuck] = server.log("worker_stuck")
        assert "in hang" in stuck["cause"]
        assert not server.log("worker_hung"), "it has ended itself"
        wait_until_replaced(server, stuck["pid"])
        assert hung_counts(server) == ["0.0", "1.0"]

"""A worker whose GPU is lost, in the real TorchServe. The GPU is played by a changed engine."""

from contextlib import suppress
from pathlib import Path

import requests

from tests.processes import wait_for
from tests.server.colours import encoded
from tests.server.serving import copy_with_engine, serving

READY_AGAIN_SECONDS = 120

# One error, as CUDA's are, while a file is there.
LOSE = """
begin = engine.launch

def launch(images):
    if os.path.exists(os.environ["LOSE_THE_GPU"]):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return begin(images)

engine.launch = launch
engine.is_lost = lambda: True
"""


def test_a_worker_with_a_lost_gpu_is_replaced(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    switch = tmp_path / "lost"
    copy_with_engine(store, tmp_path, LOSE)
    options = (*colours, "--workers", "1", "--precision", "fp32")
    with serving(tmp_path, *options, env={"LOSE_THE_GPU": str(switch)}) as server:
        jpeg = encoded("red")
        [before] = server.worker_pids()
        assert requests.post(server.predictions, data=jpeg, timeout=60).status_code == 200

        switch.touch()
        reply = requests.post(server.predictions, data=jpeg, timeout=60)
        switch.unlink()
        assert (reply.status_code, reply.json()["type"]) == (507, "OutOfResources")

        def answers() -> bool:
            # TorchServe never answers a request that it hands to a worker just as that one ends.
            with suppress(requests.Timeout):
                return requests.post(server.predictions, data=jpeg, timeout=5).status_code == 200
            return False

        wait_for(answers, READY_AGAIN_SECONDS, server.text)
        assert server.worker_pids() != {before}
        [line] = server.log("gpu_lost")
        assert "an illegal memory access was encountered" in line["cause"]
        assert line["requests"] == [reply.headers["x-request-id"]]

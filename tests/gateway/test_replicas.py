"""Two replicas, each with two versions of the model: split, deaths and restarts."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
from requests.adapters import HTTPAdapter

from tests.gateway.clients import SMALL, TIMEOUT, check_error, client
from tests.gateway.running import Gateway, kill, running, settings
from tests.load import Load
from tests.processes import wait_for
from tests.server.serving import Server, package, serving

CALM = 0.1  # seconds between requests, so that a replica can start beside them


@pytest.fixture(scope="module")
def version_two(tmp_path_factory: pytest.TempPathFactory, colours: list[str]) -> str:
    """The archive of a second version."""
    folder = tmp_path_factory.mktemp("packaging")
    package(folder, *colours, "--version", "2.0")
    return str(folder / "store" / "mobilenet_v2-2.0.mar")


@pytest.fixture(scope="module")
def replicas(
    tmp_path_factory: pytest.TempPathFactory, colours: list[str], store: Path, version_two: str
) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        env = {"TS_MODEL_STORE": str(store)}
        options = ["--model", "mobilenet_v2", *colours, "--workers", "1", "--archive", version_two]
        yield [
            stack.enter_context(serving(tmp_path_factory.mktemp("replica"), *options, env=env))
            for _ in range(2)
        ]


def health(url: str) -> dict[str, int]:
    return requests.get(f"{url}/health", timeout=TIMEOUT).json()["replicas"]


def wait_for_worker(server: Server) -> None:
    wait_for(lambda: server.statuses() == ["READY"])


def wait_for_both(gateway: Gateway) -> None:
    wait_for(lambda: health(gateway.url) == {"ready": 2, "total": 2})


def test_clients_are_split_by_weight_and_stay(replicas: list[Server], tmp_path: Path) -> None:
    with running(tmp_path, settings(replicas, split="1.0=75,2.0=25")) as gateway:
        url = f"{gateway.url}/predict"

        def version(address: str, url: str = url, **headers: str) -> str:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = client(address).post(url, data=SMALL, headers=named, timeout=TIMEOUT)
            assert answer.headers["X-Model-Version"] == answer.json()["metadata"]["version"]
            return answer.headers["X-Model-Version"]

        addresses = [f"127.0.{n // 200}.{n % 200 + 1}" for n in range(120)]
        first = {address: version(address) for address in addresses}
        shares = Counter(first.values())
        assert set(shares) == {"1.0", "2.0"}
        assert 12 <= shares["2.0"] <= 48, "a quarter of 120 would be 30; 18 is 3.8 sigma"
        of_each = [next(a for a in addresses if first[a] == number) for number in ("1.0", "2.0")]
        for address in of_each:
            assert [version(address) for _ in range(3)] == [first[address]] * 3
            for number in ("1.0", "2.0"):
                assert version(address, X_Model_Version=number) == number
                path = f"predictions/mobilenet_v2/{number}"
                for other in (f"{url}?version={number}", f"{gateway.url}/{path}"):
                    assert version(address, other) == number
        answer = requests.post(f"{url}?version=3.0", data=SMALL, timeout=TIMEOUT)
        check_error(answer, 404)
        for number in ("1.0", "2.0"):
            info = requests.get(f"{gateway.url}/info?version={number}", timeout=TIMEOUT)
            assert info.json()["version"] == number
        assert health(gateway.url) == {"ready": 2, "total": 2}


def test_deaths_and_a_restart_fail_no_request(replicas: list[Server], tmp_path: Path) -> None:
    """Workers and a replica are killed; the other replica is restarted as operators do it."""
    first, second = replicas
    with running(tmp_path, settings(replicas)) as gateway:
        with Load(f"{gateway.url}/predict", SMALL) as load:
            load.wait(200)
            for server in (second, first):
                kill(*server.worker_pids())
                load.wait(200)
                wait_for_worker(server)
            first.java().kill()
            load.wait(200)
            first.process.wait(60)
            load.pause = CALM
            first.start()  # the gateway takes it back by itself
            wait_for_both(gateway)
            back = len(gateway.lines())
            load.wait(100)
            second.process.terminate()
            second.process.wait(60)
            second.start()
            wait_for_both(gateway)
            load.wait(100)
        assert load.failures == []
        lines = gateway.lines()
    retried = [line for line in lines if "," in line["upstream"] or ":" in line["upstream_status"]]
    assert retried, "no request met a death, so nothing was tested"
    address = f"127.0.0.1:{first.ports['port']}"
    assert any(line["upstream"] == address for line in lines[back:]), "it is not used again"


def ask(session: requests.Session, url: str) -> tuple[int, float]:
    """Status, 0 without an answer, and seconds."""
    started = time.monotonic()
    try:
        status = session.post(url, data=SMALL, timeout=TIMEOUT).status_code
    except requests.RequestException:
        status = 0
    return status, time.monotonic() - started


def test_a_replica_that_hangs_takes_nothing_away(replicas: list[Server], tmp_path: Path) -> None:
    """Of 20 requests a second for 20 s at most one in a hundred fails or takes over 5 s."""
    hung = replicas[0].java()
    address = f"127.0.0.1:{replicas[0].ports['port']}"
    with (
        running(tmp_path, settings(replicas, response_timeout_seconds="20")) as gateway,
        ThreadPoolExecutor(64) as pool,
        requests.Session() as session,
    ):
        session.trust_env = False
        session.mount("http://", HTTPAdapter(pool_maxsize=64))
        url = f"{gateway.url}/predict"
        wait_for_both(gateway)
        asked = []
        try:
            hung.suspend()
            for _ in range(400):
                asked.append(pool.submit(ask, session, url))
                time.sleep(0.05)
            state = requests.get(f"{gateway.url}/health", timeout=TIMEOUT)
            assert state.status_code == 200
            assert state.json()["replicas"] == {"ready": 1, "total": 2}
            assert state.json()["left_out"] == [f"{address}: does not answer"]
            answers = [answer.result() for answer in asked]
        finally:
            hung.resume()
        bad = [answer for answer in answers if answer[0] != 200 or answer[1] > 5]
        assert len(bad) <= 12, bad  # one in a hundred of a minute's; all were before
        assert [line["replica"] for line in gateway.lines("replica_left_out")] == [address]
        wait_for_both(gateway)
        with Load(url, SMALL) as load:
            load.wait(100)
        assert load.failures == []
        assert any(line.get("upstream") == address for line in gateway.lines()[-100:])

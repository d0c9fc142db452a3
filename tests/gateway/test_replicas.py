"""Two replicas, each with two versions of the model: split, deaths, restarts, and stopping."""

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests
from requests.adapters import HTTPAdapter

from tests.gateway.running import Load, free_port, kill, running, settings, wait_for
from tests.gateway.test_limits import client, torchserve_that
from tests.gateway.test_routes import check_error
from tests.server.colours import encoded
from tests.server.serving import ROOT, Server, environment, serving

SMALL = encoded("red", size=(64, 48))
TIMEOUT = 60


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, colours: list[str], store: Path) -> str:
    """The archive of a second version, beside the first."""
    command = [sys.executable, str(ROOT / "scripts" / "package.py"), *colours, "--version", "2.0"]
    env = environment(tmp_path_factory.mktemp("packaging"), {"TS_MODEL_STORE": str(store)})
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=180)
    return str(store / "mobilenet_v2-2.0.mar")


@pytest.fixture(scope="module")
def replicas(
    tmp_path_factory: pytest.TempPathFactory, colours: list[str], store: Path, versions: str
) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        env = {"TS_MODEL_STORE": str(store)}
        options = ["--model", "mobilenet_v2", *colours, "--archive", versions]
        yield [
            stack.enter_context(serving(tmp_path_factory.mktemp("replica"), *options, env=env))
            for _ in range(2)
        ]


def health(url: str) -> dict[str, int]:
    return requests.get(f"{url}/health", timeout=TIMEOUT).json()["replicas"]


def restart(server: Server) -> None:
    """Bring a replica's ./scripts/serve up again where it was, with the options that it had."""
    command = psutil.Process(server.process.pid).cmdline()
    env = psutil.Process(server.process.pid).environ()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    start(server, command, env)


def start(server: Server, command: list[str], env: dict[str, str]) -> None:
    with server.output.open("wb") as file:
        server.process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    wait_for(lambda: "Ready after" in server.text(), 180)


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
                assert version(address, f"{url}?version={number}") == number
                assert (
                    version(address, f"{gateway.url}/predictions/mobilenet_v2/{number}") == number
                )
        answer = requests.post(f"{url}?version=3.0", data=SMALL, timeout=TIMEOUT)
        check_error(answer, 404)
        for number in ("1.0", "2.0"):
            info = requests.get(f"{gateway.url}/info?version={number}", timeout=TIMEOUT)
            assert info.json()["version"] == number
        assert health(gateway.url) == {"ready": 2, "total": 2}


def test_both_replicas_work(replicas: list[Server], tmp_path: Path) -> None:
    with running(tmp_path, settings(replicas)) as gateway:
        with Load(f"{gateway.url}/predict", SMALL) as load:
            load.wait(100)
        assert load.failures == []
        upstreams = Counter(line["upstream"] for line in gateway.lines())
    assert len(upstreams) == 2
    assert min(upstreams.values()) > 20


def test_deaths_of_workers_and_of_a_replica_fail_no_request(
    replicas: list[Server], tmp_path: Path
) -> None:
    first, second = replicas
    command = psutil.Process(first.process.pid).cmdline()
    env = psutil.Process(first.process.pid).environ()
    with running(tmp_path, settings(replicas)) as gateway:
        with Load(f"{gateway.url}/predict", SMALL) as load:
            load.wait(300)
            kill(min(second.worker_pids()))
            load.wait(600)
            kill(max(first.worker_pids()))
            load.wait(900)
            java, *_ = psutil.Process(first.process.pid).children()
            kill(java.pid)
            load.wait(1500)
            first.process.wait(60)
            start(first, command, env)  # it comes back by itself
            wait_for(lambda: health(gateway.url) == {"ready": 2, "total": 2})
            back = len(gateway.lines())
            load.wait(max(2000, load.total + 300))
        assert load.failures == []
        assert load.statuses == {200: load.total}
        assert load.total >= 2000
        lines = gateway.lines()
    retried = [line for line in lines if "," in line["upstream"] or ":" in line["upstream_status"]]
    assert retried, "no request met a death, so nothing was tested"
    address = f"127.0.0.1:{first.ports['port']}"
    assert any(line["upstream"] == address for line in lines[back:]), "it is not used again"


def test_a_rolling_restart_fails_no_request(replicas: list[Server], tmp_path: Path) -> None:
    with running(tmp_path, settings(replicas)) as gateway:
        with Load(f"{gateway.url}/predict", SMALL) as load:
            for server in replicas:
                before = load.total
                restart(server)
                wait_for(lambda: health(gateway.url) == {"ready": 2, "total": 2})
                load.wait(before + 100)
        assert load.failures == []
        assert load.statuses == {200: load.total}


def java(server: Server) -> psutil.Process:
    return next(
        child
        for child in psutil.Process(server.process.pid).children()
        if Path(child.exe()).name == "java"
    )


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
    hung = java(replicas[0])
    address = f"127.0.0.1:{replicas[0].ports['port']}"
    with (
        running(tmp_path, settings(replicas, response_timeout_seconds="20")) as gateway,
        ThreadPoolExecutor(64) as pool,
        requests.Session() as session,
    ):
        session.trust_env = False
        session.mount("http://", HTTPAdapter(pool_maxsize=64))
        url = f"{gateway.url}/predict"
        wait_for(lambda: health(gateway.url) == {"ready": 2, "total": 2})
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
        wait_for(lambda: health(gateway.url) == {"ready": 2, "total": 2})
        with Load(url, SMALL) as load:
            load.wait(100)
        assert load.failures == []
        assert any(line.get("upstream") == address for line in gateway.lines()[-100:])


def answer_of(body: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    """What a replica says; a `length` above the body's is what it breaks off from."""
    head = b"HTTP/1.1 %s\r\nX-Model-Version: 1.0\r\ncontent-type: application/json\r\n"
    return head % status + b"content-length: %d\r\n\r\n" % (length or len(body)) + body


def test_three_replicas_take_turns(tmp_path: Path) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(torchserve_that(answer_of(b"{}"))) for _ in range(3)]
        env = {"GATEWAY_UPSTREAMS": ",".join(replicas)}
        gateway = stack.enter_context(running(tmp_path, env))
        with requests.Session() as session:  # one connection: one of nginx's workers
            for _ in range(30):
                assert session.post(f"{gateway.url}/predict", data=SMALL).status_code == 200
        wait_for(lambda: len(gateway.lines()) == 30)
        asked = Counter(line["upstream"] for line in gateway.lines())
    assert asked == dict.fromkeys(replicas, 10)


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        whole = stack.enter_context(torchserve_that(answer_of(b'{"whole":true}')))
        cut = stack.enter_context(torchserve_that(answer_of(b'{"who', length=14)))
        for upstreams, status in ((f"{cut},{whole}", 200), (cut, 503)):
            with running(tmp_path, {"GATEWAY_UPSTREAMS": upstreams}) as gateway:
                for _ in range(6):
                    answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
                    assert answer.status_code == status
                    if status == 503:
                        check_error(answer, 503)
                    else:
                        assert answer.json() == {"whole": True}


@pytest.mark.parametrize("size", [300_000, 5_000_000])
def test_large_answers(tmp_path: Path, size: int) -> None:
    """Of many images and classes. nginx's own buffers hold 256 KB."""
    body = b'{"padding":"' + b"x" * size + b'"}'
    with (
        torchserve_that(answer_of(body)) as upstream,
        running(tmp_path, {"GATEWAY_UPSTREAMS": upstream}) as gateway,
    ):
        for _ in range(3):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            assert (answer.status_code, answer.content) == (200, body)


def test_a_worker_of_nginx_that_is_killed_takes_no_places_with_it(tmp_path: Path) -> None:
    with torchserve_that(None) as upstream, ThreadPoolExecutor(4) as pool:
        env = {
            "GATEWAY_UPSTREAMS": upstream,
            "GATEWAY_MAX_CONCURRENT": "2",
            "GATEWAY_RESPONSE_TIMEOUT_SECONDS": "10",
        }
        with running(tmp_path, env) as gateway:
            url = f"{gateway.url}/predict"
            held = [pool.submit(ask, requests.Session(), url) for _ in range(2)]
            time.sleep(2)  # they are under way
            assert ask(requests.Session(), url)[0] == 429
            nginx, *_ = psutil.Process(gateway.process.pid).children()
            for worker in nginx.children():
                worker.kill()
            assert [one.result()[0] for one in held] == [0, 0]
            wait_for(lambda: len(nginx.children()) >= 2)  # there are others
            time.sleep(2)
            assert ask(requests.Session(), url)[0] == 504


def test_nothing_is_tried_again_at_a_replica_that_is_left_out(tmp_path: Path) -> None:
    """The queue of the only one that answers is full."""
    full = answer_of(b'{"code":503,"message":"no worker"}', b"503 ").replace(b"X-Model", b"X-No")
    with (
        torchserve_that(full) as busy,
        torchserve_that(None) as hung,
        running(tmp_path, {"GATEWAY_UPSTREAMS": f"{busy},{hung}"}) as gateway,
    ):
        wait_for(lambda: gateway.lines("replica_left_out"))
        time.sleep(1)  # until nginx knows
        for _ in range(4):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            check_error(answer, 503)
            assert answer.elapsed.total_seconds() < 2
        wait_for(lambda: len(gateway.lines()) == 4)
        assert {line["upstream"] for line in gateway.lines()} == {busy}


def test_a_service_that_cannot_answer_is_not_healthy(tmp_path: Path) -> None:
    """Its workers are READY, and every prediction fails."""
    body = b'[{"workers": [{"status": "READY"}]}]'
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with ExitStack() as stack:
        fine = stack.enter_context(torchserve_that(head % (b"200 OK", len(body)) + body))
        failing = stack.enter_context(torchserve_that(head % (b"500 ", 2) + b"{}"))
        env = {"GATEWAY_MANAGEMENT": fine, "GATEWAY_UPSTREAMS": failing}
        gateway = stack.enter_context(running(tmp_path, env))

        def state() -> requests.Response:
            return requests.get(f"{gateway.url}/health", timeout=TIMEOUT)

        wait_for(lambda: state().status_code == 503)
        why = f"{failing}: predictions of mobilenet_v2 fail with status 500"
        assert state().json()["missing"] == ["no replica answers a prediction"]
        assert state().json()["left_out"] == [why]
        page = requests.get(f"{gateway.url}/metrics", timeout=TIMEOUT).text
        assert f'gateway_replica_in_use{{replica="{failing}"}} 0' in page


def test_a_failure_of_the_handler_is_not_tried_again(tmp_path: Path) -> None:
    body = b'{"status":"error","code":500,"type":"ModelFailed","message":"the model failed"}'
    head = b"HTTP/1.1 500 \r\nX-Model-Version: 1.0\r\ncontent-length: %d\r\n\r\n"
    with ExitStack() as stack:
        answer = head % len(body) + body
        both = [stack.enter_context(torchserve_that(answer)) for _ in range(2)]
        env = {"GATEWAY_UPSTREAMS": ",".join(both)}
        gateway = stack.enter_context(running(tmp_path, env))
        reply = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
        assert (reply.status_code, reply.content) == (500, body)
        line = gateway.line(reply.headers["X-Request-ID"])
        assert line["upstream_status"] == "500"


def test_all_replicas_dead_is_503_at_once(tmp_path: Path) -> None:
    env = {
        "GATEWAY_UPSTREAMS": f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}",
        "GATEWAY_MANAGEMENT": f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}",
    }
    with running(tmp_path, env) as gateway:
        for _ in range(5):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            check_error(answer, 503)
            assert answer.headers["Retry-After"] == "1"
            assert answer.elapsed.total_seconds() < 2
        assert health(gateway.url) == {"ready": 0, "total": 2}


def test_stopping_the_gateway_loses_no_accepted_request(
    replicas: list[Server], tmp_path: Path
) -> None:
    with running(tmp_path, settings(replicas)) as gateway:
        with Load(f"{gateway.url}/predict", SMALL, clients=16) as load:
            load.wait(200)
            assert gateway.stop() == 0
        lines = gateway.lines()
    assert {line["status"] for line in lines} == {200}
    assert {line["request_id"] for line in lines} == load.answered


def test_serve_with_gateway_stops_gracefully(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    """First the gateway, then TorchServe: what was taken in is answered, and all is in the log."""
    port = free_port()
    env = {"TS_MODEL_STORE": str(store), "GATEWAY_RATE": "0"}
    options = [*colours, "--gateway", "--gateway-port", str(port)]
    with serving(tmp_path, *options, env=env) as server:
        started = psutil.Process(server.process.pid).children(recursive=True)
        with Load(f"http://127.0.0.1:{port}/predict", SMALL, clients=16) as load:
            load.wait(200)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
        taken = server.log("gateway")
        handled = server.log("request")
        assert not [child for child in started if child.is_running()]
    assert {line["status"] for line in taken} == {200}
    assert {line["request_id"] for line in taken} == load.answered
    assert {line["request_id"] for line in handled} == load.answered


def test_serve_ends_when_nginx_does(tmp_path: Path, colours: list[str], store: Path) -> None:
    env = {"TS_MODEL_STORE": str(store)}
    options = [*colours, "--gateway", "--gateway-port", str(free_port())]
    with serving(tmp_path, *options, env=env) as server:
        children = psutil.Process(server.process.pid).children()
        kill(next(child.pid for child in children if child.name() == "nginx"))
        assert server.process.wait(60) == 1
        assert "nginx ended with status -9" in server.text()
        wait_for(lambda: not [child for child in children if child.is_running()])


def test_serve_without_nginx_says_so_first(tmp_path: Path, colours: list[str]) -> None:
    """On a machine without nginx: a copy of the repository that looks in no folder for it."""
    for name in ("handler", "service", "scripts", "config.properties", "examples"):
        path = ROOT / name
        shutil.copytree(path, tmp_path / name) if path.is_dir() else shutil.copy(path, tmp_path)
    gateway = tmp_path / "service" / "gateway" / "process.py"
    gateway.write_text(gateway.read_text().replace('"/usr/sbin"', '"/nowhere"'))
    programs = tmp_path / "bin"
    programs.mkdir()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "serve.py", *colours, "--gateway"],
        env=environment(tmp_path, {"PATH": str(programs), "PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: the gateway needs nginx: apt-get install nginx libnginx-mod-http-lua lua-cjson\n"
    )
    assert time.monotonic() - started < 60

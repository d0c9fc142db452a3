"""Rates, concurrency, slow clients, keys and TLS."""

import hashlib
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
from requests.adapters import HTTPAdapter

from tests.gateway.conftest import Served
from tests.gateway.running import COMMAND, free_port, refused, running, settings, wait_for
from tests.gateway.test_routes import NAMES, RED, best, check_error
from tests.server.colours import encoded
from tests.server.serving import environment

TIMEOUT = 30
NAMES |= {401: "Unauthorized", 429: "TooManyRequests"}


class From(HTTPAdapter):
    """Connections from another loopback address: another client."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *args: object, **options: object) -> None:
        super().init_poolmanager(*args, source_address=(self.address, 0), **options)


def client(address: str) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", From(address))
    return session


@contextmanager
def torchserve_that(answer: bytes | None) -> Iterator[str]:
    """A server that gives this answer to everything, or, with None, never one."""
    held = ExitStack()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.enter_context(connection)
            if answer is not None:
                with suppress(OSError):  # whoever asked wants no more of it
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)

    with held, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_one_client_is_limited_and_another_is_not(gateway: Served, tmp_path: Path) -> None:
    with running(tmp_path, settings([gateway.server], rate="1", burst="3")) as other:
        url = f"{other.url}/predict"
        greedy, modest = client("127.0.0.1"), client("127.0.0.2")
        answers = [greedy.post(url, data=RED, timeout=TIMEOUT) for _ in range(10)]
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses[200] >= 4
        assert statuses[429] >= 2
        assert statuses.total() == statuses[200] + statuses[429]
        limited = next(answer for answer in answers if answer.status_code == 429)
        check_error(limited, 429)
        assert limited.headers["Retry-After"] == "1"
        assert best(modest.post(url, data=RED, timeout=TIMEOUT)) == "red"
        assert all(
            greedy.get(f"{other.url}/health", timeout=TIMEOUT).status_code == 200 for _ in range(10)
        )
        time.sleep(1.5)
        assert best(greedy.post(url, data=RED, timeout=TIMEOUT)) == "red"


def test_requests_at_once_are_limited(tmp_path: Path) -> None:
    with torchserve_that(None) as upstream:
        env = {
            "GATEWAY_UPSTREAMS": upstream,
            "GATEWAY_MAX_CONCURRENT": "3",
            "GATEWAY_MAX_CONCURRENT_PER_CLIENT": "2",
            "GATEWAY_RESPONSE_TIMEOUT_SECONDS": "3",
        }
        with running(tmp_path, env) as gateway, ThreadPoolExecutor(8) as pool:
            url = f"{gateway.url}/predict"

            def ask(address: str) -> requests.Response:
                return client(address).post(url, data=RED, timeout=TIMEOUT)

            addresses = ["127.0.0.1"] * 4 + ["127.0.0.2"] * 2
            answers = list(pool.map(ask, addresses))
    of_first = Counter(answer.status_code for answer in answers[:4])
    of_all = Counter(answer.status_code for answer in answers)
    assert of_first[504] <= 2
    assert of_all == {504: 3, 429: 3}
    for answer in answers:
        check_error(answer, answer.status_code)
        if answer.status_code == 504:
            assert 2.5 < answer.elapsed.total_seconds() < 10, "one replica is not asked twice"


def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    body = b'{"code": 503, "type": "ServiceUnavailableException", "message": "Model has no worker"}'
    head = b"HTTP/1.1 503 \r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with ExitStack() as stack:
        upstream = stack.enter_context(torchserve_that(head % len(body) + body))
        gateway = stack.enter_context(running(tmp_path, {"GATEWAY_UPSTREAMS": upstream}))
        answer = requests.post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)
        check_error(answer, 503)
        assert answer.headers["Retry-After"] == "1"
        line = gateway.line(answer.headers["X-Request-ID"])
        assert line["upstream_status"] == "503", "one replica is not asked twice"


@pytest.mark.parametrize("status", [500, 507])
def test_worker_died_twice(tmp_path: Path, status: int) -> None:
    body = b'{"code": %d, "type": "InternalServerException", "message": "Worker died."}' % status
    head = b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with ExitStack() as stack:
        upstream = stack.enter_context(torchserve_that(head % (status, len(body)) + body))
        gateway = stack.enter_context(running(tmp_path, {"GATEWAY_UPSTREAMS": upstream}))
        answer = requests.post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)
        check_error(answer, 500, "InternalError")
        line = gateway.line(answer.headers["X-Request-ID"])
        assert line["upstream_status"].count(str(status)) == 2


def test_200_slow_connections_do_not_harm_a_fast_client(gateway: Served, tmp_path: Path) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    env = settings([gateway.server], client_timeout_seconds="2")
    with running(tmp_path, env) as other, ExitStack() as held:
        slow: list[socket.socket] = []
        for number in range(200):
            connection = held.enter_context(socket.socket())
            connection.bind((f"127.0.1.{number % 100 + 1}", 0))
            connection.connect(("127.0.0.1", other.port))
            connection.sendall(head if number % 2 else head[:30])
            slow.append(connection)
        fast = client("127.0.0.1")
        started = time.monotonic()
        for _ in range(20):
            assert best(fast.post(f"{other.url}/predict", data=RED, timeout=TIMEOUT)) == "red"
        assert time.monotonic() - started < 20
        assert fast.get(f"{other.url}/health", timeout=TIMEOUT).status_code == 200
        for connection in slow:  # nobody is kept for good
            connection.settimeout(TIMEOUT)
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass


DRIP_SECONDS = 60  # at most: a test that fails must end, too


def drip(port: int, stop: threading.Event, connections: int, address: str, length: int) -> float:
    """Bodies of which a byte comes now and then; gives the seconds until all were cut off."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    started = time.monotonic()
    with ExitStack() as held:
        left = []
        for _ in range(connections):
            connection = held.enter_context(socket.socket())
            connection.bind((address, 0))
            connection.connect(("127.0.0.1", port))
            connection.sendall(head.encode() + b"x")
            connection.settimeout(0)
            left.append(connection)
        while left and not stop.wait(0.2) and time.monotonic() - started < DRIP_SECONDS:
            for connection in [*left]:
                try:
                    connection.sendall(b"x")
                    cut = connection.recv(4096) == b""
                except BlockingIOError:
                    cut = False
                except OSError:
                    cut = True
                if cut:
                    left.remove(connection)
        return time.monotonic() - started


def test_a_dripped_body_is_bounded_in_time(gateway: Served, tmp_path: Path) -> None:
    env = settings([gateway.server], body_timeout_seconds="2", client_timeout_seconds="30")
    with running(tmp_path, env) as other:
        seconds = drip(other.port, threading.Event(), 4, "127.0.0.1", 1000)
        assert 1.5 < seconds < 10
        wait_for(lambda: len(other.lines()) == 4)
        assert {line["status"] for line in other.lines()} == {408}


def test_a_dripped_body_is_bounded_in_time_with_tls(
    gateway: Served, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    path, key = map(str, certificate)
    env = settings([gateway.server], body_timeout_seconds="2", tls_certificate=path, tls_key=key)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x"
            time.sleep(0.5)

    with running(tmp_path, env, scheme="https") as other:
        with suppress(requests.ConnectionError):  # it may still be sending
            answer = requests.post(
                f"{other.url}/predict", data=pieces(), verify=path, timeout=TIMEOUT
            )
            check_error(answer, 408, "RequestTimeout")
        wait_for(lambda: [line["status"] for line in other.lines()] == [408])


def test_refused_bodies_leave_room_for_others(gateway: Served, tmp_path: Path) -> None:
    """Too large, or broken, as turns out while they come: far more than there is room for."""
    env = settings([gateway.server], max_body_bytes=str(2**20), max_concurrent="4")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    too_large = [b"%x\r\n%s\r\n" % (2**19, bytes(2**19))] * 3
    with running(tmp_path, env) as other:
        for number in range(60):
            with socket.create_connection(("127.0.0.1", other.port), timeout=TIMEOUT) as sender:
                sender.sendall(head)
                time.sleep(0.01)  # so that the rest comes later
                status = 413 if number % 2 else 400
                with suppress(BrokenPipeError, ConnectionResetError):
                    for piece in too_large if status == 413 else [b"no length\r\n"]:
                        sender.sendall(piece)
                    answer = sender.recv(65536)
                    assert answer.startswith(b"HTTP/1.1 %d" % status)
                    assert b'"status":"error"' in answer
        wait_for(lambda: len(other.lines()) == 60)
        assert best(client("127.0.0.1").post(f"{other.url}/predict", data=RED)) == "red"
        assert "lua" not in other.stderr.read_text()
        assert "[alert]" not in other.stderr.read_text()


@pytest.mark.parametrize("length", [1000, 16 * 2**20])
def test_slow_bodies_lock_nobody_out(gateway: Served, tmp_path: Path, length: int) -> None:
    """Four clients with 64 connections each, and, as behind a proxy, one more with all of them."""
    stop = threading.Event()
    with running(tmp_path, settings([gateway.server])) as other, ThreadPoolExecutor(4) as pool:
        try:
            for number in range(4):
                pool.submit(drip, other.port, stop, 64, f"127.0.0.{number + 2}", length)
            time.sleep(1)
            for address in ("127.0.0.9", "127.0.0.2"):
                fast = client(address)
                statuses = Counter(
                    fast.post(f"{other.url}/predict", data=RED, timeout=TIMEOUT).status_code
                    for _ in range(100)
                )
                assert statuses == {200: 100}
        finally:
            stop.set()


def test_a_dripped_head_is_bounded_in_time(gateway: Served, tmp_path: Path) -> None:
    def drip(connection: socket.socket) -> None:
        for byte in b"GET / HTTP/1.1\r\nHost: " + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    with ExitStack() as stack:
        env = settings([gateway.server], client_timeout_seconds="2")
        other = stack.enter_context(running(tmp_path, env))
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", other.port)))
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            drip(connection)
        assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("parts", "before"), [(1000, ""), (1000, "\t"), (2000, ""), (2000, "\t"), (250_000, "")]
)
def test_a_flood_of_form_parts_does_not_reach_torchserves_parser(
    gateway: Served, parts: int, before: str
) -> None:
    """TorchServe alone takes half a minute for the last of these."""
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    body = part * parts + b"--x--\r\n"
    url = f"{gateway.url}/predict"
    request = requests.Request("POST", url, data=body).prepare()
    request.headers["Content-Type"] = f"{before}multipart/form-data; boundary=x"
    with requests.Session() as session:
        session.trust_env = False
        answer = session.send(request, timeout=TIMEOUT)
    check_error(answer, 413, "TooManyImages")
    assert answer.elapsed.total_seconds() < 5


# --- keys

KEYS = {"alice": "alices-key", "bob": "bobs-key", "carol": "carols-key"}


def key_line(name: str, more: str = "") -> str:
    return f"{name} {hashlib.sha256(KEYS[name].encode()).hexdigest()} {more}\n"


def test_keys(gateway: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# clients\n" + key_line("alice") + key_line("carol", "disabled"))
    with running(tmp_path, settings([gateway.server], keys=str(file))) as other:

        def ask(path: str = "/predict", **headers: str) -> requests.Response:
            method = "GET" if path == "/info" else "POST"
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return requests.request(
                method, other.url + path, data=RED, headers=named, timeout=TIMEOUT
            )

        bearer = {"Authorization": f"Bearer {KEYS['alice']}"}
        for path in ("/predict", "/predictions/mobilenet_v2", "/info"):
            for wrong in (
                {},
                {"X_API_Key": "wrong"},
                {"X_API_Key": ""},
                {"Authorization": f"Basic {KEYS['alice']}"},
                {"Authorization": KEYS["alice"]},
                {"Authorization": "Bearer"},
                {"X_API_Key": hashlib.sha256(KEYS["alice"].encode()).hexdigest()},
                {"X_API_Key": KEYS["bob"]},
            ):
                answer = ask(path, **wrong)
                check_error(answer, 401)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            check_error(ask(path, X_API_Key=KEYS["carol"]), 403)
            assert ask(path, **bearer).status_code == 200
            assert ask(path, X_API_Key=KEYS["alice"]).status_code == 200
        for path in ("/health", "/livez", "/metrics"):
            assert requests.get(other.url + path, timeout=TIMEOUT).status_code == 200
        assert requests.get(f"{other.url}/openapi.json", timeout=TIMEOUT).status_code != 401

        # taken in without a restart, and without harm to a connection that is open
        with requests.Session() as session:
            session.headers["X-API-Key"] = KEYS["bob"]
            url = f"{other.url}/predict"
            assert session.post(url, data=RED, timeout=TIMEOUT).status_code == 401
            file.write_text(key_line("bob") + key_line("alice", "disabled"))
            wait_for(lambda: session.post(url, data=RED, timeout=TIMEOUT).status_code == 200)
            wait_for(lambda: ask(**bearer).status_code == 403)

        # a broken file leaves the keys as they were
        file.write_text("bob not-a-digest\n")
        wait_for(lambda: "line 1 must be NAME SHA256" in other.stderr.read_text())
        assert "the keys stay as they were" in other.stderr.read_text()
        assert ask(X_API_Key=KEYS["bob"]).status_code == 200
        file.unlink()
        wait_for(lambda: "cannot be read" in other.stderr.read_text())
        assert ask(X_API_Key=KEYS["bob"]).status_code == 200

        answer = ask(X_API_Key=KEYS["bob"])
        assert other.line(answer.headers["X-Request-ID"])["client"] == "bob"
        assert other.stop() == 0
        printed = other.stdout.read_text() + other.stderr.read_text()
    assert not any(key in printed for key in KEYS.values())
    assert not any(key in gateway.server.text() for key in KEYS.values())


def test_keys_and_other_secrets_do_not_reach_torchserve(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice"))
    seen: list[bytes] = []

    def serve() -> None:
        while not seen:
            connection, _ = listener.accept()
            with connection:
                data = connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                if data.startswith(b"POST") and b"X-Probe" not in data:  # no question of its own
                    seen.append(data)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        upstream = f"127.0.0.1:{listener.getsockname()[1]}"
        env = {"GATEWAY_UPSTREAMS": upstream, "GATEWAY_KEYS": str(file)}
        with running(tmp_path, env) as gateway:
            headers = {
                "Authorization": f"Bearer {KEYS['alice']}",
                "X-API-Key": KEYS["alice"],
                "Cookie": "a=b",
                "describe": "True",
                "traceparent": "00-1",
                "X-Request-ID": "mine",
                "Content-Type": "image/png",
            }
            url = f"{gateway.url}/predict?top_k=3&key={KEYS['alice']}"
            requests.post(url, data=b"abc", headers=headers, timeout=TIMEOUT)
        thread.join()
    head, _, body = seen[0].decode().partition("\r\n\r\n")
    request, *lines = head.split("\r\n")
    assert request == "POST /predictions/mobilenet_v2 HTTP/1.1"
    got = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    sent = float(got.pop("x-request-start").removeprefix("t="))
    assert sent == pytest.approx(time.time(), abs=60)
    assert got == {
        "host": "torchserve",
        "content-length": "3",
        "content-type": "application/octet-stream",
        "x-body-type": "image/png",
        "x-top-k": "3",
        "x-request-id": "mine",
        "traceparent": "00-1",
    }
    assert body == "abc"


def test_limits_are_by_key_and_not_by_address(gateway: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice") + key_line("bob"))
    env = settings([gateway.server], keys=str(file), rate="1", burst="2")
    with running(tmp_path, env) as other:

        def ask(name: str, address: str) -> int:
            headers = {"X-API-Key": KEYS[name]}
            url = f"{other.url}/predict"
            return client(address).post(url, data=RED, headers=headers, timeout=30).status_code

        statuses = [ask("alice", f"127.0.0.{i + 1}") for i in range(8)]
        assert 429 in statuses
        assert ask("bob", "127.0.0.1") == 200


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"GATEWAY_HOST": "0.0.0.0"}, ["GATEWAY_KEYS=off", "--new-key"]),
        ({"GATEWAY_PRT": "1"}, ["GATEWAY_PRT is unknown"]),
        ({"GATEWAY_PORT": "1;"}, ["GATEWAY_PORT", "'1;'"]),
        ({"GATEWAY_UPSTREAMS": "nowhere.invalid:1"}, ["nowhere.invalid"]),
        ({"GATEWAY_TLS_CERTIFICATE": __file__, "GATEWAY_TLS_KEY": __file__}, ["nginx refuses"]),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, env: dict[str, str], words: list[str]) -> None:
    line = refused(tmp_path, env)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(tmp_path, {"GATEWAY_PORT": str(port)})


def test_the_gateway_ends_when_nginx_does(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, {"GATEWAY_PORT": str(port)}) as gateway:
        nginx, *_ = psutil.Process(gateway.process.pid).children()
        children = nginx.children()
        nginx.kill()
        assert gateway.process.wait(30) == 1
        for child in children:
            child.kill()
    assert "nginx ended" in gateway.stderr.read_text()


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return paths


def test_tls(gateway: Served, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    path, key = map(str, certificate)
    env = settings([gateway.server], tls_certificate=path, tls_key=key)
    with running(tmp_path, env, scheme="https") as other:
        url = f"{other.url}/predict?top_k=1"
        answer = requests.post(url, data=RED, verify=path, timeout=TIMEOUT)
        assert best(answer) == "red"
        assert answer.headers["Strict-Transport-Security"] == "max-age=63072000"

        picture = tmp_path / "red.jpg"
        picture.write_bytes(encoded("red"))
        done = subprocess.run(
            [
                *("curl", "--silent", "--show-error", "--cacert", path, "--http2"),
                *(url, "-F", f"file=@{picture}", "-w", "%{http_version}"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.endswith("2")
        assert '"class":"red"' in done.stdout

        check_error(requests.get(other.url.replace("https", "http"), timeout=TIMEOUT), 400)

        def handshake(version: ssl.TLSVersion) -> str | None:
            context = ssl.create_default_context(cafile=path)
            context.minimum_version = context.maximum_version = version
            context.set_ciphers("ALL:@SECLEVEL=0")
            plain = socket.create_connection(("127.0.0.1", other.port), timeout=TIMEOUT)
            with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
                return secured.version()

        assert handshake(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        assert handshake(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises(ssl.SSLError):
            handshake(ssl.TLSVersion.TLSv1_1)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    env = environment(tmp_path, {"TMPDIR": str(folder), "GATEWAY_PORT": str(free_port())})
    process = subprocess.Popen(COMMAND, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "Gateway on" in process.stderr.readline()
        assert list(folder.iterdir())
        process.terminate()
        assert process.wait(30) == 0
        assert not list(folder.iterdir())
    finally:
        process.kill()

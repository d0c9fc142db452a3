"""gRPC has the gateway's keys, limits, addresses, deadlines and TLS, and its start and end."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import requests

from handler.errors import SetupError
from service.gateway.config import worker_user
from service.gateway.settings import GatewaySettings
from service.logs import Log
from service.openinference import process
from service.openinference.rest import Body, from_rest, to_rest
from tests.fuzz.messages import call_in_frames
from tests.gateway.running import kill
from tests.gateway.running import refused as not_started
from tests.gateway.test_grpc import watch
from tests.gateway.test_keys import KEYS, key_line
from tests.gateway.test_tls import certificate
from tests.gateway.v2 import (
    SERVICE,
    TIMEOUT,
    Served,
    image_request,
    infer,
    refused,
    serving_grpc,
)
from tests.processes import free_port, wait_for

__all__ = ["certificate"]
IMAGE = image_request(b"one")


def from_address(address: str) -> list[tuple[str, str]]:
    """Metadata that a load balancer sends; what comes before the last address may be made up."""
    return [("x-forwarded-for", f"10.9.9.9, {address}")]


def grpc_process(served: Served) -> psutil.Process:
    [found] = [
        child
        for child in psutil.Process(served.gateway.process.pid).children()
        if "openinference" in " ".join(child.cmdline())
    ]
    return found


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice") + key_line("carol", "disabled"))
    good = [("x-api-key", KEYS["alice"])]
    with serving_grpc(tmp_path, keys=str(file)) as served, served.channel() as channel:
        for metadata, code in (
            ([], "UNAUTHENTICATED"),
            ([("x-api-key", KEYS["bob"])], "UNAUTHENTICATED"),
            ([("authorization", f"Basic {KEYS['alice']}")], "UNAUTHENTICATED"),
            ([("x-api-key", KEYS["carol"])], "PERMISSION_DENIED"),
        ):
            assert refused(channel, IMAGE, metadata=metadata)[0] == code
        infer(channel, IMAGE, metadata=good)
        infer(channel, IMAGE, metadata=[("authorization", f"Bearer {KEYS['alice']}")])
        assert not {"authorization", "x-api-key"} & served.replica.headers.keys()
        assert served.replica.requests == 2
        assert refused(channel, image_request(model_name="/"), metadata=good)[0] == "NOT_FOUND"
        grpc = grpc_process(served)
        seen = " ".join(grpc.cmdline()) + repr(grpc.environ())
        wait_for(lambda: len(served.gateway.lines()) == 6)
        assert served.gateway.lines()[-1]["client"] == "alice"
        [line] = [line for line in served.gateway.lines("grpc") if "code" in line]
        assert (line["code"], line["address"]) == ("NOT_FOUND", "127.0.0.1")
        seen += served.gateway.stdout.read_text() + served.gateway.stderr.read_text()
    assert not [key for key in KEYS.values() if key in seen]


def test_a_key_that_is_no_header_is_not_logged(tmp_path: Path) -> None:
    """A careful client does not send it, and grpcio prints it."""
    frames = call_in_frames([(b"x-api-key", b"secret\xff")], image_request().SerializeToString())
    with serving_grpc(tmp_path) as served:
        with socket.create_connection(("127.0.0.1", served.port), TIMEOUT) as connection:
            connection.sendall(frames)
            wait_for(lambda: [line for line in served.gateway.lines("grpc") if "code" in line], 10)
        assert served.gateway.stop() == 0
        seen = served.gateway.stdout.read_text() + served.gateway.stderr.read_text()
    assert "the metadata x-api-key has characters" in seen
    assert "secret" not in seen


@pytest.mark.parametrize("path", [b"/\xeb", f"/{SERVICE}/ModelInfer?\xeb".encode("latin-1")])
def test_a_path_that_is_not_text_disturbs_nobody(tmp_path: Path, path: bytes) -> None:
    """It would end grpcio's server (1.85), which does not get it."""
    frames = call_in_frames([], IMAGE.SerializeToString(), path=path)
    with (
        serving_grpc(tmp_path) as served,
        served.channel() as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        served.replica.held = threading.Event()
        begun = pool.submit(infer, channel, IMAGE)
        wait_for(lambda: served.replica.requests == 1)
        for count in range(1, 4):
            with socket.create_connection(("127.0.0.1", served.port), TIMEOUT) as connection:
                connection.sendall(frames)
                wait_for(lambda: len(served.gateway.lines("grpc")) == count, 10)  # noqa: B023
        served.replica.held.set()
        assert begun.result().model_name == "resnet50"
        infer(channel, IMAGE)
        assert {line["code"] for line in served.gateway.lines("grpc")} == {"UNIMPLEMENTED"}
        assert served.gateway.stop() == 0


@pytest.mark.parametrize(
    ("proxies", "address"), [("", "127.0.0.1"), ("127.0.0.0/8,10.1.0.0/16", "192.0.2.7")]
)
def test_addresses_are_the_clients(tmp_path: Path, proxies: str, address: str) -> None:
    """Only a trusted proxy says who the client is; over gRPC as over REST."""
    forwarded = "10.9.9.9, 192.0.2.7, 10.1.2.3" if proxies else "192.0.2.7"
    settings = {"trusted_proxies": proxies} if proxies else {}
    with serving_grpc(tmp_path, **settings) as served, served.channel() as channel:
        infer(channel, IMAGE, metadata=[("x-forwarded-for", forwarded)])
        requests.get(
            f"{served.gateway.url}/livez", headers={"X-Forwarded-For": forwarded}, timeout=TIMEOUT
        )
        wait_for(lambda: len(served.gateway.lines()) == 2)
        assert [line["address"] for line in served.gateway.lines()] == [address, address]


def test_rates_are_each_clients(tmp_path: Path) -> None:
    settings = {"rate": "1", "burst": "1", "trusted_proxies": "127.0.0.1"}
    with serving_grpc(tmp_path, **settings) as served, served.channel() as channel:
        for address in ("192.0.2.1", "192.0.2.2"):
            infer(channel, IMAGE, metadata=from_address(address))
            infer(channel, IMAGE, metadata=from_address(address))
            with pytest.raises(grpc.RpcError) as error:
                infer(channel, IMAGE, metadata=from_address(address))
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert str(error.value.details()).startswith("TooManyRequests: ")
            trailers: Any = error.value.trailing_metadata()
            assert dict(trailers)["retry-after"] == "1"


def test_a_deadline_reaches_the_handler(tmp_path: Path) -> None:
    limit = {"response_timeout_seconds": "2"}
    with serving_grpc(tmp_path, **limit) as served, served.channel() as channel:
        infer(channel, IMAGE, timeout=1.5)
        # gRPC rounds a deadline up on its way: grpc-timeout has two or three digits.
        assert 1 < float(served.replica.headers["x-request-timeout"]) < 1.6
        infer(channel, IMAGE, timeout=10**6)
        assert float(served.replica.headers["x-request-timeout"]) == 2
        served.replica.held = threading.Event()
        began = time.monotonic()
        assert refused(channel, IMAGE, timeout=0.5)[0] == "DEADLINE_EXCEEDED"
        assert time.monotonic() - began < 1.5
        code, message = refused(channel, IMAGE, timeout=None)
        assert (code, message.split(":")[0]) == ("DEADLINE_EXCEEDED", "Timeout")
        served.replica.held.set()


def test_nobody_behind_the_gateway_is_unavailable(tmp_path: Path) -> None:
    with serving_grpc(tmp_path, upstreams="127.0.0.1:9") as served, served.channel() as channel:
        code, message = refused(channel, IMAGE)
        assert (code, message.split(":")[0]) == ("UNAVAILABLE", "Unavailable")


def test_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    path, key = certificate
    with serving_grpc(tmp_path, "https", tls_certificate=str(path), tls_key=str(key)) as served:
        credentials = grpc.ssl_channel_credentials(path.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{served.port}", credentials) as channel:
            assert infer(channel, IMAGE).model_name == "resnet50"
        with served.channel() as channel:
            assert refused(channel, IMAGE)[0] == "UNAVAILABLE"
        assert classes_by_rest(served, tmp_path, str(path)) == [b"tench", "Käfig".encode()]
        seen = " ".join(grpc_process(served).cmdline()) + repr(grpc_process(served).environ())
    for line in key.read_text().splitlines()[1:-1]:
        assert line not in seen


def classes_by_rest(served: Served, folder: Path, certificate: str) -> list[bytes]:
    """The labels of V2 with binary tensors over HTTP/2 and TLS."""
    body, answered = to_rest(IMAGE), folder / "answered"
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--fail", "--http2", "--cacert", certificate),
            *("--data-binary", "@-", "--output", str(answered)),
            *("-H", f"Inference-Header-Content-Length: {body.json_bytes}"),
            *("-w", "%{http_version} %header{inference-header-content-length}"),
            f"{served.gateway.url}/v2/models/resnet50/infer",
        ],
        input=body.data,
        capture_output=True,
        check=True,
        timeout=TIMEOUT,
    )
    version, size = done.stdout.split()
    assert version == b"2"
    answer = from_rest(Body(answered.read_bytes(), int(size)), raw=False)
    return list(answer.outputs[0].contents.bytes_contents)


def peak_kb(status: Path) -> int:
    """A process's peak of resident memory."""
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])


class Slow:
    """Callers who begin calls and never send the message."""

    def __init__(self, channel: grpc.Channel, address: str, count: int) -> None:
        self._ended = threading.Event()
        method: Any = channel.stream_unary(f"/{SERVICE}/ModelInfer")
        metadata = from_address(address)
        self.calls = [
            method.future(self._nothing(), metadata=metadata, timeout=TIMEOUT) for _ in range(count)
        ]

    def _nothing(self) -> Iterator[bytes]:
        self._ended.wait(TIMEOUT)
        yield from ()

    def __enter__(self) -> "Slow":
        time.sleep(0.5)  # until the server has them
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def codes(self) -> list[str]:
        return [call.code().name for call in self.calls if call.done()]


def test_who_sends_slowly_locks_nobody_out(tmp_path: Path) -> None:
    settings = {"max_concurrent": "4", "trusted_proxies": "127.0.0.1"}
    with (
        serving_grpc(tmp_path, **settings) as served,
        served.channel() as channel,
        Slow(channel, "192.0.2.1", 4) as slow,
    ):
        assert slow.codes() == []
        infer(channel, IMAGE, metadata=from_address("192.0.2.2"))
        wait_for(lambda: slow.codes() == ["RESOURCE_EXHAUSTED"])  # its oldest


def test_a_message_has_a_limit_in_time(tmp_path: Path) -> None:
    with (
        serving_grpc(tmp_path, body_timeout_seconds="1") as served,
        served.channel() as channel,
        Slow(channel, "192.0.2.1", 2) as slow,
    ):
        wait_for(lambda: slow.codes() == ["DEADLINE_EXCEEDED"] * 2, 5)


def test_a_compressed_message_takes_no_more_memory_than_its_limit(tmp_path: Path) -> None:
    """128 MB of zeros are 128 KB on the wire."""
    large = image_request(bytes(128 * 2**20))
    with serving_grpc(tmp_path, max_body_bytes="1000000") as served, served.channel() as channel:
        infer(channel, IMAGE)
        status = Path(f"/proc/{grpc_process(served).pid}/status")
        before = peak_kb(status)
        code, _ = refused(channel, large, compression=grpc.Compression.Gzip)
        assert code == "RESOURCE_EXHAUSTED"
        assert peak_kb(status) - before < 20_000


def test_what_was_begun_is_answered_at_the_end(tmp_path: Path) -> None:
    with serving_grpc(tmp_path) as served, served.channel() as channel:
        served.replica.held = threading.Event()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(infer, channel, IMAGE) for _ in range(8)]
            wait_for(lambda: served.replica.requests == 8)
            served.gateway.process.terminate()
            time.sleep(0.5)
            assert refused(channel, IMAGE)[0] == "UNAVAILABLE"
            served.replica.held.set()
            assert {each.result().model_name for each in answers} == {"resnet50"}
        assert served.gateway.process.wait(TIMEOUT) == 0


def test_watches_delay_no_end(tmp_path: Path) -> None:
    with serving_grpc(tmp_path) as served, served.channel() as channel:
        watched = watch(channel, "")
        next(watched)
        began = time.monotonic()
        assert served.gateway.stop() == 0
        assert time.monotonic() - began < 10


def test_the_gateway_ends_when_grpc_does(tmp_path: Path) -> None:
    with serving_grpc(tmp_path) as served:
        kill(grpc_process(served).pid)
        assert served.gateway.process.wait(TIMEOUT) == 1
    assert "the gRPC server ended with status -9" in served.gateway.stderr.read_text()


def test_it_does_not_outlive_the_gateway(tmp_path: Path) -> None:
    with serving_grpc(tmp_path) as served:
        grpc = grpc_process(served)
        kill(served.gateway.process.pid)
        grpc.wait(5)


def test_it_has_no_more_rights_than_nginx(tmp_path: Path) -> None:
    with serving_grpc(tmp_path) as served:
        user = worker_user()
        expected = (user.pw_uid, user.pw_gid) if user else (psutil.Process().uids().real,)
        process = grpc_process(served)
        assert (process.uids().effective, process.gids().effective)[: len(expected)] == expected


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    port = str(free_port())
    line = not_started(tmp_path, {"GATEWAY_PORT": port, "GATEWAY_GRPC_PORT": port})
    assert "given twice" in line
    assert "GATEWAY_GRPC_PORT" in line


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"GATEWAY_GRPC_PORT needs .*requirements-grpc\.txt"):
        process.GrpcServer(GatewaySettings(grpc_port=8001), Log("json"))


def test_nothing_of_it_is_imported_without_it() -> None:
    code = (
        "import sys, scripts.gateway, scripts.serve; "
        "print([name for name in ('grpc', 'google.protobuf', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    assert done.stdout.strip() == "[]"

"""TLS."""

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from tests.gateway.clients import RED, TIMEOUT, best, check_error
from tests.gateway.conftest import Served
from tests.gateway.running import running, settings
from tests.processes import wait_for
from tests.server.colours import encoded


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


def test_a_dripped_body_is_bounded_in_time_with_tls(
    gateway: Served, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    path, key = map(str, certificate)
    env = settings([gateway.server], body_timeout_seconds="2", tls_certificate=path, tls_key=key)

    def pieces() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x"
            time.sleep(0.5)

    with running(tmp_path, env, scheme="https") as other:
        with suppress(requests.ConnectionError):  # it may still be sending
            answer = requests.post(
                f"{other.url}/predict", data=pieces(), verify=path, timeout=TIMEOUT
            )
            check_error(answer, 408, "RequestTimeout")
        wait_for(lambda: [line["status"] for line in other.lines()] == [408])

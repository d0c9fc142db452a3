"""Java without memory, for real: the launcher says so and ends with status 1."""

import base64
import os
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from tests.server.serving import Server, serving

COMMON = (
    "-XX:+ExitOnOutOfMemoryError -XX:+UseSerialGC -Xms48m -Dio.netty.allocator.numDirectArenas=1"
)


def use_memory_up(server: Server) -> None:
    """Large bodies, which are copied on the heap; and some that are lost outside of it.

    TorchServe's reader of multipart bodies throws over this header, and forgets the body.
    """
    part = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n'
        b"Content-Type: image/jpeg\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    )
    body = part + base64.b64encode(os.urandom(4_500_000)) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for _ in range(100):
        with suppress(requests.RequestException):
            requests.post(server.predictions, data=body, headers=headers, timeout=5)
        with suppress(requests.RequestException):
            requests.post(server.predictions, data=bytes(15_000_000), timeout=5)
        if server.process.poll() is not None:
            return


@pytest.mark.parametrize(
    ("vmargs", "words"),
    [
        (f"{COMMON} -XX:MaxDirectMemorySize=64m", "(java.lang.OutOfMemoryError"),
        (f"{COMMON} -Xmx48m -XX:MaxDirectMemorySize=2g", "Error: Java heap space)"),
    ],
    ids=["direct", "heap"],
)
def test_the_service_ends_when_java_has_no_memory(
    tmp_path: Path, colours: list[str], store: Path, vmargs: str, words: str
) -> None:
    env = {"TS_MODEL_STORE": str(store), "TS_VMARGS": vmargs}
    with serving(tmp_path, *colours, "--workers", "1", env=env) as server:
        java = server.java()
        assert requests.get(f"{server.url}/ping", timeout=10).ok
        use_memory_up(server)
        assert server.process.wait(120) == 1
        [line] = [line for line in server.text().splitlines() if line.startswith("error: ")]
        assert line.startswith("error: Java is out of memory")
        assert words in line
        assert not java.is_running()


def test_java_is_bounded_and_leaves_no_file_in_tmp(server: Server) -> None:
    java = server.java()
    words = java.cmdline()
    assert any(word.startswith("-Xmx") for word in words)
    assert any(word.startswith("-XX:MaxDirectMemorySize=") for word in words)
    assert not list(Path("/tmp").glob(f"hsperfdata_*/{java.pid}"))  # wherever TMPDIR is

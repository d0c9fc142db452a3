"""Downloads from a real server with a certificate of its own: what is kept, and what is refused."""

import hashlib
import random
import ssl
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from handler.errors import InvalidModel, SetupError
from service.registry import cache, downloads
from service.registry.cache import cache_folder
from service.registry.downloads import download
from service.registry.references import Url
from tests.keys import make_certificate
from tests.unit.conftest import Web

CONTENT = random.Random(0).randbytes(3 * 2**20 + 1)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PATH = "/models/birds.pth?Signature=secret"


@pytest.fixture
def site(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """`web` over TLS, whose certificate counts, with the file; nothing is in the cache."""
    certificate, key = make_certificate(tmp_path, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    web.server.socket = context.wrap_socket(web.server.socket, server_side=True)
    web.url = web.url.replace("http:", "https:")
    web.answers[PATH] = web.text(CONTENT)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return web


@pytest.fixture(autouse=True)
def no_secret_is_shown(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "secret" not in "".join(capsys.readouterr())


def files() -> list[Path]:
    """All that is in the cache, and all that a download may have left."""
    return [path for path in cache_folder().rglob("*") if path.is_file()]


def refusal(site: Web, kind: type[SetupError] = SetupError) -> str:
    """The message of a download that fails and leaves nothing behind."""
    with pytest.raises(kind) as refused:
        download(Url(site.url + PATH), DIGEST)
    assert files() == []
    assert f"{site.url}/models/birds.pth" in str(refused.value)
    assert "secret" not in str(refused.value)
    return str(refused.value)


def test_a_file_is_fetched_once(site: Web) -> None:
    path = download(Url(site.url + PATH), DIGEST)
    assert path == cache_folder() / DIGEST / "birds.pth"
    assert path.read_bytes() == CONTENT
    asked = len(site.asked)
    assert download(Url(site.url + PATH), DIGEST) == path
    assert len(site.asked) == asked > 0


def test_a_damaged_file_in_the_cache_is_fetched_again(site: Web) -> None:
    path = download(Url(site.url + PATH), DIGEST)
    path.write_bytes(CONTENT[:-1])
    assert download(Url(site.url + PATH), DIGEST).read_bytes() == CONTENT


def test_what_a_killed_download_left_is_removed(site: Web) -> None:
    left = cache_folder() / ".downloading-killed"
    left.mkdir(parents=True)
    for name in (".owner", "birds.pth"):
        (left / name).write_bytes(b"part")
    path = download(Url(site.url + PATH), DIGEST)
    assert files() == [path]


def test_another_file_is_refused_with_both_digests(site: Web) -> None:
    site.answers[PATH] = site.text(CONTENT + b"x")
    message = refusal(site, InvalidModel)
    assert f"sha256 is {hashlib.sha256(CONTENT + b'x').hexdigest()}, expected {DIGEST}" in message


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_error_of_the_server_is_named(site: Web, status: int) -> None:
    site.answers[PATH] = site.text("no", status)
    assert f"cannot be downloaded: HTTP status {status}" in refusal(site)


def test_half_a_file_is_refused(site: Web) -> None:
    def half(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[: len(CONTENT) // 2])

    site.answers[PATH] = half
    assert "cannot be downloaded: " in refusal(site)


def test_a_file_that_is_too_large_is_refused(site: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "MAX_BYTES", len(CONTENT) - 1)
    assert f"has more than {len(CONTENT) - 1} bytes" in refusal(site, InvalidModel)
    monkeypatch.setattr(downloads, "MAX_BYTES", len(CONTENT))
    assert download(Url(site.url + PATH), DIGEST).is_file()


def test_a_server_that_falls_silent_is_given_up(site: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[:1000])
        request.wfile.flush()
        request.rfile.read(1)  # until the client goes

    site.answers[PATH] = silent
    monkeypatch.setattr(downloads, "SILENT_SECONDS", 0.3)
    started = time.monotonic()
    assert "cannot be downloaded: " in refusal(site)
    assert time.monotonic() - started < 10


def test_a_download_that_takes_too_long_is_given_up(
    site: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "TOTAL_SECONDS", 0)
    assert "not downloaded within 0 s" in refusal(site)


def test_an_unknown_certificate_is_refused(site: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "certificate" in refusal(site).lower()


def test_a_port_where_nobody_listens(
    closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SetupError, match="cannot be downloaded: "):
        download(Url(f"https://127.0.0.1:{closed_port}/w.pth"), DIGEST)


def test_a_cache_that_cannot_be_written_is_named(
    site: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="cannot be kept in "):
        download(Url(site.url + PATH), DIGEST)


def test_the_cache_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    for name, value in ((None, None), ("XDG_CACHE_HOME", "x"), ("TORCH_HOME", "t")):
        if name:
            monkeypatch.setenv(name, str(tmp_path / str(value)))
        assert cache.cache_folder() == Path(torch.hub.get_dir()) / "checkpoints"

"""Weights from wherever they come: downloads, files, seeds, and everything else."""

import hashlib
import random
import re
import socket
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import torchvision

from handler.errors import InvalidModel
from handler.model_card import WeightsFacts
from handler.networks import architectures, get_recipe
from service.archive import weights
from service.archive.weights import (
    DownloadFailed,
    Source,
    download,
    find_weights,
    read_weights,
    scales_input_again,
)
from tests.unit.conftest import Web
from tests.unit.tiny import ARCHITECTURE, RECIPE

CONTENT = random.Random(0).randbytes(3 * 2**20 + 1)  # more than one read
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"birds-{DIGEST[:8]}.pth"


# --- Files


@pytest.mark.parametrize("choice", ["missing.pth", "Pretrained", "", "."], ids=repr)
def test_what_is_no_file_is_refused(choice: str) -> None:
    with pytest.raises(InvalidModel) as refused:
        find_weights(choice, RECIPE, ARCHITECTURE)
    assert f"--weights {choice}: there is no such file" in str(refused.value)


def test_source_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "birds.pth").write_bytes(CONTENT)
    facts = WeightsFacts(name="birds.pth", trained=True, source="file", sha256=DIGEST)
    source = find_weights(str(tmp_path / "birds.pth"), RECIPE, ARCHITECTURE)
    assert source == Source(facts, tmp_path / "birds.pth")


# --- A seed


def test_source_of_untrained_weights() -> None:
    source = find_weights("untrained", RECIPE, ARCHITECTURE)
    facts = source.facts
    assert (facts.name, facts.source, source.path) == ("untrained", "seed 0", None)
    assert not facts.trained
    assert re.fullmatch("[0-9a-f]{64}", facts.sha256)
    assert find_weights("untrained", RECIPE, ARCHITECTURE) == source
    assert find_weights("untrained", RECIPE, "alexnet").facts.sha256 != facts.sha256


def test_untrained_weights_are_always_the_same() -> None:
    source = find_weights("untrained", RECIPE, ARCHITECTURE)
    torch.manual_seed(99)
    first = read_weights(source, RECIPE, ARCHITECTURE).tables[""]
    second = read_weights(source, RECIPE, ARCHITECTURE).tables[""]
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["classifier.1.weight"].shape[0] == 1000
    assert first["classifier.1.weight"].std() > 0


# --- Downloads


def broken_off(reset: bool) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that promises more than it sends."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[:500])
        request.wfile.flush()
        if reset:  # RST in place of FIN
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()

    return answer


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_download_once(web: Web, tmp_path: Path) -> None:
    web.answers[f"/{NAME}"] = web.text(CONTENT)
    for _ in range(2):
        path = download(f"{web.url}/{NAME}", tmp_path / "new" / "cache")
        assert path == tmp_path / "new" / "cache" / NAME
        assert path.read_bytes() == CONTENT
    assert files(tmp_path / "new" / "cache") == [NAME]
    assert web.asked == [f"/{NAME}"]


def test_download_with_a_wrong_hash_is_not_kept(web: Web, tmp_path: Path) -> None:
    web.answers[f"/{NAME}"] = web.text(CONTENT + b"x")
    with pytest.raises(InvalidModel) as refused:
        download(f"{web.url}/{NAME}", tmp_path)
    assert str(refused.value) == (
        f"{web.url}/{NAME} is damaged: its sha256 does not begin {DIGEST[:8]}"
    )
    assert files(tmp_path) == []


def test_download_that_is_refused(web: Web, closed_port: int, tmp_path: Path) -> None:
    for url in (f"{web.url}/{NAME}", f"http://127.0.0.1:{closed_port}/{NAME}"):
        with pytest.raises(DownloadFailed, match=f"{url} cannot be downloaded: "):
            download(url, tmp_path)
    assert files(tmp_path) == []


def test_download_from_a_silent_server(
    silent_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(DownloadFailed, match="timed out"):
        download(f"http://127.0.0.1:{silent_port}/{NAME}", tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "answer",
    [
        broken_off(reset=True),
        broken_off(reset=False),
        Web.raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        Web.raw(b""),
        Web.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n" + CONTENT[:500]),
    ],
    ids=["reset", "ended", "no HTTP", "nothing", "chunk cut"],
)
def test_download_that_breaks_off(
    web: Web, tmp_path: Path, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    web.answers[f"/{NAME}"] = answer
    with pytest.raises(InvalidModel, match=r"cannot be downloaded: |is damaged"):
        download(f"{web.url}/{NAME}", tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x"])
def test_damaged_cache_is_refused_with_advice(web: Web, tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(InvalidModel) as refused:
        download(f"{web.url}/{NAME}", tmp_path)
    assert str(tmp_path / NAME) in str(refused.value)
    assert "delete it to fetch it again" in str(refused.value)
    assert web.asked == []


def test_other_connections_keep_their_timeout(web: Web, tmp_path: Path) -> None:
    before = socket.getdefaulttimeout()
    web.answers[f"/{NAME}"] = web.text(CONTENT)
    download(f"{web.url}/{NAME}", tmp_path / "good")
    with pytest.raises(DownloadFailed):
        download(f"{web.url}/missing-{DIGEST[:8]}.pth", tmp_path / "bad")
    assert socket.getdefaulttimeout() == before


def test_pretrained_weights_lie_in_the_ordinary_torch_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / RECIPE.url.rsplit("/", 1)[-1]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"damaged")
    with pytest.raises(InvalidModel, match=re.escape(f"{cached} is damaged")):
        find_weights("pretrained", RECIPE, ARCHITECTURE)


def test_every_pretrained_file_has_its_hash_in_its_name() -> None:
    """If it had none, nothing would be checked."""
    for architecture in architectures():
        for recipe in torchvision.models.get_model_weights(architecture):
            assert re.search(r"-[0-9a-f]{8,}\.pth$", recipe.url)


# --- transform_input of googlenet and inception_v3


def source_of(source: str, sha256: str = "0" * 64) -> Source:
    facts = WeightsFacts(name="x.pth", trained=True, source=source, sha256=sha256)
    return Source(facts, Path("x.pth"))


def digest_of(architecture: str) -> str:
    """That of torchvision's own file, as far as its name has it."""
    return get_recipe(architecture).url.rpartition("-")[2].partition(".")[0] + "0" * 56


@pytest.mark.parametrize(
    ("architecture", "source", "asked", "expected"),
    [
        ("googlenet", source_of("torchvision"), None, True),
        ("googlenet", source_of("seed 0"), None, True),
        ("googlenet", source_of("file", digest_of("googlenet")), None, True),
        ("inception_v3", source_of("file", digest_of("inception_v3")), None, True),
        ("googlenet", source_of("file"), "on", True),
        ("googlenet", source_of("file"), "off", False),
        ("resnet18", source_of("file"), None, False),
        ("resnet18", source_of("torchvision"), None, False),
    ],
)
def test_whether_the_input_is_scaled_again(
    architecture: str, source: Source, asked: str | None, expected: bool
) -> None:
    recipe = get_recipe(architecture)
    for auxiliary in (True, False):
        assert scales_input_again(source, recipe, architecture, asked, auxiliary) is expected


@pytest.mark.parametrize(
    ("architecture", "auxiliary", "found"),
    [
        ("googlenet", True, "by default only without pretrained weights)"),
        ("googlenet", False, "by default only with pretrained weights)"),
        ("inception_v3", True, "off if it built it without"),
    ],
)
def test_what_no_file_tells_is_asked_for(architecture: str, auxiliary: bool, found: str) -> None:
    source = source_of("file", digest_of("resnet18"))
    with pytest.raises(InvalidModel) as refusal:
        scales_input_again(source, get_recipe(architecture), architecture, None, auxiliary)
    assert "say --transform-input on if" in str(refusal.value)
    assert str(refusal.value).endswith(found)

"""Weights and labels from wherever they come: downloads, files, seeds, and everything else."""

import hashlib
import json
import os
import pickle
import random
import re
import socket
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from handler.errors import InvalidModel
from handler.model_card import WeightsFacts
from handler.networks import architectures
from scripts import weights
from scripts.archives import file_sha256
from scripts.weights import (
    DownloadFailed,
    Source,
    check_labels,
    download,
    find_weights,
    read_labels,
    read_state_dict,
)
from tests.unit.conftest import Web
from tests.unit.tiny import ARCHITECTURE, RECIPE

STATE = {"features.0.weight": torch.arange(6.0).view(2, 3), "features.0.bias": torch.ones(2)}


def saved(content: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file)
    return file.getvalue()


def as_file(path: Path, content: bytes | None = None) -> Source:
    if content is not None:
        path.write_bytes(content)
    return find_weights(str(path), RECIPE, ARCHITECTURE)


def read(path: Path, content: bytes | None = None) -> dict[str, Tensor]:
    return read_state_dict(as_file(path, content), RECIPE, ARCHITECTURE)


def refusal(path: Path, content: bytes | None = None) -> str:
    with pytest.raises(InvalidModel) as refused:
        read(path, content)
    assert str(path) in str(refused.value)
    return str(refused.value)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- State dicts


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ""])
def test_torch_file(tmp_path: Path, suffix: str) -> None:
    assert same(read(tmp_path / f"birds{suffix}", saved(STATE)), STATE)


def test_torch_file_of_the_old_format(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "birds.pth", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / "birds.pth"), STATE)


def test_safetensors_file(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "birds.safetensors")
    given = read(tmp_path / "birds.safetensors")
    assert same(dict(sorted(given.items())), dict(sorted(STATE.items())))


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    network = nn.Linear(2, 3)
    assert same(read(tmp_path / "x.pth", saved(network.state_dict())), dict(network.state_dict()))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_what_training_scripts_put_around_it(tmp_path: Path, wrapper: str) -> None:
    checkpoint = {"epoch": 3, wrapper: STATE, "optimizer": {"lr": 0.1}, "best": [1, 2.0, "x"]}
    assert same(read(tmp_path / "x.pth", saved(checkpoint)), STATE)


def test_wrappers_in_wrappers(tmp_path: Path) -> None:
    assert same(read(tmp_path / "x.pth", saved({"state_dict": {"model": STATE}})), STATE)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [torch.ones(3)],
        {},
        {"epoch": 3},
        {"weight": torch.ones(3), "epoch": 3},
        {"state_dict": {}},
        {"state_dict": {"weight": [1.0]}},
        {0: torch.ones(3)},
        "text",
        None,
    ],
    ids=range(10),
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    message = refusal(tmp_path / "x.pth", saved(content))
    assert "is not a state dict; save it with torch.save(model.state_dict(), PATH)" in message


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("place", ["beside", "alone", "pickle", "old format"])
def test_nothing_but_tensors_is_unpickled(tmp_path: Path, place: str) -> None:
    trap, file = Trap(tmp_path / "trapped"), tmp_path / "birds.pth"
    if place == "pickle":
        file.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        content = trap if place == "alone" else STATE | {"trap": trap}
        torch.save(content, file, _use_new_zipfile_serialization=place != "old format")
    message = refusal(file)
    assert not trap.folder.exists()
    if place != "pickle":
        assert "holds Python objects besides tensors, which are never unpickled" in message
        torch.load(file, weights_only=False)
        assert trap.folder.exists()  # so the trap was a real one


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "x.pth", saved(nn.Linear(2, 3)))
    assert "holds Python objects besides tensors" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        b"<!DOCTYPE html><html></html>",
        b"PK\x03\x04" + b"x" * 100,
        b"\x80\x02",
        bytes(1000),
    ],
)
def test_garbage_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    refusal(tmp_path / f"x{suffix}", content)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("kind", ["cut", "flipped", "random", "random pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused_or_read(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        whole = saved(STATE)
    else:
        save_file(STATE, path)
        whole = path.read_bytes()
    for seed in range(60):
        rng = random.Random(seed)
        data = bytearray(whole)
        if kind == "cut":
            data = data[: rng.randrange(len(data) - 8)]
        elif kind == "flipped":
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            start = b"\x80\x02" if kind == "random pickle" else b""
            data = bytearray(start + rng.randbytes(rng.randint(1, 300)))
        path.write_bytes(data)
        try:
            state = read(path)
        except InvalidModel:
            continue
        assert kind == "flipped", f"seed {seed} was read"
        assert all(isinstance(tensor, Tensor) for tensor in state.values())


@pytest.mark.parametrize("name", ["missing.pth", "Pretrained", ""])
def test_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    choice = str(tmp_path / name) if name else ""
    with pytest.raises(InvalidModel) as refused:
        find_weights(choice, RECIPE, ARCHITECTURE)
    assert f"--weights {choice}: there is no such file" in str(refused.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="there is no such file"):
        find_weights(str(tmp_path), RECIPE, ARCHITECTURE)


def test_source_of_a_file(tmp_path: Path) -> None:
    content = saved(STATE)
    source = as_file(tmp_path / "birds.pth", content)
    facts = WeightsFacts(
        name="birds.pth",
        trained=True,
        source="file",
        sha256=hashlib.sha256(content).hexdigest(),
    )
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
    first = read_state_dict(source, RECIPE, ARCHITECTURE)
    assert same(first, read_state_dict(source, RECIPE, ARCHITECTURE))
    assert first["classifier.1.weight"].shape[0] == 1000
    assert first["classifier.1.weight"].std() > 0


# --- Downloads

CONTENT = saved(STATE)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"birds-{DIGEST[:8]}.pth"


def declares(length: int, sent: bytes, reset: bool = False) -> Callable[..., None]:
    """An answer that promises more than it sends."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        request.wfile.write(sent)
        request.wfile.flush()
        if reset:  # RST in place of FIN
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()

    return answer


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_download(web: Web, tmp_path: Path) -> None:
    web.answers[f"/{NAME}"] = web.text(CONTENT)
    path = download(f"{web.url}/{NAME}", tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert files(tmp_path / "new" / "cache") == [NAME]


def test_what_is_in_the_cache_is_not_fetched_again(web: Web, tmp_path: Path) -> None:
    web.answers[f"/{NAME}"] = web.text(CONTENT)
    for _ in range(2):
        download(f"{web.url}/{NAME}", tmp_path)
    assert web.asked == [f"/{NAME}"]


def test_download_with_a_wrong_hash_is_not_kept(web: Web, tmp_path: Path) -> None:
    web.answers[f"/{NAME}"] = web.text(CONTENT + b"x")
    with pytest.raises(InvalidModel) as refused:
        download(f"{web.url}/{NAME}", tmp_path)
    assert str(refused.value) == (
        f"{web.url}/{NAME} is damaged: its sha256 does not begin {DIGEST[:8]}"
    )
    assert files(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_download_that_is_refused(web: Web, tmp_path: Path, status: int) -> None:
    web.answers[f"/{NAME}"] = web.text("no", status)
    with pytest.raises(DownloadFailed) as failed:
        download(f"{web.url}/{NAME}", tmp_path)
    assert f"{web.url}/{NAME} cannot be downloaded: " in str(failed.value)
    assert files(tmp_path) == []


def test_download_from_nobody(closed_port: int, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="refused"):
        download(f"http://127.0.0.1:{closed_port}/{NAME}", tmp_path)
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
        declares(len(CONTENT), CONTENT[:500], reset=True),
        Web.raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        Web.raw(b""),
        Web.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n" + CONTENT[:500]),
    ],
    ids=["reset", "no HTTP", "nothing", "chunk cut"],
)
def test_download_that_breaks_off(
    web: Web, tmp_path: Path, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    web.answers[f"/{NAME}"] = answer
    with pytest.raises(DownloadFailed, match="cannot be downloaded: "):
        download(f"{web.url}/{NAME}", tmp_path)
    assert files(tmp_path) == []


def test_download_that_ends_early(web: Web, tmp_path: Path) -> None:
    web.answers[f"/{NAME}"] = declares(len(CONTENT), CONTENT[:500])
    with pytest.raises(InvalidModel):
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


@pytest.mark.parametrize("architecture", architectures())
def test_every_pretrained_file_has_its_hash_in_its_name(architecture: str) -> None:
    """Where it had none, nothing would be checked."""
    for recipe in torchvision.models.get_model_weights(architecture):
        assert re.search(r"-[0-9a-f]{8,}\.pth$", recipe.url)


def test_sha256_of_a_file_larger_than_a_read(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * 2**20 + 1)
    (tmp_path / "x").write_bytes(data)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


# --- Labels


def labels(path: Path, content: str | bytes | list[Any] | dict[str, Any]) -> list[str]:
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labels(path)


@pytest.mark.parametrize(
    "text",
    [
        "heron\ncrane\nowl",
        "heron\ncrane\nowl\n",
        "heron\r\ncrane\r\nowl\r\n",
        "  heron \n\tcrane\nowl\n\n\n  \n",
        "\ufeffheron\ncrane\nowl\n",
    ],
    ids=["plain", "last line end", "Windows", "blanks", "BOM"],
)
def test_labels_from_text(tmp_path: Path, text: str) -> None:
    assert labels(tmp_path / "labels.txt", text) == ["heron", "crane", "owl"]


@pytest.mark.parametrize("name", ["labels", "labels.csv", "LABELS.names"])
def test_any_other_name_is_text(tmp_path: Path, name: str) -> None:
    assert labels(tmp_path / name, '["heron"]') == ['["heron"]']


@pytest.mark.parametrize(
    "content",
    [
        ["heron", "crane", "owl"],
        {"0": "heron", "1": "crane", "2": "owl"},
        {"2": "owl", "0": "heron", "1": "crane"},
        {"0": ["n02009912", "heron"], "1": ["n02012849", "crane"], "2": ["n01622779", "owl"]},
        [["n02009912", "heron"], ["n02012849", "crane"], "owl"],
    ],
)
def test_labels_from_json(tmp_path: Path, content: list[Any] | dict[str, Any]) -> None:
    assert labels(tmp_path / "index_to_name.json", content) == ["heron", "crane", "owl"]


def test_labels_from_json_with_a_bom(tmp_path: Path) -> None:
    assert labels(tmp_path / "x.json", '\ufeff["heron"]') == ["heron"]


def test_more_than_ten_classes_keep_their_order(tmp_path: Path) -> None:
    content = {str(index): f"class {index}" for index in sorted(range(120), key=str)}
    assert labels(tmp_path / "x.json", content) == [f"class {index}" for index in range(120)]


def test_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    assert labels(tmp_path / "x.txt", "crane\ncrane\n") == ["crane", "crane"]


def labels_refusal(path: Path, content: str | bytes | list[Any] | dict[str, Any]) -> str:
    with pytest.raises(InvalidModel) as refused:
        labels(path, content)
    assert f"--labels {path}" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("text", ["heron\n\nowl\n", "heron\n  \nowl\n"])
def test_blank_line_in_between_is_refused(tmp_path: Path, text: str) -> None:
    assert "class 1 has no name" in labels_refusal(tmp_path / "x.txt", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("[", "is not valid JSON"),
        ("[]", "is empty"),
        ("{}", "is empty"),
        ('"heron"', "must hold a list, or an object of index to name"),
        ("3", "must hold a list"),
        ("null", "must hold a list"),
        ('["heron", ""]', "class 1 has no name"),
        ('["heron", 3]', "class 1 has no name"),
        ('["heron", null]', "class 1 has no name"),
        ('["heron", ["a", "b", "c"]]', "class 1 has no name"),
        ('["heron", ["a", " "]]', "class 1 has no name"),
        ('{"1": "heron", "2": "owl"}', "class indices 0 to 1"),
        ('{"heron": 0, "owl": 1}', "class indices 0 to 1"),
        ('{"0": "heron", "01": "owl"}', "class indices 0 to 1"),
    ],
)
def test_bad_labels_in_json(tmp_path: Path, content: str, message: str) -> None:
    assert message in labels_refusal(tmp_path / "x.json", content)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_labels_are_refused(tmp_path: Path, text: str) -> None:
    assert "is empty" in labels_refusal(tmp_path / "x.txt", text)


@pytest.mark.parametrize("data", [b"\xff\xfeh\0e\0", b"caf\xe9\n"])
def test_labels_that_are_no_utf8_are_refused(tmp_path: Path, data: bytes) -> None:
    assert "cannot be read as text" in labels_refusal(tmp_path / "x.txt", data)


def test_missing_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="cannot be read as text"):
        read_labels(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("names", "classes", "own", "message"),
    [
        (3, 5, True, "--labels has 3 names, the weights have 5 classes"),
        (1000, 5, False, "no --labels given, and the recipe has 1000 names, the weights have 5"),
    ],
)
def test_numbers_of_labels_and_classes_must_agree(
    names: int, classes: int, own: bool, message: str
) -> None:
    with pytest.raises(InvalidModel) as refused:
        check_labels(["x"] * names, classes, own)
    assert message in str(refused.value)


def test_numbers_that_agree_pass() -> None:
    check_labels(["a", "b"], 2, own=True)

"""Files of weights: told apart by their bytes, and opened without running any code."""

import os
import pickle
import random
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from handler.errors import InvalidModel
from service.archive.checkpoints import Checkpoint, find_tables, read_checkpoint
from tests.unit.tiny import tiny_network

STATE = {"features.0.weight": torch.arange(6.0).view(2, 3), "features.0.bias": torch.ones(2)}


def saved(content: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file)
    return file.getvalue()


def read(path: Path, content: bytes | None = None) -> Checkpoint:
    if content is not None:
        path.write_bytes(content)
    return find_tables(read_checkpoint(path), path)


def tables(path: Path, content: bytes | None = None) -> Any:
    return read(path, content).tables


def refusal(path: Path, content: bytes | None = None) -> str:
    with pytest.raises(InvalidModel) as refused:
        read(path, content)
    assert str(path) in str(refused.value)
    return str(refused.value)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_the_bytes_count_and_not_the_name(tmp_path: Path, name: str) -> None:
    assert same(tables(tmp_path / name, saved(STATE))[""], STATE)
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    assert same(tables(tmp_path / name)[""], STATE)
    save_file(STATE, tmp_path / name)
    given = tables(tmp_path / name)[""]
    assert same(dict(sorted(given.items())), dict(sorted(STATE.items())))


@pytest.mark.parametrize("wrapper", ["state_dict", "anything"])
def test_what_training_scripts_put_around_it(tmp_path: Path, wrapper: str) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    checkpoint = {"epoch": 3, wrapper: STATE, "optimizer": optimizer.state_dict(), "best": [1, "x"]}
    given = read(tmp_path / "x.pth", saved(checkpoint))
    assert list(given.tables) == [wrapper]
    assert same(given.tables[wrapper], STATE)
    assert given.entries == (wrapper, "optimizer", "best")


def test_dicts_in_dicts_are_found_by_their_keys(tmp_path: Path) -> None:
    content = {"state_dict": {"model": STATE, "extra": {"weight": torch.ones(1)}}, "loops": {}}
    given = tables(tmp_path / "x.pth", saved(content))
    assert list(given) == ["state_dict.model", "state_dict.extra"]
    assert same(given["state_dict.model"], STATE)


def test_a_dict_in_itself_is_read_once_and_dicts_without_end_are_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": STATE}
    content["self"] = content
    assert list(tables(tmp_path / "x.pth", saved(content))) == ["model"]
    for _ in range(5000):
        content = {"a": content}
    with pytest.raises(InvalidModel, match="nested too deep"):
        find_tables(content, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.ones(3), ""),
        ([torch.ones(3)], ""),
        ({}, ""),
        ({"epoch": 3, "lr": 0.1}, ": it holds epoch, lr"),
        ({"state_dict": {}}, ": it holds state_dict"),
        ({"state_dict": {"weight": [1.0]}}, ": it holds state_dict"),
        ({0: torch.ones(3)}, ": it holds 0"),
    ],
    ids=range(7),
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, found: str) -> None:
    message = refusal(tmp_path / "x.pth", saved(content))
    saved_as = "save it with torch.save(model.state_dict(), PATH)"
    assert message == f"{tmp_path / 'x.pth'} is not a state dict{found}; {saved_as}"


# --- Nothing but tensors


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


class Announcement:
    """Unpickling this prints, by a function that is in no list of forbidden ones."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize("key", ["args", "state_dict"])
def test_what_stands_beside_the_tensors_is_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    content = {"model": STATE, key: {"x": Announcement()}}
    given = read(tmp_path / "x.pth", saved(content))
    assert capfd.readouterr().out == ""
    assert same(given.tables["model"], STATE)
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert capfd.readouterr().out == "unpickled\n"


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read(tmp_path / "x.pth", saved({"model": STATE, "args": Namespace(lr=0.1)}))
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)


def test_what_trainers_keep_beside_the_tensors(tmp_path: Path) -> None:
    """As torchvision's references, timm, and everybody's best accuracy have it."""
    content = {
        "model": STATE,
        "args": Namespace(lr=0.1, output_dir=Path("runs")),
        "best_acc1": np.float64(0.9),
        "history": np.ones(3),
        "meters": defaultdict(list, {"loss": [0.5]}),
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"dirpath": Path("a/b")}},
    }
    given = read(tmp_path / "x.pth", saved(content))
    assert list(given.tables) == ["model"]
    assert same(given.tables["model"], STATE)
    assert given.entries == ("model", "args", "best_acc1", "history", "meters", "callbacks")


@pytest.mark.parametrize("key", [None, "model"])
def test_a_whole_model_is_refused_by_its_class(tmp_path: Path, key: str | None) -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3)
    message = refusal(tmp_path / "x.pth", saved({key: network} if key else network))
    assert (
        f"is not a state dict: {key or 'it'} is a whole object of the class "
        "torchvision.models.squeezenet.SqueezeNet, which is never unpickled" in message
    )
    assert "torch.save(model.state_dict(), PATH)" in message


# --- Files of other kinds


def test_a_program_is_called_that_and_the_advice_works(tmp_path: Path) -> None:
    network, old, new = tiny_network(), tmp_path / "old.pt2", tmp_path / "new.pth"
    torch.jit.script(network).save(old)
    message = refusal(old)
    assert "is a TorchScript program, not a state dict" in message
    assert "torch.save(dict(torch.jit.load(PATH).state_dict()), NEW)" in message
    torch.save(dict(torch.jit.load(old).state_dict()), new)
    assert same(tables(new)[""], dict(network.state_dict()))
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 64, 64),)), old)
    message = refusal(old)
    assert "is a program of torch.export, not a state dict" in message
    assert "torch.save(dict(torch.export.load(PATH).state_dict), NEW)" in message
    torch.save(dict(torch.export.load(old).state_dict), new)
    assert same(tables(new)[""], dict(network.state_dict()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refusal(tmp_path / "x.pth", content)


@pytest.mark.parametrize(
    ("inside", "message"),
    [("MAR-INF/MANIFEST.json", "--archive"), ("model.weights.h5", "Keras")],
)
def test_other_kinds_of_zips_are_named(tmp_path: Path, inside: str, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr(inside, "{}")
    assert message in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"PK\x03\x04" + b"x" * 100, b"\x80\x02", bytes(1000)],
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
        assert all(isinstance(name, str) for table in state.tables.values() for name in table)

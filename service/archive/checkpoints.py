"""Weights files: recognised by their bytes, opened without running code, split into tables."""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from handler.errors import InvalidModel

Tables = dict[str, dict[str, Tensor]]  # tensors by name, by the keys that lead to them


@dataclass(frozen=True)
class Checkpoint:
    """The part of a weights file that matters here."""

    tables: Tables
    entries: tuple[str, ...] = ()  # outermost keys, except those of numbers, text and tensors


SAVE = "save it with torch.save(model.state_dict(), PATH)"
# Other kinds of files, by a name in the zip or by the first bytes, and what to do with each.
IN_ZIPS = {
    r"[^/]+/constants\.pkl": (
        "is a TorchScript program, not a state dict; make one with "
        "torch.save(dict(torch.jit.load(PATH).state_dict()), NEW)"
    ),
    r"([^/]+/)?models/[^/]+\.json|serialized_exported_program\.json": (
        "is a program of torch.export, not a state dict; make one with "
        "torch.save(dict(torch.export.load(PATH).state_dict), NEW)"
    ),
    r"MAR-INF/MANIFEST\.json": "is a model archive; serve it with --archive",
    r"model\.weights\.h5": "is a Keras model, not weights of torchvision's",
}
FIRST_BYTES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it: git lfs pull",
    b"\x89HDF": "is an HDF5 file (Keras?), not weights of torchvision's",
    b"<": "is a web page or XML, not a weights file; download it again",
}


class Placeholder:
    """A stand-in for every object of a file that is not a tensor: takes any state and drops it.

    No class or function that a file names is looked up, let alone called.
    """

    name = ""  # of what it stands for

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take what the original would."""

    def __new__(cls, *_args: object, **_kwargs: object) -> "Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Drop it."""


class DictPlaceholder:
    """The same for subclasses of dict, which are filled key by key: an ordinary dict."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Any:
        return OrderedDict()  # the only type that torch allows a pickle to fill


def read_checkpoint(path: Path) -> Any:
    """The content of a weights file, with placeholders for all but plain data and tensors.

    Raises InvalidModel, which says what the file is if that can be seen.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if _is_safetensors(path, start):
            return load_file(path)
        if known := _recognise(path, start):
            raise InvalidModel(f"{path} {known}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(_placeholders(path)):
            warnings.simplefilter("ignore")  # about pickle protocols; the error says enough
            with path.open("rb") as file:  # given a path, torch would look at the name as well
                return torch.load(file, map_location="cpu", weights_only=True)
    except InvalidModel:
        raise
    except pickle.UnpicklingError as exc:
        if not start.startswith((b"PK", b"\x80")):  # torch.save's two forms
            raise InvalidModel(f"{path} is not a weights file") from exc
        raise InvalidModel(
            f"{path} holds Python objects besides tensors, which are never unpickled; {SAVE}"
        ) from exc
    except Exception as exc:  # torch raises many types for a file that is not its own
        raise InvalidModel(f"{path} is not a readable weights file") from exc


def find_tables(content: Any, path: Path) -> Checkpoint:
    """Every dict of a file's content that holds tensors, by the keys that lead to it.

    `{"epoch": 3, "model": {"fc.weight": …}}` gives `{"model": {"fc.weight": …}}`. Raises
    InvalidModel, with what was found, if no tensor has a name.
    """
    tables: Tables = {}
    seen = set()

    def walk(node: Any, keys: str) -> None:
        if not isinstance(node, dict) or id(node) in seen:
            return
        seen.add(id(node))
        names = [name for name in node if isinstance(name, str)]
        if table := {name: node[name] for name in names if isinstance(node[name], Tensor)}:
            tables[keys] = table
        for name in names:
            walk(node[name], f"{keys}.{name}" if keys else name)

    try:
        walk(content, "")
    except RecursionError as exc:
        raise InvalidModel(f"{path} is nested too deep for a weights file; {SAVE}") from exc
    if not tables:
        raise InvalidModel(f"{path} is not a state dict{_describe(content)}; {SAVE}")
    entries = content.items() if isinstance(content, dict) else ()
    plain = (str, bytes, int, float, Tensor, type(None))
    return Checkpoint(
        tables, tuple(str(key) for key, value in entries if not isinstance(value, plain))
    )


def _describe(content: Any) -> str:
    """What a file without a state dict holds, for a message."""
    objects = {"it": content}
    if isinstance(content, dict):
        objects = {str(key): value for key, value in content.items()}
    for key, value in objects.items():
        if isinstance(value, Placeholder):
            return f": {key} is a whole object of the class {value.name}, which is never unpickled"
    if isinstance(content, dict) and content:
        return f": it holds {', '.join([*objects][:5])}"
    return ""


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, then the header."""
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and length <= path.stat().st_size - 8


def _recognise(path: Path, start: bytes) -> str | None:
    """What a file is, if it is one of the kinds that hold no state dict."""
    for known, words in FIRST_BYTES.items():
        if start.lstrip().startswith(known):
            return words
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as content:
        names = content.namelist()
    for pattern, words in IN_ZIPS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return words
    return None


def _placeholders(path: Path) -> list[Any]:
    """A placeholder for each class and function that a file names, in the form that torch takes.

    Training scripts keep their arguments, paths and numpy's numbers beside the tensors. torch
    itself still refuses names from os and sys.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load says what is wrong with the file
        return []
    return [
        (DictPlaceholder, name)
        if name.lower().endswith("dict")  # defaultdict, Lightning's AttributeDict
        else (type("Placeholder", (Placeholder,), {"name": name}), name)
        for name in names
    ]

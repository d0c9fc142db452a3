"""Where weights and labels come from: a download, a file, or a seed."""

import json
import pickle
import re
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from handler.errors import InvalidModel
from handler.model_card import WeightsFacts
from handler.networks import build_network
from scripts.archives import SEED, file_facts, file_sha256, untrained_facts

DOWNLOAD_TIMEOUT_SECONDS = 20  # without a byte
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts put around it


class DownloadFailed(InvalidModel):
    """The weights could not be fetched; nothing is wrong with them."""


@dataclass(frozen=True)
class Source:
    """Weights that are at hand."""

    facts: WeightsFacts
    path: Path | None  # None: drawn from the seed


def find_weights(choice: str, recipe: WeightsEnum, architecture: str) -> Source:
    """`pretrained`, `untrained` or a file's path to a Source; downloads what is not in the cache.

    Raises InvalidModel; DownloadFailed where the network is at fault.
    """
    if choice == "untrained":
        return Source(untrained_facts(architecture), None)
    if choice == "pretrained":
        path = download(recipe.url, Path(torch.hub.get_dir()) / "checkpoints")
        facts = WeightsFacts(
            name=str(recipe), trained=True, source="torchvision", sha256=file_sha256(path)
        )
        return Source(facts, path)
    path = Path(choice)
    if not path.is_file():
        raise InvalidModel(
            f"--weights {choice}: there is no such file (nor is it 'pretrained' or 'untrained')"
        )
    return Source(file_facts(path), path)


def download(url: str, cache: Path) -> Path:
    """The file behind a torchvision weights URL, from torch's own cache or the network.

    Its name ends in the first digits of its sha256, which are checked in both cases.
    Raises DownloadFailed, or InvalidModel where the bytes are not what the name promises.
    """
    name = url.rsplit("/", 1)[-1]
    path = cache / name
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    prefix = match.group(1) if match else ""
    if not path.exists():
        print(f"Downloading {url}", file=sys.stderr, flush=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torch.hub sets none
        try:
            cache.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=True)
        except RuntimeError as exc:  # "invalid hash value"
            raise InvalidModel(f"{url} is damaged: its sha256 does not begin {prefix}") from exc
        except (OSError, HTTPException) as exc:  # URLError is an OSError
            reason = getattr(exc, "reason", None) or exc
            raise DownloadFailed(f"{url} cannot be downloaded: {reason}") from exc
        finally:
            socket.setdefaulttimeout(timeout)
    if not file_sha256(path).startswith(prefix):
        raise InvalidModel(
            f"{path} is damaged: its sha256 does not begin {prefix}; delete it to fetch it again"
        )
    return path


def read_state_dict(source: Source, recipe: WeightsEnum, architecture: str) -> dict[str, Tensor]:
    """The tensors of a source by name. Nothing but tensors is ever unpickled.

    Raises InvalidModel where the file is no state dict.
    """
    if source.path is None:
        torch.manual_seed(SEED)
        network = build_network(recipe, architecture, len(recipe.meta["categories"]))
        return dict(network.state_dict())
    try:
        if source.path.suffix == ".safetensors":
            return load_file(source.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error says enough
            content = torch.load(source.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        if not source.path.read_bytes()[:2].startswith((b"PK", b"\x80")):  # torch.save's two forms
            raise InvalidModel(f"{source.path} is not a weights file") from exc
        raise InvalidModel(
            f"{source.path} holds Python objects besides tensors, which are never unpickled; "
            "save it with torch.save(model.state_dict(), PATH)"
        ) from exc
    except Exception as exc:  # torch has many words for a file that is none of its own
        raise InvalidModel(f"{source.path} is not a readable weights file") from exc
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) for name in content)
        or not all(isinstance(tensor, Tensor) for tensor in content.values())
    ):
        raise InvalidModel(
            f"{source.path} is not a state dict; save it with torch.save(model.state_dict(), PATH)"
        )
    return content


def read_labels(path: Path) -> list[str]:
    """Class names in the order of their indices.

    From text, one a line; a JSON list; or a JSON object of index to name, or to [id, name] as
    TorchServe's index_to_name.json has it. Raises InvalidModel.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidModel(f"--labels {path} cannot be read as text") from exc
    if path.suffix == ".json":
        labels = _json_labels(text, path)
    else:
        labels = [line.strip() for line in text.rstrip().splitlines()]
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InvalidModel(f"--labels {path}: class {index} has no name")
    if not labels:
        raise InvalidModel(f"--labels {path} is empty")
    return labels


def _json_labels(text: str, path: Path) -> list[Any]:
    try:
        content = json.loads(text)
    except ValueError as exc:
        raise InvalidModel(f"--labels {path} is not valid JSON") from exc
    if isinstance(content, dict):
        indices = [str(index) for index in range(len(content))]
        if set(content) != set(indices):
            raise InvalidModel(
                f"--labels {path}: the keys must be the class indices 0 to {len(content) - 1}"
            )
        content = [content[index] for index in indices]
    if not isinstance(content, list):
        raise InvalidModel(f"--labels {path} must hold a list, or an object of index to name")
    return [_name(entry) for entry in content]


def _name(entry: Any) -> Any:
    """`["n01440764", "tench"]` is "tench"."""
    return entry[-1] if isinstance(entry, list) and len(entry) == 2 else entry


def check_labels(labels: Sequence[str], classes: int, own: bool) -> None:
    """Raise InvalidModel, with both numbers, where labels and classes differ."""
    if len(labels) != classes:
        whose = "--labels has" if own else "no --labels given, and the recipe has"
        raise InvalidModel(f"{whose} {len(labels)} names, the weights have {classes} classes")

"""The sources of weights: a download, a file, or a seed."""

import re
import socket
import sys
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.models import WeightsEnum

from handler.errors import InvalidModel
from handler.model_card import WeightsFacts, file_sha256
from handler.networks import SCALE_INPUT_AGAIN, build_network
from service.archive.checkpoints import Checkpoint, find_tables, read_checkpoint
from service.archive.digest import SEED, file_facts, untrained_facts
from service.registry.fetching import Origin

DOWNLOAD_TIMEOUT_SECONDS = 20  # without a byte


class DownloadFailed(InvalidModel):
    """The weights could not be fetched; nothing is wrong with them."""


@dataclass(frozen=True)
class Source:
    """Weights that are on this machine."""

    facts: WeightsFacts
    path: Path | None  # None: drawn from the seed


def find_weights(
    choice: str, recipe: WeightsEnum, architecture: str, origin: Origin | None = None
) -> Source:
    """`pretrained`, `untrained` or a file's path to a Source; downloads what is not in the cache.

    `origin` of a file that was fetched. Raises InvalidModel; DownloadFailed if the network is at
    fault.
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
    return Source(file_facts(path, origin), path)


def download(url: str, cache: Path) -> Path:
    """The file behind a torchvision weights URL, from torch's own cache or the network.

    Its name ends in the first digits of its sha256, which are checked in both cases.
    Raises DownloadFailed, or InvalidModel if the bytes do not have the digest in the name.
    """
    name = url.rsplit("/", 1)[-1]
    path = cache / name
    prefix = _digest_in(name)
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


def _digest_in(url: str) -> str:
    """The first digits of a file's sha256, in which torchvision's file names end; "" without."""
    match = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
    return match.group(1) if match else ""


def read_weights(source: Source, recipe: WeightsEnum, architecture: str) -> Checkpoint:
    """The tensors of a source by name, grouped by the dict that holds them.

    Raises InvalidModel if there is no state dict.
    """
    if source.path is None:
        torch.manual_seed(SEED)
        network = build_network(recipe, architecture, len(recipe.meta["categories"]))
        return Checkpoint({"": dict(network.state_dict())})
    return find_tables(read_checkpoint(source.path), source.path)


def scales_input_again(
    source: Source, recipe: WeightsEnum, architecture: str, asked: str | None, has_auxiliary: bool
) -> bool:
    """Whether weights were trained with torchvision's `transform_input`.

    Raises InvalidModel if only the user knows: it is an argument of the builder, which leaves
    no trace in a state dict.
    """
    if architecture not in SCALE_INPUT_AGAIN:
        return False
    if asked:
        return asked == "on"
    known = source.facts.source in ("torchvision", f"seed {SEED}")
    if known or source.facts.sha256.startswith(_digest_in(recipe.url)):
        return True  # torchvision's own, or random
    found = ""
    if architecture == "googlenet":  # inception_v3 has them by default either way
        found = (
            " (the file has auxiliary heads, which torchvision builds by default only without "
            "pretrained weights)"
            if has_auxiliary
            else " (the file has no auxiliary heads, which torchvision leaves out by default only "
            "with pretrained weights)"
        )
    raise InvalidModel(
        f"whether this {architecture} was trained with transform_input decides its answers, and no "
        "weights file tells; say --transform-input on if torchvision built it with pretrained "
        f"weights, off if it built it without{found}"
    )

"""Where files from other machines are kept: by their digest, beside what torch downloads."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from handler.errors import InvalidModel, SetupError
from handler.model_card import file_sha256
from service.temporary import TemporaryFolder

MAX_BYTES = 8 * 2**30  # of a weights file; torchvision's largest has 2.6 GB


def cache_folder() -> Path:
    """That of torch.hub, which TORCH_HOME and XDG_CACHE_HOME move; torch itself is not imported."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME") or caches / "torch") / "hub" / "checkpoints"


def kept(name: str, sha256: str | None, where: str, fetch: Callable[[Path], None]) -> Path:
    """The file of this name and digest, which `fetch` writes if it is not in the cache.

    Without a digest it is always fetched. `where` is what it is called in messages. A download that
    fails leaves nothing behind; one whose process is killed leaves a folder that the next removes.
    Raises InvalidModel if the file has another digest, SetupError if it cannot be kept.
    """
    folder = cache_folder()
    if sha256 and _has(folder / sha256 / name, sha256):
        return folder / sha256 / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFolder(".downloading-", folder) as temporary:
            fetched = temporary / name
            fetch(fetched)
            actual = file_sha256(fetched)
            if sha256 not in (None, actual):
                raise InvalidModel(
                    f"{where} is damaged or another file: its sha256 is {actual}, expected {sha256}"
                )
            path = folder / actual / name
            path.parent.mkdir(exist_ok=True)
            fetched.replace(path)
            return path
    except OSError as exc:
        raise SetupError(f"{where} cannot be kept in {folder}: {exc}") from exc


def _has(path: Path, sha256: str) -> bool:
    """Whether a file is in the cache; a damaged one is removed."""
    try:
        if file_sha256(path) == sha256:
            return True
        shutil.rmtree(path.parent)
    except OSError:
        pass
    return False

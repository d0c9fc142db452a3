"""Weights behind https://, s3:// and gs://, through fsspec."""

import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from handler.errors import InvalidModel, SetupError
from service.registry.cache import MAX_BYTES, kept
from service.registry.references import Url, one_line

PIECE_BYTES = 8 * 2**20
SILENT_SECONDS = 20  # without a byte
TOTAL_SECONDS = 3600


def download(url: Url, sha256: str) -> Path:
    """The file of this digest, from the cache or the network.

    Raises SetupError if it cannot be fetched, InvalidModel if it is another file.
    """
    return kept(url.name, sha256, url.shown, lambda path: _fetch(url, path))


def _fetch(url: Url, path: Path) -> None:
    try:
        import fsspec

        files = fsspec.filesystem(url.scheme, skip_instance_cache=True, **_options(url.scheme))
    except ImportError as exc:
        raise SetupError(
            f"{url.scheme}:// needs the packages of requirements-registry.txt: {one_line(exc)}"
        ) from exc
    print(f"Downloading {url.shown}", file=sys.stderr, flush=True)
    try:
        block = 0 if url.scheme == "https" else PIECE_BYTES  # 0: one request, read piece by piece
        with (
            files.open(url.url, "rb", block_size=block, cache_type="none") as source,
            path.open("wb") as target,
            bar(getattr(source, "size", None)) as shown,
        ):
            copy(source.read, target.write, shown.update, url.shown)
    except SetupError:
        raise
    except Exception as exc:  # each of the three clients has types of its own
        raise SetupError(f"{url.shown} cannot be downloaded: {_reason(exc)}") from exc


def copy(
    read: Callable[[int], bytes],
    write: Callable[[bytes], Any],
    count: Callable[[int], Any],
    where: str,
) -> None:
    """Copy a file up to its end. Raises InvalidModel if it is too large, SetupError if too slow."""
    end, size = time.monotonic() + TOTAL_SECONDS, 0
    while piece := read(PIECE_BYTES):
        size += len(piece)
        if size > MAX_BYTES:
            raise InvalidModel(f"{where} has more than {MAX_BYTES} bytes, the most for weights")
        if time.monotonic() > end:
            raise SetupError(f"{where} was not downloaded within {TOTAL_SECONDS} s")
        write(piece)
        count(len(piece))


def bar(size: int | None) -> Any:
    """A progress bar in bytes, as torch.hub has one; none if stderr is no terminal."""
    return tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, disable=None)


def _options(scheme: str) -> dict[str, Any]:
    """fsspec's for a file system: its timeouts, and proxies and ~/.netrc for https://."""
    if scheme == "s3":
        limits = {"connect_timeout": SILENT_SECONDS, "read_timeout": SILENT_SECONDS}
        return {"config_kwargs": limits | {"retries": {"max_attempts": 2}}}
    if scheme == "gs":
        return {"requests_timeout": SILENT_SECONDS}
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=TOTAL_SECONDS, connect=SILENT_SECONDS, sock_read=SILENT_SECONDS
    )
    # A context of our own, so that SSL_CERT_FILE counts as it is now.
    return {
        "client_kwargs": {"timeout": timeout, "trust_env": True},
        "ssl": ssl.create_default_context(),
    }


def _reason(exc: BaseException) -> str:
    if status := getattr(exc, "status", None):
        return f"HTTP status {status}"
    if isinstance(exc, FileNotFoundError):
        return _reason(exc.__cause__) if exc.__cause__ else "there is no such file"
    return one_line(exc)

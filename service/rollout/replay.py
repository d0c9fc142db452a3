"""Images that both versions are asked about, one after the other, before any client is involved."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from handler.errors import SetupError
from service.archive.progress import stage
from service.rollout.judgement import Counts, count_seconds
from service.torchserve.management import direct_session

MAX_IMAGES = 2000
TIMEOUT_SECONDS = 30
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and below, in order. Raises SetupError."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise SetupError(f"--images: there is no image in {folder}")
    if len(found) > MAX_IMAGES:
        raise SetupError(f"--images: {len(found)} images in {folder}, more than {MAX_IMAGES}")
    return found


def replay(images: Sequence[Path], url: str, old: str, new: str) -> tuple[Counts, Counts]:
    """Ask both versions about each image; what the old and the new one did.

    `url` is that of the model's predictions. An image that the old version refuses counts for
    nothing. Each version is asked once before, so that no first request counts.
    """
    seconds: dict[str, list[float]] = {old: [], new: []}
    asked = errors = disagreements = 0
    with direct_session() as session, stage("replay", len(images), "image") as done:
        for version in (old, new):
            ask(session, f"{url}/{version}", images[0].read_bytes())
        for number, image in enumerate(images):
            body = image.read_bytes()
            answers = {}
            for version in (old, new) if number % 2 else (new, old):
                since = time.perf_counter()
                answers[version] = ask(session, f"{url}/{version}", body)
                if answers[version] is not None:
                    seconds[version].append(time.perf_counter() - since)
            done()
            if answers[old] is None:
                continue
            asked += 1
            if answers[new] is None:
                errors += 1
            elif answers[new] != answers[old]:
                disagreements += 1
    return (
        Counts(requests=asked, seconds=count_seconds(seconds[old])),
        Counts(
            requests=asked,
            errors=errors,
            compared=asked - errors,
            disagreements=disagreements,
            seconds=count_seconds(seconds[new]),
        ),
    )


def ask(session: requests.Session, url: str, body: bytes) -> Any:
    """The best class of an image; None if there is no answer."""
    # Counted apart from clients, and not answered from the cache: the handler's header for probes.
    headers = {"Content-Type": "application/octet-stream", "X-Probe": "1"}
    try:
        answer = session.post(url, body, headers=headers, timeout=TIMEOUT_SECONDS)
        return answer.json()["predictions"][0]["class"] if answer.ok else None
    except (requests.RequestException, LookupError, TypeError, ValueError):
        return None

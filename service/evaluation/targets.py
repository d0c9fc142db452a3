"""What is evaluated: a running service, or an archive whose worker runs in this process."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from threading import Event
from typing import Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from handler.errors import SetupError
from service.bulk.pace import Pace
from service.bulk.run import Lost, classify
from service.bulk.sources import Image
from service.client import Client

Answer = dict[str, Any]
BEST = 5  # classes of an answer, for top-5


class Target(Protocol):
    """Something that classifies images."""

    name: str
    labels: tuple[str, ...]  # position = class index

    def answers(self, images: Iterable[Image]) -> Iterator[tuple[Image, Answer]]:
        """Each image with its answer or error, in any order. Raises SetupError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a target is asked."""

    options: Mapping[str, str]  # of each request, besides top_k
    key: str | None = None
    concurrency: int = 16
    patience: float = 300.0  # seconds of nothing but refusals until a service is lost


def predictions_url(url: str, model: str) -> str:
    """Where images are sent. Raises SetupError for a URL with a password, which would be shown."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SetupError("a URL must have no user and password in it; a key is in --key-file")
    return f"{url.rstrip('/')}/predictions/{model}" if parts.path in ("", "/") else url


class Service:
    """A running service, asked about as many images at once as it takes."""

    def __init__(self, url: str, asking: Asking) -> None:
        """Raises SetupError if it does not answer as this project's services do."""
        self.name = url
        self._asking = asking
        self.labels = self._read_labels()

    def _client(self, top_k: int) -> Client:
        asking = self._asking
        return Client(self.name, top_k, asking.key, asking.concurrency, asking.options)

    def _read_labels(self) -> tuple[str, ...]:
        """Nothing but a prediction of so many classes names them, on every port and route.

        How many there are is in what the service says about a top_k that is too high.
        """
        refusal = self._client(10**9 - 1).ask("labels", drawn_image()).answer
        words = str(refusal.get("message")).split()
        if refusal.get("type") != "InvalidTopK" or not words[-1].isdigit():
            raise SetupError(f"{self.name}: {refusal.get('type')}: {refusal.get('message')}")
        return labels_of(
            self.name, self._client(int(words[-1])).ask("labels", drawn_image()).answer
        )

    def answers(self, images: Iterable[Image]) -> Iterator[tuple[Image, Answer]]:
        client = self._client(min(BEST, len(self.labels)))
        pace = Pace(self._asking.concurrency, self._asking.patience)
        try:
            yield from classify(images, client.ask, pace, Event(), _notice)
        except Lost as exc:
            raise SetupError(f"{self.name}: {exc}") from exc


def _notice(text: str) -> None:
    """Above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def labels_of(name: str, answer: Answer) -> tuple[str, ...]:
    """The names of all classes, from an answer with all of them. Raises SetupError."""
    if answer["status"] != "success":
        raise SetupError(f"{name}: {answer.get('type')}: {answer.get('message')}")
    named = {one["class_id"]: one["class"] for one in answer["predictions"]}
    return tuple(named[index] for index in range(len(named)))


def drawn_image() -> bytes:
    """A small grey PNG."""
    from PIL import Image as Pillow

    file = BytesIO()
    Pillow.new("RGB", (8, 8), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()

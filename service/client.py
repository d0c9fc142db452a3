"""A client of the predictions port: asks about an image, and shows the answer in a terminal."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePath
from time import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from handler.errors import SetupError

TIMEOUT_SECONDS = 60
# Errors of urllib3, which requests has below its own: there was no connection.
UNCONNECTED = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError")


@dataclass(frozen=True)
class Reply:
    """What became of one request; `status` is that of HTTP, and 0 if no answer came."""

    answer: dict[str, Any]
    status: int = 0
    retry_after: float | None = None  # seconds
    reached: bool = True  # False: there was no connection, so the image cannot be the cause


class Client:
    """Asks one URL, from several threads if need be."""

    def __init__(
        self,
        url: str,
        top_k: int | None = None,
        key: str | None = None,
        connections: int = 1,
        options: Mapping[str, str] = {},
    ) -> None:
        """`key`: what the gateway knows the client by; `options`: of each request, by name."""
        self.url = url
        self._options = {**options} if top_k is None else {**options, "top_k": str(top_k)}
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))
        if "127.0.0.1" in url or "localhost" in url:
            self._session.trust_env = False  # no proxy of the environment
        if key is not None:
            self._session.headers["X-API-Key"] = key

    def ask(self, name: str, body: bytes) -> Reply:
        """The server's answer for one image; any other failure takes the form of its errors."""
        last = PurePath(name).name[-255:].encode(errors="replace").decode()  # it may be no text
        try:
            form = requests.Request(
                "POST",
                self.url,
                files={"file": ("image", body)},
                data={"filename": last} | self._options,
            ).prepare()
            # TorchServe would parse multipart/form-data in Java, which costs more.
            kind = form.headers["Content-Type"].replace("form-data", "mixed")
            response = self._session.post(
                self.url,
                data=form.body,
                headers={"Content-Type": kind},
                timeout=TIMEOUT_SECONDS,
                allow_redirects=False,  # the key is for this server alone
            )
        except requests.RequestException as exc:
            cause = getattr(exc.args[0] if exc.args else None, "reason", None)
            reached = type(cause).__name__ not in UNCONNECTED
            return Reply(error(0, type(exc).__name__, silence(self.url)), reached=reached)
        answer = read_answer(response.status_code, response.content, response.reason)
        after = _seconds(response.headers.get("Retry-After"))
        return Reply(answer, response.status_code, after)


def read_key(path: Path) -> str:
    """An API key, alone in a file. Raises SetupError, which does not show it; OSError."""
    key = path.read_bytes().strip()
    if not re.fullmatch(rb"[!-~]{1,1024}", key):
        raise SetupError(f"{path} must have one key of visible ASCII characters, and nothing else")
    return key.decode()


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After, which is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
    except (ValueError, OverflowError):
        return None


def silence(url: str, command: str = "./scripts/serve") -> str:
    """What to tell of a server that does not answer; `command` is what starts it."""
    return f"{url} does not answer: is {command} running?"


def no_answer(url: str, exc: requests.RequestException, command: str = "./scripts/serve") -> str:
    """What to tell of a request that failed; its kind if there was a connection."""
    if isinstance(exc, requests.ConnectionError):
        return silence(url, command)
    return f"{url} does not answer: {type(exc).__name__}"


def read_answer(status: int, content: bytes, reason: str | None) -> dict[str, Any]:
    """What a server said; an error in its place if that is no JSON object."""
    try:
        # TorchServe's own errors have no status.
        return {"status": "error"} | json.loads(content)
    except (ValueError, TypeError):
        return error(status, "NoAnswer", reason or "no JSON in the answer")


def error(code: int, kind: str, message: str) -> dict[str, Any]:
    """The form that the service's errors have."""
    return {"status": "error", "code": code, "type": kind, "message": message}


def table(name: str, answer: dict[str, Any]) -> str:
    """The answer for one image as lines for a terminal."""
    if answer["status"] != "success":
        return f"{name}\n  {answer.get('type')}: {answer.get('message')}\n"
    metadata = answer["metadata"]
    width, height = metadata["image_size"]
    lines = [
        f"{name}  {width}x{height}  {metadata['inference_time'] * 1000:.1f} ms  "
        f"{metadata['model']} {metadata['version']}, weights {metadata['weights']}"
    ]
    block = "█" if can_print("█") else "#"
    for prediction in answer["predictions"]:
        bar = block * round(prediction["confidence"] * 20)
        lines.append(
            f"  {prediction['confidence']:7.2%}  {bar:<20}  "
            f"{prediction['class']} ({prediction['class_id']})"
        )
    return "\n".join([*lines, ""])


def can_print(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True

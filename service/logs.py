"""The log of ./scripts/serve on stdout: one line for each event, as JSON or for people.

What the workers and TorchServe write is JSON already (handler/logs.py, handler/configs/log4j2.xml).
What Java itself prints is not, so all of its output passes through here.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import IO, Any

CHUNK_BYTES = 65536
# What a terminal could take for orders, as escapes that people see: all but newline and tab.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Log:
    """Writes whole lines, from any thread; drops them if nobody reads them any more."""

    def __init__(self, form: str) -> None:
        """`form` is "json" or "text"."""
        self.form = form
        self._render = to_json if form == "json" else to_text
        self._lock = threading.Lock()

    def event(self, level: str, event: str, **facts: Any) -> None:
        """Something that ./scripts/serve itself did or found."""
        line = {"time": now(), "level": level, "event": event} | facts
        self._write_lines([json.dumps(line).encode()])

    def text(self, text: str) -> None:
        """What is for people, as it is."""
        self._write(text.encode())

    def relay(self, output: IO[bytes], look: Callable[[bytes], bool] | None = None) -> None:
        """Write what a process prints, line by line, until it ends.

        `look` sees each line first, and says whether it is worth writing.
        """
        rest = b""
        while chunk := os.read(output.fileno(), CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            self._write_lines([line for line in lines if look(line)] if look else lines)
        self._write_lines([rest])

    def _write_lines(self, lines: Iterable[bytes]) -> None:
        self._write(b"".join(self._render(line) + b"\n" for line in lines if line.strip()))

    def _write(self, data: bytes) -> None:
        with self._lock:
            try:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # the service is worth more than its log
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except OSError:  # a full disk: lines are lost, but Java must not wait for its reader
                pass


def default_form() -> str:
    """For people at a terminal, for machines elsewhere."""
    return "text" if sys.stdout.isatty() else "json"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def to_json(line: bytes) -> bytes:
    """Our own lines as they are, any other as the message of an event `java`."""
    if line.startswith(b'{"time": "') and line.endswith(b"}"):
        return line if line.isascii() else line.decode("utf-8", "replace").encode()
    message = line.decode("utf-8", "replace")
    level = "WARNING" if "warning" in message.lower() else "INFO"
    return json.dumps({"time": now(), "level": level, "event": "java", "message": message}).encode()


def to_text(line: bytes) -> bytes:
    """One readable line; a traceback follows on lines of its own."""
    try:
        text = _for_people(json.loads(to_json(line)))
    except (ValueError, KeyError, TypeError):  # whoever writes like us; nothing is lost
        text = line.decode("utf-8", "replace")
    return text.translate(CONTROLS).encode("utf-8", "backslashreplace")  # half a surrogate pair


def _for_people(facts: dict[str, Any]) -> str:
    time = datetime.fromisoformat(facts.pop("time")).astimezone()
    level, event = facts.pop("level"), facts.pop("event")
    cause = facts.pop("cause", None)
    if event == "request":
        words = _request(facts)
    elif event == "gateway":
        words = _gateway(facts)
    else:
        message = facts.pop("message", None)
        pairs = [f"{name}={value}" for name, value in facts.items() if value not in (None, "")]
        words = " ".join([f"{event}: {message}" if message else event, *pairs])
    head = f"{time:%H:%M:%S}.{time.microsecond // 1000:03} {level:<7} {words}"
    return "\n".join([head, *(cause or "").splitlines()])


def _gateway(facts: dict[str, Any]) -> str:
    """Status, what was asked for, by whom, and the id under which to look for more."""
    client = facts["client"] or facts["address"]
    return (
        f"{facts['status']} {facts['method']} {facts['path']}  {facts['seconds'] * 1000:.1f} ms  "
        f"{client}  {facts['request_id']}"
    )


def _request(facts: dict[str, Any]) -> str:
    """Status, model, times, what was found, and the id under which to look for more."""
    stages = ("queue", "preprocess", "inference", "postprocess")
    times = [f"{stage} {facts[f'{stage}_ms']:.1f}" for stage in stages if facts.get(f"{stage}_ms")]
    found = facts["error"] or f"{facts['top_class']} {facts['confidence']:.1%}"
    images = f" of {facts['images']} images" if facts["images"] > 1 else ""
    return (
        f"{facts['status']} {facts['model']} {facts['version']}  {facts['total_ms']:.1f} ms "
        f"({', '.join(times)})  batch {facts['batch']}  {found}{images}  {facts['request_id']}"
    )

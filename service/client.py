"""Ask a running server what is in some images: a table for people, --json for machines."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

import service  # noqa: F401  stdout takes any character from here on

TIMEOUT_SECONDS = 60


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./scripts/predict",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="where predictions are")
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--top-k", type=int, metavar="K", help="classes (default: the server's)")
    parser.add_argument("--json", action="store_true", help="one JSON answer a line, as received")
    args = parser.parse_args(argv)
    url = f"{args.url.rstrip('/')}/predictions/{args.model}"
    failed = 0
    with requests.Session() as session:
        if "127.0.0.1" in url or "localhost" in url:
            session.trust_env = False  # no proxy of the environment
        for path in args.images:
            answer = ask(session, url, path, args.top_k)
            failed += answer["status"] != "success"
            print(json.dumps(answer) if args.json else table(path, answer))
    return 1 if failed else 0


def ask(session: requests.Session, url: str, path: Path, top_k: int | None) -> dict[str, Any]:
    """The server's answer for one file; what goes wrong on the way has the form of its errors."""
    try:
        body = path.read_bytes()
    except OSError as exc:
        return _error(0, "UnreadableFile", f"{path}: {exc.strerror}")
    name = path.name[-255:].encode(errors="replace").decode()  # it may be no text at all
    form = {"filename": name} | ({} if top_k is None else {"top_k": str(top_k)})
    try:
        response = session.post(
            url, files={"file": ("image", body)}, data=form, timeout=TIMEOUT_SECONDS
        )
    except requests.RequestException as exc:
        return _error(0, type(exc).__name__, f"{url} does not answer: is ./scripts/serve running?")
    try:
        answer = response.json()
    except ValueError:
        return _error(response.status_code, "NoAnswer", response.reason or "no JSON in the answer")
    # TorchServe's own errors have no status.
    return {"status": "error"} | answer


def table(path: Path, answer: dict[str, Any]) -> str:
    """One image's answer as lines for a terminal."""
    if answer["status"] != "success":
        return f"{path}\n  {answer.get('type')}: {answer.get('message')}\n"
    metadata = answer["metadata"]
    width, height = metadata["image_size"]
    lines = [
        f"{path}  {width}x{height}  {metadata['inference_time'] * 1000:.1f} ms  "
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


def _error(code: int, kind: str, message: str) -> dict[str, Any]:
    return {"status": "error", "code": code, "type": kind, "message": message}

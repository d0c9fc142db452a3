"""A client of the predictions port: asks about an image, and shows the answer in a terminal."""

import sys
from pathlib import Path
from typing import Any

import requests

TIMEOUT_SECONDS = 60


def ask(session: requests.Session, url: str, path: Path, top_k: int | None) -> dict[str, Any]:
    """The server's answer for one file; any other failure takes the form of its errors."""
    try:
        body = path.read_bytes()
    except OSError as exc:
        return _error(0, "UnreadableFile", f"{path}: {exc.strerror}")
    name = path.name[-255:].encode(errors="replace").decode()  # it may not be text at all
    options = {"filename": name} | ({} if top_k is None else {"top_k": str(top_k)})
    try:
        form = requests.Request(
            "POST", url, files={"file": ("image", body)}, data=options
        ).prepare()
        # TorchServe would parse multipart/form-data in Java, which costs more.
        headers = {"Content-Type": form.headers["Content-Type"].replace("form-data", "mixed")}
        response = session.post(url, data=form.body, headers=headers, timeout=TIMEOUT_SECONDS)
    except requests.RequestException as exc:
        return _error(0, type(exc).__name__, f"{url} does not answer: is ./scripts/serve running?")
    try:
        answer = response.json()
    except ValueError:
        return _error(response.status_code, "NoAnswer", response.reason or "no JSON in the answer")
    # TorchServe's own errors have no status.
    return {"status": "error"} | answer


def table(path: Path, answer: dict[str, Any]) -> str:
    """The answer for one image as lines for a terminal."""
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

"""The launcher's log: whole lines, every one of them, as JSON or for people."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.logs import Log, to_json, to_text

REQUEST = {
    "time": "2026-11-24T18:10:20.122+00:00",
    "level": "INFO",
    "event": "request",
    "request_id": "719fbfad",
    "traceparent": None,
    "model": "mobilenet_v2",
    "version": "1.0",
    "weights": "colours.pth",
    "status": 200,
    "images": 1,
    "cached": 0,
    "batch": 1,
    "queue_ms": None,
    "preprocess_ms": 2.14,
    "inference_ms": 14.029,
    "postprocess_ms": 0.242,
    "total_ms": 16.45,
    "top_class": "green",
    "confidence": 0.999965,
    "error": None,
}


def line(**facts: Any) -> bytes:
    return json.dumps(REQUEST | facts).encode()


def relayed(
    form: str,
    *parts: bytes,
    capfd: pytest.CaptureFixture[str],
    look: Callable[[bytes], bool] | None = None,
) -> list[str]:
    """What comes out for what a process prints in parts."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as output:
        thread = threading.Thread(target=Log(form).relay, args=[output, look])
        thread.start()
        for part in parts:
            os.write(writer, part)
        os.close(writer)
        thread.join(10)
        assert not thread.is_alive()
    return capfd.readouterr().out.splitlines()


def test_our_lines_pass_as_they_are() -> None:
    assert to_json(line()) == line()


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("WARNING: sun.reflect is not supported", "WARNING"),
        ('a "quote", a \\ and \u2028', "INFO"),
        ('{"time": "never closed', "INFO"),
        ("{}", "INFO"),
    ],
)
def test_any_other_line_becomes_a_message(text: str, level: str) -> None:
    facts = json.loads(to_json(text.encode()))
    assert (facts["event"], facts["level"], facts["message"]) == ("java", level, text)
    assert b"\n" not in to_json(text.encode())


def test_bytes_that_are_no_text_become_a_message() -> None:
    assert json.loads(to_json(b"\xff\xfe"))["message"] == "\ufffd\ufffd"


def test_a_request_for_people() -> None:
    assert to_text(line()).decode()[8:] == (
        ".122 INFO    200 mobilenet_v2 1.0  16.4 ms (preprocess 2.1, inference 14.0, "
        "postprocess 0.2)  batch 1  green 100.0%  719fbfad"
    )
    refused = to_text(line(status=400, error="NoImage", images=0, inference_ms=0, queue_ms=3.0))
    assert "(queue 3.0, preprocess 2.1, postprocess 0.2)  batch 1  NoImage  719" in refused.decode()
    assert "green 100.0% of 3 images" in to_text(line(images=3)).decode()


def test_a_failure_for_people_has_its_traceback_below() -> None:
    head, *cause = to_text(line(event="failure", cause="Traceback:\n  x")).decode().split("\n")
    assert " failure " in head
    assert cause == ["Traceback:", "  x"]


def test_other_events_for_people() -> None:
    text = to_text(
        b'{"time": "2026-11-24T18:10:20.122+00:00", "level": "INFO", "event": "stopped"}'
    )
    assert text.endswith(b".122 INFO    stopped")
    assert to_text(b"Model server started.").endswith(b" INFO    java: Model server started.")


@pytest.mark.parametrize("text", [b'{"time": "noon"}', b'{"time": "x}', b'{"time": "1" "event"}'])
def test_a_line_that_only_looks_like_ours_is_kept(text: bytes) -> None:
    assert to_text(text) == text


@pytest.mark.parametrize(
    "text",
    [line(event="\x1b[31m\x9b\x7f\r", cause="\ta"), b'{"time": "\x1b[31m\xc2\x9b\x7f\r\ta"}'],
)
def test_a_terminal_gets_no_orders(text: bytes) -> None:
    shown = to_text(text).decode()
    assert "\\x1b[31m\\x9b\\x7f\\x0d" in shown
    assert "\ta" in shown
    assert all(character.isprintable() or character in "\n\t" for character in shown)


def test_half_a_surrogate_pair_is_shown() -> None:
    assert b" \\ud800 " in to_text(line(event="\ud800"))


@pytest.mark.parametrize("form", ["json", "text"])
def test_lines_in_parts_come_out_whole(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    long = b"x" * 200_000
    whole = line() + b"\n" + b"plain\n\n" + long[:50_000] + b"\nlast without an end"
    parts = [whole[start : start + 1000] for start in range(0, len(whole), 1000)]
    lines = relayed(form, *parts, capfd=capfd)
    assert len(lines) == 4
    assert "719fbfad" in lines[0]
    assert "plain" in lines[1]
    assert "x" * 50_000 in lines[2]
    assert "last without an end" in lines[3]


def test_lines_of_several_threads_do_not_mix(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log("json")

    def write() -> None:
        for _ in range(50):
            log.event("INFO", "x", text="y" * 5000)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(text) for text in capfd.readouterr().out.splitlines()]
    assert len(lines) == 200


RELAY = (
    "import subprocess, sys; from service.logs import Log; "
    "source = subprocess.Popen(['seq', '200000'], stdout=subprocess.PIPE); "
    "Log('json').relay(source.stdout); sys.exit(source.wait())"
)


def test_nobody_reads_and_the_process_is_read_on() -> None:
    """What prints would stand still with a full pipe, and TorchServe with it."""
    process = subprocess.Popen([sys.executable, "-c", RELAY], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="has no /dev/full")
def test_the_disk_is_full_and_the_process_is_read_on() -> None:
    with Path("/dev/full").open("wb") as full:
        subprocess.run([sys.executable, "-c", RELAY], stdout=full, timeout=60, check=True)


def test_text_is_for_terminals() -> None:
    program = "from service.logs import default_form; print(default_form())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"json\n"
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", program], stdout=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 100).strip() == b"text"
    os.close(ours)


def test_each_line_is_shown_to_who_looks(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[bytes] = []

    def look(line: bytes) -> bool:
        seen.append(line)
        return line != b"two"

    written = relayed("json", b"one\ntw", b"o\n", b"three\n", capfd=capfd, look=look)
    assert seen == [b"one", b"two", b"three"]
    assert [json.loads(line)["message"] for line in written] == ["one", "three"]

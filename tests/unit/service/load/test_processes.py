"""Servers as processes."""

import json
import sys
import time
from pathlib import Path

import pytest

from service.load.processes import NotReady, read_events, running
from tests.processes import alive

CHILD = "import time; print('up', flush=True); time.sleep(60)"
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
{CHILD}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_ends_with_its_daemons(tmp_path: Path) -> None:
    with running([sys.executable, "-c", PARENT], {}, tmp_path) as server:
        deadline = time.monotonic() + 10
        while server.log.read_text().count("up") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        family = server.family()
    assert len(family) == 2
    assert not alive(family)


def line(event: str, **facts: object) -> str:
    return json.dumps({"time": "now", "event": event} | facts)


def test_events_of_a_log() -> None:
    """Java's own lines, half-written lines and other events are no such event."""
    log = "\n".join(
        ["{broken", line("ready", models=["a"]), line("java", message=line("ready")), line("ready")]
    )
    assert [found["models"] for found in read_events(log, "ready")] == [["a"]]


def test_a_server_is_ready_when_it_logs_so(tmp_path: Path) -> None:
    code = f"import time; print({line('ready')!r}, flush=True); time.sleep(60)"
    with running([sys.executable, "-c", code], {}, tmp_path) as server:
        server.wait_until_ready(10)
        assert not server.has_ended()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('error: no Java')", "no Java"),
        (f"print({line('startup_failed', message='no bf16')!r}); print('error: x')", "no bf16"),
        ("print('starting'); raise SystemError('no such thing')", "SystemError: no such thing"),
        ("import time; print('Ready after 1 s.', flush=True); time.sleep(60)", "not ready within"),
    ],
)
def test_why_a_server_is_not_ready(tmp_path: Path, code: str, reason: str) -> None:
    with (
        running([sys.executable, "-c", code], {}, tmp_path) as server,
        pytest.raises(NotReady, match=f"^{reason}"),
    ):
        server.wait_until_ready(0.5 if "sleep" in code else 10)

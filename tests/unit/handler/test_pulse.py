"""A worker's sign of life, and the launcher that watches it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from handler import pulse
from handler.pulse import HUNG_PREFIX, PREFIX, Pulse, count_hung
from service.torchserve import watchdog
from service.torchserve.watchdog import LATE_SECONDS, SILENT_LOOKS, Hung, Watchdog

# --- The worker


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(pulse, "MIN_PATIENCE_SECONDS", 0.5)


def beats(folder: Path) -> bool:
    """Whether there is a beat within a quarter of a second, many times as long as one takes."""
    file = folder / f"{PREFIX}{os.getpid()}"
    before = file.stat().st_mtime_ns
    time.sleep(0.25)
    return file.stat().st_mtime_ns != before


def test_a_worker_that_waits_for_requests_beats(tmp_path: Path, fast: None) -> None:
    worker = Pulse(tmp_path, 0.001)
    assert list(tmp_path.iterdir()) == []
    worker.start()
    with worker.batch():
        pass
    time.sleep(0.6)
    assert beats(tmp_path)


def test_a_batch_that_gets_on_beats_however_long_it_takes(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(pulse, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "process_time", lambda: 0)
    worker = Pulse(tmp_path, 0.001)
    worker.start()
    with worker.batch():
        for _ in range(8):
            now[0] += 0.4  # of the 0.5 s that a step may take
            worker.step()
        assert not worker.is_stuck()
        assert beats(tmp_path)


def test_a_batch_that_does_not_get_on_stops_the_beat(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(pulse, "log_line", lambda level, event, **facts: lines.append(facts))
    monkeypatch.setattr(pulse, "process_time", lambda: 0)  # other tests have threads that compute
    worker = Pulse(tmp_path, 0.001)
    worker.start()

    def never_returns() -> None:
        with worker.batch():
            time.sleep(1.5)

    thread = threading.Thread(target=never_returns)
    thread.start()
    time.sleep(0.7)
    assert not beats(tmp_path)
    thread.join()
    [line] = lines
    assert line["pid"] == os.getpid()
    assert "in never_returns" in line["cause"], "the log says where it hangs"
    assert beats(tmp_path), "it did return"


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds", "stuck"),
    [
        (19, 0, False),
        (19, 300, False),  # in many threads
        (21, 0.01, True),  # waits for what does not come
        (21, 21, True),  # computes without end
        (21, 2, False),  # has a tenth of a core
        (100, 19, False),
    ],
)
def test_a_process_that_starves_is_not_stuck(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    cpu_seconds: float,
    stuck: bool,
) -> None:
    now, cpu_now = [0.0], [0.0]
    monkeypatch.setattr(pulse, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "process_time", lambda: cpu_now[0])
    worker = Pulse(tmp_path, 0.1)
    with worker.batch():
        assert not worker.is_stuck()
        now[0], cpu_now[0] = seconds, cpu_seconds
        assert worker.is_stuck() is stuck


def test_a_step_counts_from_the_first_look_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(pulse, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "process_time", lambda: 0)
    worker = Pulse(tmp_path, 0.1)

    def look(seconds: float) -> bool:
        now[0] += seconds
        return worker.is_stuck()

    with worker.batch():
        assert not look(100)
        assert not look(15)
        assert look(15)
        worker.step()
        assert not look(15)
        assert not look(15)
        assert look(15)
    assert not look(100)
    with worker.batch():
        assert not look(100)
        assert look(30)


@pytest.mark.parametrize(("pass_seconds", "stuck"), [(2, True), (3, False), (None, False)])
def test_a_slow_model_has_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_seconds: float | None, stuck: bool
) -> None:
    """Ten times what its largest forward pass takes; for ever without a warm-up."""
    worker = Pulse(tmp_path, pass_seconds)
    with worker.batch():
        assert not worker.is_stuck()
        end = time.monotonic() + 25
        monkeypatch.setattr(pulse, "monotonic", lambda: end)
        monkeypatch.setattr(pulse, "process_time", lambda: time.process_time() + 25)
        assert worker.is_stuck() is stuck


def test_an_exception_ends_a_batch(tmp_path: Path, fast: None) -> None:
    worker = Pulse(tmp_path, 0.001)
    with pytest.raises(ValueError, match="x"), worker.batch():
        raise ValueError("x")
    time.sleep(0.6)
    assert not worker.is_stuck()


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Pulse(tmp_path / "missing", 0.001).start()
    assert [record for record in caplog.messages if json.loads(record)["event"] == "not_watched"]


def test_each_hung_worker_is_counted_once(tmp_path: Path) -> None:
    for pid in (1, 2):
        (tmp_path / f"{HUNG_PREFIX}{pid}").touch()
    assert count_hung(tmp_path) == 2
    assert count_hung(tmp_path) == 0


# --- The launcher


class Clock:
    """The launcher's clock, which nothing but a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


@contextmanager
def process(**options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, **options)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def worker() -> Iterator["subprocess.Popen[bytes]"]:
    with process(start_new_session=True) as child:
        yield child


@pytest.fixture
def file(tmp_path: Path, worker: "subprocess.Popen[bytes]") -> Path:
    """What the worker touches."""
    manifest = tmp_path / "0-birds" / "MAR-INF" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"model": {"modelName": "birds", "modelVersion": "1.0"}}')
    file = tmp_path / "0-birds" / f"{PREFIX}{worker.pid}"
    file.touch()
    return file


def looks(dog: Watchdog, clock: Clock, count: int, seconds: float = 1.1) -> list[Hung]:
    found = []
    for _ in range(count):
        clock.now += seconds
        found += dog.check()
    return found


def beat(file: Path, at: float) -> None:
    os.utime(file, (at, at))


def test_a_silent_worker_is_killed_once(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    """SIGSTOP holds no SIGKILL up."""
    worker.send_signal(signal.SIGSTOP)
    dog = Watchdog(tmp_path, worker.pid)
    assert looks(dog, clock, SILENT_LOOKS) == []
    assert worker.poll() is None
    assert looks(dog, clock, 1) == [Hung(worker.pid, "birds")]
    assert worker.wait(10) == -signal.SIGKILL
    assert looks(dog, clock, 2 * SILENT_LOOKS) == []
    assert count_hung(file.parent) == 1


def test_a_worker_that_beats_lives_whatever_the_clock_says(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    """A beat is a time that has changed: forwards, backwards, to the year 1970."""
    dog = Watchdog(tmp_path, worker.pid)
    for at in (2e9, 1e9, 1.0, 5e8) * SILENT_LOOKS:
        beat(file, at)
        assert looks(dog, clock, 1) == []
    assert worker.poll() is None


def test_a_look_that_comes_late_counts_for_nothing(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    """After a pause of the machine or of the launcher, workers get the time to beat again."""
    dog = Watchdog(tmp_path, worker.pid)
    for _ in range(3):
        assert looks(dog, clock, SILENT_LOOKS - 1) == []
        assert looks(dog, clock, 1, seconds=3600) == []
    assert looks(dog, clock, 5 * SILENT_LOOKS, seconds=LATE_SECONDS + 0.1) == []
    assert worker.poll() is None


def test_looking_often_is_no_silence(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    dog = Watchdog(tmp_path, worker.pid)
    assert looks(dog, clock, 10 * (SILENT_LOOKS - 1), seconds=0.1) == []
    assert worker.poll() is None


def test_the_file_of_a_worker_that_has_ended_is_removed(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    worker.kill()
    worker.wait()
    assert looks(Watchdog(tmp_path, worker.pid), clock, 2 * SILENT_LOOKS) == []
    assert not file.exists()
    assert count_hung(file.parent) == 0


def test_a_process_that_has_got_the_number_of_a_worker_lives(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    with process(start_new_session=True) as server:
        assert looks(Watchdog(tmp_path, server.pid), clock, 2 * SILENT_LOOKS) == []
    assert worker.poll() is None


def test_a_model_that_is_unloaded_meanwhile_is_forgotten(
    tmp_path: Path, file: Path, clock: Clock, worker: "subprocess.Popen[bytes]"
) -> None:
    dog = Watchdog(tmp_path, worker.pid)
    assert looks(dog, clock, 3) == []
    file.unlink()
    assert looks(dog, clock, 2 * SILENT_LOOKS) == []
    assert worker.poll() is None

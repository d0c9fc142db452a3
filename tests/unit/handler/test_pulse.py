"""A worker's sign of life, and the launcher that watches it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from handler import pulse
from handler.pipeline import warm_up
from handler.pulse import HUNG_PREFIX, PREFIX, Pulse, count_hung
from service.torchserve import watchdog
from service.torchserve.watchdog import LATE_SECONDS, SILENT_LOOKS, Hung, Watchdog
from tests import ROOT
from tests.unit.handler.worker import start

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


# A worker whose batch does not return, or does so in time; it lives until it is killed.
WORKER = """
import sys, time
from pathlib import Path
from handler import pulse
pulse.BEAT_SECONDS, pulse.MIN_PATIENCE_SECONDS = 0.02, 0.5
worker = pulse.Pulse(Path(sys.argv[1]), 0.001)
worker.start()

def works(seconds):
    with worker.batch():
        time.sleep(seconds)

works(float(sys.argv[2]))
time.sleep(2)
"""


@pytest.mark.parametrize(("seconds", "ends"), [(0.2, False), (60, True)])
def test_a_batch_that_does_not_get_on_ends_the_process(
    tmp_path: Path, seconds: float, ends: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), str(seconds)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == int(ends), done.stderr
    assert count_hung(tmp_path) == int(ends)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == int(not ends)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["worker_stuck"] * ends
    assert all("in works" in line["cause"] for line in lines), "the log says where it hangs"


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds", "stuck"),
    [
        (9, 0, False),
        (9, 300, False),  # in many threads
        (11, 0.01, True),  # waits for what does not come
        (11, 11, True),  # computes without end
        (11, 1, False),  # has a tenth of a core
        (100, 9, False),
    ],
)
def test_a_process_that_starves_is_not_stuck(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
    cpu_seconds: float,
    stuck: bool,
) -> None:
    now, cpu_now = [0.0], [0.0]
    monkeypatch.setattr(pulse, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "process_time", lambda: cpu_now[0])
    worker = Pulse(tmp_path, 0.1)
    with worker.batch():
        assert not worker.is_stuck()
        for _ in range(seconds):
            found = worker.is_stuck()
            now[0] += 1
            cpu_now[0] += cpu_seconds / seconds
        assert not found or stuck
        assert worker.is_stuck() is stuck


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Look at a process that waits, once a second for so long; the last finding."""
    now = [0.0]
    monkeypatch.setattr(pulse, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "process_time", lambda: 0)

    def look(worker: Pulse, seconds: int, step: float = 1.0) -> bool:
        for _ in range(seconds):
            now[0] += step
            found = worker.is_stuck()
        return found

    return look


def test_a_step_counts_from_the_first_look_at_it(tmp_path: Path, look: Callable[..., bool]) -> None:
    worker = Pulse(tmp_path, 0.1)
    with worker.batch():
        assert not look(worker, 8)
        assert look(worker, 8)
        worker.step()
        assert not look(worker, 8)
        assert look(worker, 8)
    assert not look(worker, 100)
    with worker.batch():
        assert not look(worker, 8)
        assert look(worker, 8)


def test_a_look_of_the_worker_that_comes_late_counts_for_nothing(
    tmp_path: Path, look: Callable[..., bool]
) -> None:
    """After a pause of the machine or of the worker, the batch gets the time to go on."""
    worker = Pulse(tmp_path, 0.1)
    with worker.batch():
        for _ in range(3):
            assert not look(worker, 8)
            assert not look(worker, 1, step=3600)
        assert not look(worker, 100, step=pulse.LATE_SECONDS + 0.1)
        assert look(worker, 12)


@pytest.mark.parametrize(("pass_seconds", "stuck"), [(2, True), (3, False), (None, False)])
def test_a_slow_model_has_patience(
    tmp_path: Path, look: Callable[..., bool], pass_seconds: float | None, stuck: bool
) -> None:
    """Ten times what its largest forward pass takes; for ever without a warm-up."""
    worker = Pulse(tmp_path, pass_seconds)
    with worker.batch():
        assert look(worker, 25) is stuck


@pytest.mark.usefixtures("isolation")
def test_the_longest_step_of_large_images_is_to_decode_them(model_dir: Path) -> None:
    worker = start(model_dir)

    def step_seconds(max_pixels: int) -> float:
        seconds = warm_up(worker.engine, worker.card.transform, 1, 1, max_pixels)
        assert seconds is not None
        return seconds

    assert step_seconds(1) < 0.5
    assert step_seconds(2**30) > 1, "no machine decodes a thousand million pixels a second"


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

"""Memory for more workers: of the machine, and of GPUs of every kind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from service.scaling.memory import MemoryHeadroom, count_fitting, find_headroom, process_memory


class FakeNvml:
    """GPUs as (free bytes, processes), and each process as (pid, bytes)."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: Any, split: bool = False, refuses: bool = False) -> None:
        self.gpus, self.split, self.refuses = gpus, split, refuses

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        if not self.split:
            raise self.NVMLError("not supported")
        return [1, 1]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=900, free=self.gpus[handle][0])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        if self.refuses:
            raise self.NVMLError("no permission")
        processes = self.gpus[handle][1]
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]


def headroom(
    *memory: int | None, nvml: Any = None, free: int | None = 1000
) -> list[MemoryHeadroom]:
    """For workers with the pids 10, 11, … that take so much."""
    return find_headroom(dict(enumerate(memory, start=10)), nvml, lambda: free)


def test_a_worker_takes_what_the_largest_does() -> None:
    assert headroom(300, 400, None) == [MemoryHeadroom("memory", 400, 1000)]


def test_what_cannot_be_told_is_not_checked() -> None:
    assert headroom(None, None) == headroom() == headroom(300, free=None) == []
    assert count_fitting([], 50) == 50


@pytest.mark.parametrize(("more", "fitting"), [(1, 1), (2, 2), (3, 2), (50, 2)])
def test_what_fits_into_memory(more: int, fitting: int) -> None:
    assert count_fitting(headroom(400), more) == fitting


def test_a_gpu_on_which_a_worker_computes() -> None:
    nvml = FakeNvml((5000, [(99, 70)]), (2000, [(10, 500), (11, 600), (99, 9000)]))
    assert headroom(None, None, nvml=nvml) == [MemoryHeadroom("memory of GPU 1", 600, 2000)]


def test_a_gpu_that_does_not_say_what_a_process_takes() -> None:
    nvml = FakeNvml((2000, [(10, None), (11, None)]))
    assert headroom(None, None, nvml=nvml) == [MemoryHeadroom("memory of GPU 0", 450, 2000)]


def test_the_gpus_take_turns() -> None:
    nvml = FakeNvml((2000, [(10, 500)]), (900, [(11, 300)]))
    found = headroom(1, 1, nvml=nvml, free=10**6)
    assert [count_fitting(found, more) for more in (1, 6, 7, 9)] == [1, 6, 6, 6]


@pytest.mark.parametrize("how", ["split", "refuses"])
def test_a_card_that_does_not_tell_is_not_checked(how: str) -> None:
    assert headroom(None, nvml=FakeNvml((2000, [(10, 500)]), **{how: True})) == []


@pytest.fixture
def worker() -> Iterator[int]:
    """The PID of a process that looks like a worker's."""
    code = "import time; print('up', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, "model_service_worker.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.mark.parametrize("refused", [False, True], ids=["ours", "another user's"])
def test_memory_of_a_worker(worker: int, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    if refused:
        monkeypatch.setattr(psutil.Process, "memory_full_info", refuse)
    assert 2**20 < (process_memory(worker) or 0) < 2**30


@pytest.mark.parametrize("pid", [-1, 2**30, os.getpid()], ids=["starting", "gone", "no worker"])
def test_no_memory_of_what_is_no_worker_here(pid: int) -> None:
    assert process_memory(pid) is None

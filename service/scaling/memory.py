"""Memory for more workers: what a worker takes, what is free, and how many more fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from handler.machine import available_memory
from service.torchserve.management import ModelState

MAIN = "memory"  # the name of the machine's, which is not a GPU's


@dataclass(frozen=True)
class MemoryHeadroom:
    """Memory of one kind: what a worker takes of it, and what is free."""

    name: str  # "memory", "memory of GPU 0"
    each: int  # bytes
    free: int  # bytes

    def __str__(self) -> str:
        return f"{self.name}: a worker takes {mebibytes(self.each)}, {mebibytes(self.free)} free"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def headroom_of(state: ModelState) -> list[MemoryHeadroom]:
    """The memory for more workers of a model on this machine and its GPUs."""
    memory = {worker.pid: process_memory(worker.pid) for worker in state.workers}
    return find_headroom(memory, open_nvml() if state.on_gpu else None)


def find_headroom(
    memory: Mapping[int, int | None],
    nvml: Any = None,
    available: Callable[[], int | None] = available_memory,
) -> list[MemoryHeadroom]:
    """The memory for more workers, without the kinds that cannot be told from here.

    `memory` has the bytes that the process of each worker takes (None: unknown). `nvml` is the
    module pynvml, initialised, and None without a GPU.
    """
    headroom = []
    taken = [size for size in memory.values() if size]
    free = available()
    if taken and free is not None:
        headroom.append(MemoryHeadroom(MAIN, max(taken), free))
    if nvml is not None:
        headroom += _gpu_headroom(list(memory), nvml)
    return headroom


def _gpu_headroom(pids: Sequence[int], nvml: Any) -> list[MemoryHeadroom]:
    """One for each GPU on which some of the processes compute."""
    headroom = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _is_split(handle, nvml):
            continue
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:  # a container may not be told
            continue
        ours = [process.usedGpuMemory for process in processes if process.pid in pids]
        if ours:
            known = [used for used in ours if used]
            # Not every driver says what a process takes; then it is at most what all take.
            each = max(known) if known else memory.used // len(ours)
            headroom.append(MemoryHeadroom(f"memory of GPU {index}", each, memory.free))
    return headroom


def _is_split(handle: Any, nvml: Any) -> bool:
    """Whether a card is split into MIG devices, whose memory is not the card's."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # not a card of that kind
        return False


def open_nvml() -> Any:
    """The module pynvml, ready for use; None without NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def process_memory(pid: int) -> int | None:
    """Bytes that a worker's process takes; None if it is no worker on this machine.

    Its own pages and its share of those that it has in common with others (PSS). The process of
    another user shows less, and so does macOS: then its resident pages.
    """
    try:
        process = psutil.Process(pid)
        if not any("model_service_worker" in word for word in process.cmdline()):
            return None
        try:
            return int(process.memory_full_info().pss)
        except (psutil.AccessDenied, AttributeError):
            return int(process.memory_info().rss)
    except (psutil.Error, ValueError):  # TorchServe says -1 before there is a process
        return None


def missing_checks(headroom: Sequence[MemoryHeadroom], on_gpu: bool) -> list[str]:
    """What cannot be checked before more workers are started."""
    notes = []
    if all(kind.name != MAIN for kind in headroom):
        notes.append("memory is not checked: no worker of the model runs on this machine")
    if on_gpu and all(kind.name == MAIN for kind in headroom):
        notes.append("the GPUs' memory is not checked: NVML sees no worker of the model here")
    return notes


def count_fitting(headroom: Sequence[MemoryHeadroom], more: int) -> int:
    """How many of `more` additional workers fit; TorchServe gives them to the GPUs in turns."""
    gpus = sum(kind.name != MAIN for kind in headroom)
    for kind in headroom:
        fitting = kind.free // max(1, kind.each)
        more = min(more, fitting if kind.name == MAIN else fitting * gpus)
    return more

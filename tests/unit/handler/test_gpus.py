"""GPUs: which ones TorchServe and its workers are told of, and what NVML says about one."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from handler import gpus
from handler.errors import InvalidSettings
from handler.gpus import (
    MEMORY_TOTAL,
    MEMORY_USED,
    UTILIZATION,
    VISIBLE,
    WORKERS_VISIBLE,
    GpuGauges,
    find_gpu,
    open_gauges,
    restore_visible,
)
from service.torchserve.gpus import check_gpus, gpu_environment

UUID = "11111111-2222-3333-4444-555555555555"
MIG = "MIG-99999999-2222-3333-4444-555555555555"


class FakeNvml:
    """Two GPUs, of which the second is in front by NVML's count, and a MIG device."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.lost = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in (f"GPU-{UUID}", MIG):
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(used=3_000, total=80_000, free=77_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        if handle == MIG:
            raise self.NVMLError("not supported")
        return SimpleNamespace(gpu=37, memory=5)


# --- What TorchServe is told


@pytest.mark.parametrize(
    ("device", "count", "visible", "java", "workers"),
    [
        ("auto", 0, None, "-1", None),
        ("auto", 0, "", "-1", None),
        ("auto", 0, "GPU-unknown", "-1", None),
        ("cpu", 2, "0,1", "-1", None),
        ("auto", 2, None, "0,1", None),
        ("cuda", 2, "2, 3", "0,1", "2, 3"),
        ("auto", 2, "GPU-a,GPU-b", "0,1", "GPU-a,GPU-b"),
        ("auto", 1, MIG, "0", MIG),
        ("auto", 1, "3,-1,2", "0", "3,-1,2"),
    ],
)
def test_what_java_and_the_workers_get(
    device: str, count: int, visible: str | None, java: str, workers: str | None
) -> None:
    environ = {} if visible is None else {VISIBLE: visible}
    variables = gpu_environment(device, count, environ)
    assert variables[VISIBLE] == java
    assert all(word.lstrip("-").isdigit() for word in java.split(",")), "else Java ends"
    assert variables.get("TS_NUMBER_OF_GPU") == ("0" if java == "-1" else None)
    assert variables.get(WORKERS_VISIBLE) == workers
    in_worker = environ | variables
    restore_visible(in_worker)
    assert in_worker[VISIBLE] == (java if workers is None else workers)
    assert WORKERS_VISIBLE not in in_worker


def test_an_environment_that_is_not_ours_stays() -> None:
    for environ in ({}, {VISIBLE: "GPU-a"}):
        before = dict(environ)
        restore_visible(environ)
        assert environ == before


@pytest.mark.parametrize(
    ("visible", "count", "message"),
    [
        ("GPU-unknown", 0, "names 1 GPUs, and CUDA finds 0 of them here"),
        ("0,GPU-unknown", 1, "names 2 GPUs, and CUDA finds 1 of them here"),
        ("7", 0, "names 1 GPUs, and CUDA finds 0 of them here"),
        ("MIG-a,MIG-b", 1, "names 2 GPUs, and CUDA finds 1 of them here"),
    ],
)
def test_a_gpu_that_is_named_and_not_there(visible: str, count: int, message: str) -> None:
    environ = {VISIBLE: visible}
    assert check_gpus("auto", count, environ) == f"warning: {VISIBLE}={visible} {message}"
    assert check_gpus("cpu", count, environ) is None
    with pytest.raises(InvalidSettings) as refused:
        check_gpus("cuda", count, environ)
    assert str(refused.value) == f"--device cuda, but {VISIBLE}={visible} {message}"


@pytest.mark.parametrize("visible", ["", "-1"])
def test_gpus_that_are_hidden(visible: str) -> None:
    assert check_gpus("auto", 0, {VISIBLE: visible}) is None
    with pytest.raises(InvalidSettings, match=f"{VISIBLE}={visible} hides every GPU"):
        check_gpus("cuda", 0, {VISIBLE: visible})


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 0), (None, 2), ("0", 1), ("2, 3", 2), ("1,-1,0", 1), (MIG, 1)]
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_are_there(visible: str | None, count: int, device: str) -> None:
    environ = {} if visible is None else {VISIBLE: visible}
    assert check_gpus(device, count, environ) is None


# --- What NVML says


def test_a_gpu_is_known_by_its_uuid() -> None:
    """Not by its number: NVML counts all GPUs, torch the visible ones."""
    properties = SimpleNamespace(uuid=UUID)
    for visible in ("", "3", f"GPU-{UUID[:8]}"):
        assert find_gpu(FakeNvml(), 0, properties, visible) == f"GPU-{UUID}"


def test_a_mig_device_is_known_by_its_name() -> None:
    assert find_gpu(FakeNvml(), 0, SimpleNamespace(uuid=UUID), MIG) == MIG


def read(handle: str, nvml: FakeNvml | None = None) -> list[gpus.Gauge]:
    return list(GpuGauges(nvml or FakeNvml(), handle, 3)())


def test_gauges_of_a_gpu() -> None:
    assert read(f"GPU-{UUID}") == [
        (MEMORY_USED, 3_000, ("3",)),
        (MEMORY_TOTAL, 80_000, ("3",)),
        (UTILIZATION, 0.37, ("3",)),
    ]


def test_what_nvml_cannot_tell_is_left_out() -> None:
    assert [name for name, *_ in read(MIG)] == [MEMORY_USED, MEMORY_TOTAL]


def test_a_lost_gpu_does_not_end_the_metrics() -> None:
    nvml = FakeNvml()
    nvml.lost = True
    assert read(f"GPU-{UUID}", nvml) == []


def test_gauges_are_read_every_few_seconds() -> None:
    now = 100.0
    gauges = GpuGauges(FakeNvml(), MIG, 0, clock=lambda: now)
    read_at = []
    for now in (100.0, 101.0, 104.9, 105.0, 106.0, 111.0):
        if list(gauges()):
            read_at.append(now)
    assert read_at == [100.0, 105.0, 111.0]


def test_a_cpu_has_no_gauges_and_needs_no_nvml() -> None:
    code = (
        "import sys; from handler.gpus import open_gauges; import scripts.serve; "
        "assert not list(open_gauges('cpu')()); assert not {'pynvml', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_nvml_the_model_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pynvml

    def no_library() -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    assert list(open_gauges("cuda:0")()) == []
    assert "no metrics of the GPU: NVMLError_LibraryNotFound" in capsys.readouterr().err


@pytest.mark.gpu
def test_gauges_of_this_gpu() -> None:
    import torch

    values = {name: value for name, value, _ in open_gauges("cuda:0")()}
    total = torch.cuda.get_device_properties(0).total_memory
    assert values[MEMORY_TOTAL] == pytest.approx(total, rel=0.1)
    assert 0 < values[MEMORY_USED] <= values[MEMORY_TOTAL]
    assert 0 <= values.get(UTILIZATION, 0) <= 1


def test_cuda_is_not_asked_before_the_users_own_devices_are_back() -> None:
    """TorchServe's base handler asks while it is imported, and CUDA reads the variable once."""
    code = (
        "import os, torch\n"
        "seen = []\n"
        f"torch.cuda.is_available = lambda: seen.append(os.environ['{VISIBLE}']) or False\n"
        "import handler.image_classifier\n"
        "print(*seen)\n"
    )
    environ = os.environ | {VISIBLE: "0", WORKERS_VISIBLE: "GPU-1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.splitlines()[-1].split()) == {"GPU-1"}

"""Cores of this process under every kind of CPU quota, and GPUs without asking torch."""

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from handler import machine
from handler.machine import (
    available_cores,
    available_memory,
    count_gpus,
    cpu_model,
    gpu_memory,
    has_gpu,
)
from tests.driver import make_driver


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def v2(folder: Path, text: str) -> Path:
    (folder / "cpu.max").write_text(text)
    return folder


def v1(folder: Path, quota: str, period: str | None) -> Path:
    (folder / "cpu").mkdir()
    (folder / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    if period is not None:
        (folder / "cpu" / "cpu.cfs_period_us").write_text(period)
    return folder


QUOTAS = [(200_000, 2), (250_000, 3), (100_000, 1), (50_000, 1), (1_000, 1), (1_600_000, 8)]


@pytest.mark.parametrize(("quota", "cores"), QUOTAS)
def test_quota_of_cgroup_v2(tmp_path: Path, quota: int, cores: int) -> None:
    assert available_cores(v2(tmp_path, f"{quota} 100000\n")) == cores


@pytest.mark.parametrize(("quota", "cores"), QUOTAS)
def test_quota_of_cgroup_v1(tmp_path: Path, quota: int, cores: int) -> None:
    assert available_cores(v1(tmp_path, f"{quota}\n", "100000\n")) == cores


def test_period_counts(tmp_path: Path) -> None:
    assert available_cores(v2(tmp_path, "100000 50000\n")) == 2


def test_v2_goes_over_v1(tmp_path: Path) -> None:
    assert available_cores(v2(v1(tmp_path, "100000\n", "100000\n"), "300000 100000\n")) == 3


@pytest.mark.parametrize("text", ["max 100000\n", "max\n", "", "nonsense\n", "a b c\n"])
def test_no_quota_of_cgroup_v2(tmp_path: Path, text: str) -> None:
    assert available_cores(v2(tmp_path, text)) == 8


@pytest.mark.parametrize(("quota", "period"), [("-1\n", "100000\n"), ("100000\n", None)])
def test_no_quota_of_cgroup_v1(tmp_path: Path, quota: str, period: str | None) -> None:
    assert available_cores(v1(tmp_path, quota, period)) == 8


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "missing") == 8


def test_affinity_counts_if_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert available_cores(v2(tmp_path, "400000 100000\n")) == 1


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_systems_without_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert available_cores(tmp_path) == cores


# --- GPUs


def test_gpu_as_torch_sees_it() -> None:
    assert has_gpu() == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("version", "init", "count", "found"),
    [
        (13000, 0, 1, 1),
        (13020, 0, 8, 8),
        (14000, 0, 1, 1),
        (12080, 0, 1, 0),  # a driver too old for this torch
        (13000, 100, 1, 0),  # no device, says cuInit
        (13000, 0, 0, 0),  # CUDA_VISIBLE_DEVICES hides them all
    ],
)
def test_gpu_as_the_driver_tells(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    init: int,
    count: int,
    found: int,
) -> None:
    library = make_driver(tmp_path, version=version, init=init, count=count)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(library)))
    monkeypatch.setattr(machine, "_torch_cuda", lambda: 13)
    assert count_gpus() == found
    assert has_gpu() is (found > 0)


@pytest.mark.parametrize(
    ("version", "count", "memory", "found"),
    [
        (13000, 1, 10 * 2**30, 10 * 2**30),
        (13000, 3, 2**34, 2**34),  # the smallest of those that differ
        (13000, 1, None, None),  # it does not say
        (13000, 0, 2**30, None),
        (12080, 1, 2**30, None),  # a driver too old for this torch
    ],
)
def test_memory_of_gpus_as_the_driver_tells(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    count: int,
    memory: int | None,
    found: int | None,
) -> None:
    library = make_driver(tmp_path, version=version, init=0, count=count, memory=memory)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(library)))
    monkeypatch.setattr(machine, "_torch_cuda", lambda: 13)
    assert gpu_memory() == found


def test_no_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(machine, "_torch_cuda", lambda: 13)
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert not has_gpu()
    assert gpu_memory() is None


def test_no_gpu_with_a_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch_cuda", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no need to ask"))
    assert not has_gpu()


def test_cuda_version_is_that_of_the_installed_torch() -> None:
    built_for = torch.version.cuda
    assert machine._torch_cuda() == (int(built_for.split(".")[0]) if built_for else None)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("cuda: Optional[str] = '12.8'", 12),
        ("cuda = '13.0'", 13),
        ("cuda: Optional[str] = None", None),
        ("cuda = None", None),
        ("", None),
    ],
)
def test_cuda_version_of_any_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: int | None
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.14.1+cpu'\n{line}\n")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine._torch_cuda() == version


def test_cpu_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Z80 rev 2\n" * 2)
    assert cpu_model() == "Z80 rev 2"


# --- Memory


def written(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_memory_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:     300 kB\n")
    assert available_memory(tmp_path, tmp_path / "meminfo") == 300 * 1024


@pytest.mark.parametrize(
    ("limit", "left"),
    [("1000\n", 150), ("90000000\n", 300 * 1024), ("max\n", 300 * 1024), ("500\n", 0)],
    ids=["limit", "more than there is", "none", "exceeded"],
)
def test_memory_of_a_container(tmp_path: Path, limit: str, left: int) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 300 kB\n")
    stat = "anon 20\ninactive_file 50\nactive_file 7\n"
    v2 = written(tmp_path, memory__max=limit, memory__current="900\n", memory__stat=stat)
    assert available_memory(v2, tmp_path / "meminfo") == left


def test_memory_of_an_old_container(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("900\n")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 3\ntotal_inactive_file 50\n")
    assert available_memory(tmp_path, tmp_path / "none") == 150


def test_memory_if_nothing_tells(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "none") is None

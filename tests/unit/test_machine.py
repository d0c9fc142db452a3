"""Cores of this process under every kind of CPU quota."""

import os
from pathlib import Path

import pytest

from handler.machine import available_cores


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


@pytest.mark.parametrize("period", ["100000\n", None])
def test_no_quota_of_cgroup_v1(tmp_path: Path, period: str | None) -> None:
    assert available_cores(v1(tmp_path, "-1\n", period)) == 8


def test_quota_without_its_period_is_none(tmp_path: Path) -> None:
    assert available_cores(v1(tmp_path, "100000\n", None)) == 8


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "missing") == 8


def test_affinity_counts_where_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert available_cores(v2(tmp_path, "400000 100000\n")) == 1


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_systems_without_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert available_cores(tmp_path) == cores


def test_this_machine_has_a_core() -> None:
    assert 1 <= available_cores() <= 8

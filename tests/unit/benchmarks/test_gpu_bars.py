"""The bars of a GPU, from figures of which the verdict is known."""

from typing import Any

import pytest

from benchmarks.gpu_bars import bars, table, verdict

CHECK = {"engine": "cuda-fp16", "decoder": "cpu", "same_best_class": 0.975, "trained": True}


def http(rate: float, images: int = 1, workers: int = 8, busy: float = 50.0) -> dict[str, Any]:
    row = {"images": images, "workers": workers, "images_per_second": rate}
    return row | {"machine_cpu_percent": busy}


def parts(**rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: {"rows": found} for name, found in rows.items()}


def verdicts(found: dict[str, Any]) -> list[str]:
    return [verdict(bar, is_measured=is_measured) for bar, is_measured in bars(found)]


def test_all_is_met() -> None:
    found = parts(
        check=[CHECK, CHECK | {"decoder": "nvjpeg"}, {"decoder": "x", "reason": "not here"}],
        inprocess=[{"images_per_second": 900.0}, {"images_per_second": 8000.0}],
        ours=[http(6050), http(6500, images=8)],
        empty=[http(11_000)],
        stock=[http(700)],
        workers=[http(rate, workers=count) for count, rate in ((1, 1000), (2, 1900), (4, 3500))],
    )
    assert verdicts(found) == ["met"] * 8
    lines = table(bars(found))
    assert "6,050 images/s" in lines[2]
    assert "55 %" in lines[3]
    assert "8.6 times" in lines[5]
    assert "nvjpeg" in lines[7]


def test_all_is_missed() -> None:
    found = parts(
        check=[CHECK | {"same_best_class": 0.96}],
        inprocess=[{"images_per_second": 7999.0}],
        ours=[http(5000), http(6499, images=8)],
        empty=[http(11_000)],
        stock=[http(700)],
        workers=[http(3000, workers=4), http(2900, workers=8)],
    )
    assert verdicts(found) == ["missed"] * 7


def test_more_workers_need_not_help_once_the_cores_are_full() -> None:
    steps = [http(3000, workers=4, busy=95.0), http(2900, workers=8, busy=97.0)]
    assert verdicts(parts(workers=steps))[-1] == "met"


@pytest.mark.parametrize(
    "found",
    [
        {},
        parts(check=[CHECK | {"trained": False}], ours=[http(0.0)], empty=[], workers=[http(5.0)]),
    ],
)
def test_what_was_not_measured_has_no_verdict(found: dict[str, Any]) -> None:
    assert verdicts(found) == ["not measured"] * 7

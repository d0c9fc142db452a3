"""What the service is to reach on one H100 or H200 with 16 cores, and whether it did."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.bars import Bar
from benchmarks.parts import Found
from service.tables import text_table

IN_PROCESS = 8000  # images a second, JPEG bytes to top-5
ONE_IMAGE, EIGHT_IMAGES = 6000, 6500  # images a second over HTTP, by images in a request
OF_EMPTY = 55  # percent of the empty handler's rate, one image in a request
OF_STOCK = 8  # times the stock handler's rate
AGREEMENT = 97  # percent of the images with the same top-1 class as fp32 on the CPU
FULL_CPU = 90  # percent of all cores, from which on more workers need not help
RATE = "{:,.0f} images/s"


def bars(parts: Mapping[str, Found]) -> list[tuple[Bar, bool]]:
    """Each bar, and whether it was measured."""
    return list(_bars({name: part["rows"] for name, part in parts.items()}))


def table(found: Sequence[tuple[Bar, bool]]) -> list[str]:
    """The lines for people."""
    rows = [
        [bar.what, bar.required, bar.measured, verdict(bar, is_measured=is_measured)]
        for bar, is_measured in found
    ]
    headings = ["bar", "required", "measured", "verdict"]
    return text_table(headings, rows, left=(0, 1, 2, 3))


def verdict(bar: Bar, *, is_measured: bool) -> str:
    if not is_measured:
        return "not measured"
    return "met" if bar.is_met else "missed"


def _bars(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[Bar, bool]]:
    one, eight = (_rate(rows.get("ours", ()), images) for images in (1, 8))
    empty, stock = (_rate(rows.get(name, ()), 1) for name in ("empty", "stock"))
    within = max((row["images_per_second"] for row in rows.get("inprocess", ())), default=None)
    yield _at_least("in process, JPEG bytes to top-5", IN_PROCESS, within, RATE)
    yield _at_least("HTTP, one image a request, defaults", ONE_IMAGE, one, RATE)
    share = 100 * one / empty if one and empty else None
    yield _at_least("the same, of the empty handler", OF_EMPTY, share, "{:.0f} %")
    yield _at_least("HTTP, eight images a request, defaults", EIGHT_IMAGES, eight, RATE)
    times = one / stock if one and stock else None
    yield _at_least("one image a request, of the stock handler", OF_STOCK, times, "{:.1f} times")
    checked = [row for row in rows.get("check", ()) if "same_best_class" in row]
    if not any(row["trained"] for row in checked):
        yield _at_least("same top-1 class as fp32 on the CPU", AGREEMENT, None, "{:.1f} %")
    for row in checked:
        if row["trained"]:
            what = f"same top-1 class as fp32 on the CPU, {row['engine']}, {row['decoder']} decoder"
            yield _at_least(what, AGREEMENT, 100 * row["same_best_class"], "{:.1f} %")
    yield _growth(rows.get("workers", ()))


def _at_least(what: str, low: float, value: float | None, form: str) -> tuple[Bar, bool]:
    if value is None:
        return Bar(what, f"at least {form.format(low)}", "-", False), False
    return Bar.at_least(what, low, value, form), True


def _rate(rows: Sequence[Mapping[str, Any]], images: int) -> float | None:
    """Of the load with so many images in a request. None also if no answer was good."""
    found = [row["images_per_second"] for row in rows if row["images"] == images]
    return max(found, default=None) or None


def _growth(rows: Sequence[Mapping[str, Any]]) -> tuple[Bar, bool]:
    """Whether each step to more workers raised the rate, unless the cores were full before it."""
    required = f"higher rate at each step until the cores are {FULL_CPU} % busy"
    steps = sorted(rows, key=lambda row: row["workers"])
    shown = ", ".join(f"{row['workers']}: {row['images_per_second']:,.0f}" for row in steps)
    good = all(
        more["images_per_second"] > fewer["images_per_second"]
        or fewer["machine_cpu_percent"] >= FULL_CPU
        for fewer, more in pairwise(steps)
    )
    return Bar("more workers", required, shown or "-", good), len(steps) > 1

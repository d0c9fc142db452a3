import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.precisions import computes_in, describe_machine

ran: Counter[str] = Counter()  # tests of each precision that were not skipped
lacking: set[str] = set()  # precisions whose tests were


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a machine does not have cannot be tested on it, whatever else may not be skipped."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU that torch can use")
        return
    for marker in item.iter_markers("precision"):
        if not computes_in(marker.args[0]):
            lacking.add(marker.args[0])
            pytest.skip(f"this CPU does not compute in {marker.args[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" and not report.skipped:
        where = " on the GPU" if item.get_closest_marker("gpu") else ""
        ran.update(marker.args[0] + where for marker in item.iter_markers("precision"))
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """The last lines before pytest's own: numbers depend on what the CPU computes in."""
    yield
    terminalreporter.write_line(describe_machine())
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        terminalreporter.write_line(f"Of these only what ONEDNN_MAX_CPU_ISA={limit} allows is used")
    tested = [f"{name} ({count} tests)" for name, count in sorted(ran.items())]
    missing = [f"{name} (this CPU does not compute in it)" for name in sorted(lacking)]
    terminalreporter.write_line(f"Precisions tested: {', '.join(tested) or 'none'}")
    if missing:
        terminalreporter.write_line(f"Precisions skipped: {', '.join(missing)}")

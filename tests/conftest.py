import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.precisions import computes_in, describe_machine


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot compute in, even if nothing else may be skipped."""
    on_gpu = item.get_closest_marker("gpu") is not None
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU that torch can use")
    for marker in item.iter_markers("precision"):
        [name] = marker.args
        if not on_gpu and not computes_in(name):
            item.user_properties.append(("lacking", name))
            pytest.skip(f"this CPU does not compute in {name}")
        item.user_properties.append(("precision", f"{name} on the GPU" if on_gpu else name))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """The last lines before pytest's own: numbers depend on what the CPU computes in."""
    yield
    terminalreporter.write_line(describe_machine())
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        terminalreporter.write_line(f"Of these only what ONEDNN_MAX_CPU_ISA={limit} allows is used")
    ran = of_reports(terminalreporter, "precision", "passed", "failed")
    lacking = of_reports(terminalreporter, "lacking", "skipped")
    tested = [f"{name} ({count} tests)" for name, count in sorted(ran.items())]
    missing = [f"{name} (this CPU does not compute in it)" for name in sorted(lacking)]
    terminalreporter.write_line(f"Precisions tested: {', '.join(tested) or 'none'}")
    if missing:
        terminalreporter.write_line(f"Precisions skipped: {', '.join(missing)}")


def of_reports(
    terminalreporter: pytest.TerminalReporter, name: str, *outcomes: str
) -> Counter[str]:
    """Values of a property of tests; under pytest -n, reports alone come from other processes."""
    reports = [report for outcome in outcomes for report in terminalreporter.getreports(outcome)]
    return Counter(
        value for report in reports for key, value in report.user_properties if key == name
    )


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of ./scripts/serve for a model that knows three colours."""
    from tests.server.colours import make_weights  # imports torch, which takes seconds

    weights, labels = map(str, make_weights(tmp_path_factory.mktemp("colours")))
    return ["--weights", weights, "--labels", labels]


@pytest.fixture(scope="session")
def colours(colour_model: list[str]) -> list[str]:
    """The same with two workers on the CPU."""
    return [*colour_model, "--device", "cpu", "--workers", "2"]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, colours: list[str]) -> Iterator[Path]:
    """The archive of that model, which all servers share and none may change: it takes seconds."""
    from tests.server.serving import package

    folder = tmp_path_factory.mktemp("packaging")
    package(folder, *colours)
    (archive,) = (folder / "store").iterdir()
    content = archive.read_bytes()
    yield folder / "store"
    assert [path.name for path in (folder / "store").iterdir()] == [archive.name]
    assert archive.read_bytes() == content

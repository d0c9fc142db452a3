"""The report of a benchmark, from figures that are made up here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, report
from benchmarks.run import main as run_main
from benchmarks.subjects import all_subjects


def measurement(clients: int, rps: float, p50: float, **more: Any) -> dict[str, Any]:
    times = {"p50_ms": float(p50), "p95_ms": p50 * 2.0, "p99_ms": p50 * 3.0}
    counts = {"round": 1, "cached": 0, "failed": 0, "refused": 0, "failures": {}}
    cpu_ms = {"worker": 8.0, "Java: rest": 2.0}
    rates = {"throughput_rps": float(rps), "generator_cpu_percent": 12.0, "cpu_ms": cpu_ms}
    return {"concurrency": clients} | rates | times | counts | more


def subject(kind: str, *runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("precision", "failed", "accuracy"))
    lists: dict[str, Any] = {"memory": [], "failed_starts": [], "start_seconds": [], "pairs": []}
    return {"what": f"a {kind}", "kind": kind, "runs": list(runs)} | blank | lists | more


def pair(clients: int, rps: tuple[float, float], p50: tuple[float, float]) -> dict[str, Any]:
    """Loads with and without something."""
    sides = [
        {"throughput_rps": rate, "standard_error_rps": 0.01 * rate}
        | {"p50_ms": time, "cpu_ms": 10.0, "failed": 0}
        for rate, time in zip(rps, p50, strict=True)
    ]
    return {"round": 1, "clients": clients, "with": sides[0], "without": sides[1]}


def flood(times: int, rps: float, **more: Any) -> dict[str, Any]:
    """An overload of a server whose best rate is 200, from a generator that takes a core of two."""
    loads = {"times": times, "best_rps": 200.0, "best_generator_cpu_percent": 10.0}
    own = {"rate": 200.0 * times, "generator_cpu_percent": 105.0, "start_lag_p99_ms": 1.0}
    refusals = {"refused": 60, "refused_p50_ms": 3.0, "refused_p99_ms": 9.0}
    after = {"after_rps": [100.0] * 4 + [200.0] * 8, "after_failed": 0, "full_speed_seconds": 1.0}
    return measurement(0, rps, 500) | loads | own | refusals | after | more


@pytest.fixture
def data() -> dict[str, Any]:
    kinds = {"anonymous": 150.0, "torch": 50.0}
    processes = [
        {"process": "Java", "pss_mib": 300.0, "kinds_mib": {"anonymous": 300.0}},
        {"process": "worker", "pss_mib": 200.0, "kinds_mib": kinds},
        {"process": "launcher", "pss_mib": 25.0, "kinds_mib": {"other files": 25.0}},
    ]
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 4, "system": "Linux", "python": "3"}
    return {
        "conditions": {
            "started": "now",
            "finished": "then",
            "commit": "abc",
            "machine": machine,
            "versions": {"torch": "2"},
            "model": "mobilenet_v2",
            "weights": "w.pth",
            "recipe": None,
            "workers": 2,
            "images": 3,
            "image_bytes": 2048,
            "images_left_out": 1,
            "drawn": False,
            "concurrency": [1, 8],
            "seconds": 8,
            "rounds": 2,
            "seed": 0,
        },
        "subjects": {
            "ours-fp32": subject(
                "ours",
                measurement(1, 90, 11),
                measurement(8, 200, 40),
                measurement(8, 220, 44, round=2),
                precision="fp32",
                memory=[{"round": 1, "processes": processes}],
                accuracy={"images": 10, "right": 8, "as_reference": 9, "unanswered": 0},
                pairs=[pair(8, (97.0, 100.0), (40.0, 40.0))],
            ),
            "ours-gateway-fp32": subject(
                "gateway",
                measurement(1, 88, 11),
                measurement(8, 195, 41),
                precision="fp32",
                pairs=[
                    pair(1, (88.0, 90.0), (11.25, 11.0)),
                    pair(8, (98.0, 100.0), (41.0, 40.0)),
                    pair(8, (92.0, 100.0), (43.0, 40.0)),
                    pair(8, (96.0, 100.0), (42.0, 40.0)),
                ],
            ),
            "stock-omp1": subject("peer", measurement(1, 40, 25), measurement(8, 70, 110)),
            "quick-ours": subject(
                "peer",
                measurement(1, 100, 10, cpu_ms={"gunicorn": 8.0}),
                measurement(8, 180, 60, cpu_ms={"gunicorn": 8.0}),
                precision="fp32",
            ),
            "broken-eager": subject("peer", failed="set-up: no | such package"),
            "empty": subject("limit", measurement(1, 400, 2), measurement(8, 1000, 8)),
        },
        "reference": {"images": 10, "right": 9},
        "inprocess": {
            "fp32": {
                "failed": None,
                "runs": [
                    {"batch": 1, "processes": 1, "images_per_second": 130.0, "p50_ms": 8.0},
                    {"batch": 1, "processes": 2, "images_per_second": 230.0, "p50_ms": 8.5},
                    {"batch": 8, "processes": 2, "images_per_second": 250.0, "p50_ms": 60.0},
                ],
            }
        },
        "overload": {
            "ours-fp32": {
                "failed": None,
                "clients": 8,
                "runs": [flood(3, 100), flood(10, 90, full_speed_seconds=None, failed=2)],
            }
        },
    }


def row(text: str, heading: str, start: str) -> list[str]:
    """The cells of the table row under a heading that starts so."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    line = next(line for line in part.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| "))]


def test_report_has_medians_spreads_and_the_ratio(data: dict[str, Any]) -> None:
    cells = row(report.render(data), "Throughput", "**ours-fp32**")
    assert cells[1:4] == ["90.0", "210.0 (200.0–220.0)", "3.00"]


def test_report_names_every_loss(data: dict[str, Any]) -> None:
    text = report.render(data)
    losses = text.split("## Losses")[1].split("## The limits")[0]
    # one client: throughput, p50, p95, p99; CPU time with one and with 8
    assert "loses 6 of the comparisons" in losses
    assert row(text, "Losses", "quick-ours")[1:] == ["1", "throughput", "100.0", "90.0", "+11%"]
    assert "stock-omp1" not in losses


def test_report_has_the_limits(data: dict[str, Any]) -> None:
    text = report.render(data)
    # 1 / (1 / 250 + 1 / 1000) = 200, and 210 is 105 % of it
    assert row(text, "The limits", "ours-fp32")[1:] == ["250.0", "1000.0", "200.0", "210.0", "105%"]
    assert row(text, "One client", "ours-fp32")[1:] == ["8.0", "2.0", "10.0", "11.0", "+10%"]


def test_report_has_overload_accuracy_and_memory(data: dict[str, Any]) -> None:
    text = report.render(data)
    # of two cores, 190 % were left for the server with the best rate, and 95 % under overload
    assert row(text, "Overload", "ours-fp32, 3")[1:5] == ["600", "100.0", "50%", "100%"]
    after = text.split("The seconds after the overload")[1]
    assert "| ours-fp32, 3 times | 1.00 | 50% | 100% | 100% |" in after
    assert row(text, "Accuracy", "ours-fp32")[1:] == ["10", "8", "90.0%", "0"]
    assert row(text, "Memory", "ours-fp32")[1:] == ["525", "3"]
    assert row(text, "Memory", "worker")[1:] == ["200", "150", "50", "0", "0", "0"]


def test_report_has_cpu_time_and_costs(data: dict[str, Any]) -> None:
    text = report.render(data)
    assert row(text, "CPU time a request", "ours-fp32")[1:] == ["10.00", "10.00 (10.00–10.00)"]
    assert "| ours-fp32 | worker | 8.00 |" in text
    assert "| quick-ours | gunicorn" not in text  # by part is for TorchServe alone
    cells = row(text, "Gateway, metrics and logs", "the gateway | ours-gateway-fp32 | 8")
    # Of three rounds, in each of which both rates are known to 1 %: 1 x √2 / √3.
    assert cells[3:7] == ["4.0 (2.0–8.0)", "0.8", "0.0 (0.0–0.0)", "2.00 (1.00–3.00)"]


def verdicts(data: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Measured figure and verdict of every bar."""
    lines = [line for line in bars.bars(data) if line.startswith("| ours")]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return {what: (figure, verdict) for what, _, figure, verdict in cells}


def test_bars_are_met_or_missed(data: dict[str, Any]) -> None:
    assert verdicts(data) == {
        "ours-fp32, 1 client: p50 above the best peer's": (
            "1.00 ms (11.0 against 10.0, quick-ours)",
            "met",
        ),
        "ours-fp32, 1 client: CPU time a request, of the best peer's": (
            "1.25 times (10.00 against 8.00 ms, quick-ours)",
            "**missed**",
        ),
        "ours-fp32, 8 clients: rate, of the best peer's": (
            "1.17 times (210.0 against 180.0, quick-ours)",
            "met",
        ),
        "ours-fp32, 8 clients: p99, of that peer's": ("126.0 ms (quick-ours)", "met"),
        "ours-fp32, 1 client: rate, of stock-omp1's": (
            "2.25 times (90.0 against 40.0)",
            "**missed**",
        ),
        "ours-fp32, 8 clients: rate, of stock-omp1's": (
            "3.00 times (210.0 against 70.0)",
            "**missed**",
        ),
        "ours-fp32: top-1 below fp32's": ("10.0 points (80.0 against 90.0 %)", "**missed**"),
        "ours-fp32: PSS of Java and 2 workers": ("524 MB (500 MiB)", "met"),
        "ours-fp32, 3 times the best rate: answered, of the best rate": (
            "100 % (50 % without allowing for the load generator)",
            "met",
        ),
        "ours-fp32, 3 times the best rate: neither answered nor refused": ("0", "met"),
        "ours-fp32, 3 times the best rate: full speed again after": ("1.00 s", "met"),
        "ours-fp32, 10 times the best rate: answered, of the best rate": (
            "90 % (45 % without allowing for the load generator)",
            "**missed**",
        ),
        "ours-fp32, 10 times the best rate: neither answered nor refused": ("2", "**missed**"),
        "ours-fp32, 10 times the best rate: full speed again after": (
            "not within the time that was measured",
            "**missed**",
        ),
        "ours-gateway-fp32, 8 clients: rate that the gateway costs": ("4.0 %", "met"),
        "ours-gateway-fp32, 1 client: p50 that the gateway costs": ("0.25 ms", "met"),
        "ours-fp32, 8 clients: rate that metrics and logs cost": ("3.0 %", "**missed**"),
    }


def test_peers_in_another_precision_or_with_wrong_answers_are_not_compared(
    data: dict[str, Any],
) -> None:
    data["subjects"]["wrong-ours"] = subject(
        "peer", measurement(8, 900, 10, failed=1), precision="fp32"
    )
    assert "quick-ours" in str(verdicts(data))
    data["subjects"]["quick-ours"]["precision"] = "bf16"
    assert not any("best peer" in what for what in verdicts(data))
    assert "loses 0 of the comparisons" in report.render(data)


def test_bars_against_the_stock_handler_depend_on_model_and_precision(data: dict[str, Any]) -> None:
    name = "ours-fp32, 8 clients: rate, of stock-omp1's"
    data["conditions"]["model"] = "resnet50"
    assert verdicts(data)[name][1] == "met"  # 3 times
    data["subjects"]["ours-fp32"]["precision"] = "int8"
    assert verdicts(data)[name][1] == "**missed**"
    data["conditions"]["model"] = "another"
    assert name not in verdicts(data)


def test_report_names_what_failed(data: dict[str, Any]) -> None:
    data["subjects"]["stock-omp1"]["runs"][0] |= {"failed": 2, "failures": {"HTTP 500": 2}}
    data["subjects"]["quick-ours"]["failed_starts"] = ["ended with status 1"]
    text = report.render(data)
    assert row(text, "What failed", "a start of quick-ours")[1] == "ended with status 1"
    assert row(text, "What failed", "broken-eager")[1] == r"set-up: no \| such package"
    assert row(text, "What failed", "stock-omp1")[1] == "requests: 2 x HTTP 500"


def test_report_of_nothing(data: dict[str, Any]) -> None:
    """Interrupted before the first measurement."""
    data |= {"subjects": {}, "inprocess": {}, "overload": {}, "reference": None}
    assert report.render(data).count("Not measured.") >= 6


def test_report_is_drawn_again_from_its_json(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / report.JSON_FILE).write_text(json.dumps(data))
    assert run_main(["--from-json", "--out", str(tmp_path)]) == 0
    assert (tmp_path / report.MARKDOWN_FILE).read_text("utf-8") == report.render(data)
    for plot in (report.THROUGHPUT_PLOT, report.LATENCY_PLOT):
        assert (tmp_path / plot).stat().st_size < 200_000


def test_every_subject_has_a_name_of_its_own_and_its_requirements() -> None:
    subjects = all_subjects("tiny", {"fp32": [], "int8": []})
    assert len({s.name for s in subjects}) == len(subjects) == 18
    folder = Path(report.__file__).parent / "peers"
    for one in subjects:
        if one.environment:
            assert (folder / f"requirements-{one.environment}.txt").exists()


def test_the_subjects_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--list", "--precisions", "fp32"]) == 0
    names = capsys.readouterr().out.split()
    assert {
        "ours-fp32",
        "ours-gateway-fp32",
        "stock-omp1",
        "flask-eager",
        "flask-ours",
        "inprocess",
    } <= set(names)
    assert "ours-int8" not in names


def test_an_unknown_subject(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(["--precisions", "fp32", "--only", "flask-eager,falsk"])
    assert ended.value.code == 2
    assert "falsk" in capsys.readouterr().err

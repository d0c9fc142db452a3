"""The report of a benchmark, from figures that are made up here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.run import main as run_main
from benchmarks.subjects import all_subjects


def measurement(clients: int, rps: float, p50: float, **more: Any) -> dict[str, Any]:
    times = {"p50_ms": float(p50), "p95_ms": p50 * 2.0, "p99_ms": p50 * 3.0}
    counts = {"round": 1, "cached": 0, "failed": 0, "refused": 0, "failures": {}}
    rates = {"throughput_rps": float(rps), "generator_cpu_percent": 12.0}
    return {"concurrency": clients} | rates | times | counts | more


def subject(kind: str, *runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("precision", "failed", "accuracy"))
    lists: dict[str, Any] = {"memory": [], "failed_starts": [], "start_seconds": []}
    return {"what": f"a {kind}", "kind": kind, "runs": list(runs)} | blank | lists | more


@pytest.fixture
def data() -> dict[str, Any]:
    processes = [{"process": "java", "pss_mib": 300.0}, {"process": "python", "pss_mib": 200.0}]
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 4, "system": "Linux", "python": "3"}
    return {
        "conditions": {
            "started": "now",
            "finished": "then",
            "commit": "abc",
            "machine": machine,
            "versions": {"torch": "2"},
            "model": "tiny",
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
            ),
            "stock-omp1": subject("peer", measurement(1, 40, 25), measurement(8, 70, 110)),
            "quick-ours": subject("peer", measurement(1, 100, 10), measurement(8, 205, 60)),
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
                **measurement(0, 190, 500, rate=630.0, best_rps=210.0, requests=100, refused=60),
                **{"refused_p50_ms": 3.0, "refused_p99_ms": 9.0, "start_lag_p99_ms": 1.0},
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
    assert "loses 4 of the comparisons" in losses  # one client: throughput, p50, p95, p99
    assert row(text, "Losses", "quick-ours")[1:] == ["1", "throughput", "100.0", "90.0", "+11%"]
    assert "stock-omp1" not in losses


def test_report_has_the_limits(data: dict[str, Any]) -> None:
    text = report.render(data)
    # 1 / (1 / 250 + 1 / 1000) = 200, and 210 is 105 % of it
    assert row(text, "The limits", "ours-fp32")[1:] == ["250.0", "1000.0", "200.0", "210.0", "105%"]
    assert row(text, "One client", "ours-fp32")[1:] == ["8.0", "2.0", "10.0", "11.0", "+10%"]


def test_report_has_overload_accuracy_and_memory(data: dict[str, Any]) -> None:
    text = report.render(data)
    assert row(text, "Overload", "ours-fp32")[1:4] == ["630", "190.0", "90%"]
    assert row(text, "Accuracy", "ours-fp32")[1:] == ["10", "8", "90.0%", "0"]
    assert row(text, "Memory", "ours-fp32")[1:] == ["500", "2"]
    assert row(text, "Memory", "java")[1:] == ["300"]


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
    assert len({s.name for s in subjects}) == len(subjects) == 17
    folder = Path(report.__file__).parent / "peers"
    for one in subjects:
        if one.environment:
            assert (folder / f"requirements-{one.environment}.txt").exists()


def test_the_subjects_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--list", "--precisions", "fp32"]) == 0
    names = capsys.readouterr().out.split()
    assert {"ours-fp32", "stock-omp1", "flask-eager", "flask-ours", "inprocess"} <= set(names)
    assert "ours-int8" not in names


def test_an_unknown_subject(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(["--only", "flask-eager,falsk"])
    assert ended.value.code == 2
    assert "falsk" in capsys.readouterr().err

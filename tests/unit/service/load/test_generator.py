"""The load generator against a server of our own, and the report of figures made up here."""

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Coroutine
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web as aiohttp_web
from PIL import Image

from benchmarks import report
from benchmarks.images import load_rgb, read_labels
from benchmarks.run import main as run_main
from benchmarks.subjects import all_subjects
from service.load import generator as benchmark
from service.load.generator import (
    BOUNDARY,
    Expectations,
    Load,
    Measurement,
    Picture,
    Sample,
    as_form,
    draw_jpeg,
    due_times,
    load_pictures,
    measure,
    percentile,
    read_predictions,
    summarise,
    without_tensor_header,
)
from service.load.processes import memory, pss_bytes, running
from tests.processes import alive, wait_for

PICTURES = [Picture("a.jpg", b"a"), Picture("b.jpg", b"b")]
Respond = Callable[[bytes], Coroutine[Any, Any, aiohttp_web.Response]]


def answer(*classes: str, confidence: float = 0.9) -> dict[str, Any]:
    return {
        "predictions": [
            {"class": name, "confidence": confidence / 2**index}
            for index, name in enumerate(classes)
        ]
    }


def run(respond: Respond, load: Load, **options: Any) -> Measurement:
    """Measure a server that answers each body with `respond`."""

    async def both() -> Measurement:
        async def handle(request: aiohttp_web.Request) -> aiohttp_web.Response:
            return await respond(await request.read())

        app = aiohttp_web.Application()
        app.router.add_post("/", handle)
        runner = aiohttp_web.AppRunner(app)
        await runner.setup()
        site = aiohttp_web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await measure(f"http://127.0.0.1:{port}/", PICTURES, load, **options)
        finally:
            await runner.cleanup()

    return asyncio.run(both())


def good(body: bytes) -> aiohttp_web.Response:
    return aiohttp_web.json_response(answer(f"class {body.decode()}", "another"))


# --- figures ---


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0, 4.0], 50, 2.0),  # two of four do not exceed it
        ([3.0, 1.0, 2.0, 4.0], 51, 3.0),
        ([float(i) for i in range(1, 101)], 99, 99.0),
        ([float(i) for i in range(1, 101)], 100, 100.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentile_is_by_nearest_rank(
    values: list[float], percent: float, expected: float | None
) -> None:
    assert percentile(values, percent) == expected


def test_an_open_loop_is_due_evenly() -> None:
    assert list(due_times(10.0, 11.0, 4)) == [10.0, 10.25, 10.5, 10.75]


def test_only_what_was_due_in_the_measured_time_counts() -> None:
    samples = [
        Sample(0.5, 0.5, 1.2, "ok"),  # due in the warm-up, answered within
        Sample(1.0, 1.1, 1.5, "ok"),
        Sample(1.9, 1.9, 2.9, "ok"),  # answered late: its latency counts, throughput does not
        Sample(1.2, 1.2, 1.3, "refused"),
        Sample(1.2, 1.2, 1.4, "HTTP 500"),
        Sample(1.3, 1.3),
        Sample(2.0, 2.0, 2.1, "ok"),
    ]
    result = summarise(samples, 1.0, 2.0, Load(seconds=1, rate=5), cpu_percent=7)
    assert (result.requests, result.ok, result.refused, result.failed) == (5, 2, 1, 2)
    assert result.failures == {"HTTP 500": 1, "unanswered": 1}
    assert result.throughput_rps == 2
    assert result.p50_ms == pytest.approx(500)
    assert result.p99_ms == pytest.approx(1000)
    assert result.refused_p50_ms == pytest.approx(100)
    assert result.start_lag_p99_ms == pytest.approx(100)


# --- answers ---


@pytest.mark.parametrize(
    "document",
    [
        answer("cat", "dog", confidence=0.5),
        {"cat": 0.5, "dog": 0.25},
        [{"class": "cat", "confidence": 0.5}, {"class": "dog", "confidence": 0.25}],
        {"status": "success", "results": [answer("cat", "dog", confidence=0.5), answer("cow")]},
    ],
    ids=["ours", "stock", "list", "several"],
)
def test_answers_in_every_shape(document: Any) -> None:
    assert read_predictions(document) == [("cat", 0.5), ("dog", 0.25)]


@pytest.mark.parametrize(
    "document",
    [
        None,
        3,
        "cat",
        {"code": 503, "type": "x"},
        {"predictions": [{"class": "cat"}]},
        {"status": "partial", "results": [answer("cat"), {"status": "error", "code": 400}]},
    ],
)
def test_no_answer(document: Any) -> None:
    assert read_predictions(document) == []


def test_an_answer_in_the_binary_protocol_of_triton() -> None:
    header, text = b'{"outputs": []}', b'{"cat": 0.5}'
    content = header + len(text).to_bytes(4, "little") + text
    headers = {"Inference-Header-Content-Length": str(len(header))}
    assert without_tensor_header(content, headers) == text
    assert without_tensor_header(text, {}) == text


@pytest.mark.parametrize(
    ("predictions", "problem"),
    [
        ([("cat", 0.9), ("dog", 0.1)], None),
        ([("dog", 0.9), ("cat", 0.1)], "WrongClass"),
        ([("dog", 0.50), ("cat", 0.49)], None),  # a tie that rounding may turn
        ([("cat", 0.1), ("dog", 0.9)], "Unsorted"),
        ([("cat", 1.2)], "NoProbabilities"),
        ([("cat", math.nan)], "NoProbabilities"),
        ([], "NoPredictions"),
    ],
)
def test_checking_an_answer(predictions: list[tuple[str, float]], problem: str | None) -> None:
    assert Expectations({"a.jpg": "cat"}).problem("a.jpg", predictions) == problem


def test_the_first_answer_is_expected_again() -> None:
    expectations = Expectations()
    assert expectations.problem("a.jpg", [("cat", 0.9)]) is None
    assert expectations.problem("b.jpg", [("dog", 0.9)]) is None
    assert expectations.problem("a.jpg", [("dog", 0.9)]) == "WrongClass"


# --- the generator ---


def test_closed_loop() -> None:
    async def respond(body: bytes) -> aiohttp_web.Response:
        await asyncio.sleep(0.02)
        return good(body)

    result = run(respond, Load(concurrency=4, seconds=0.4, warmup_seconds=0.1))
    assert result.failed == result.refused == 0
    assert 20 <= result.ok <= 80  # 4 clients, 20 ms each: 80 at best
    assert result.p50_ms is not None
    assert result.p50_ms >= 20
    assert result.sent_bytes == result.requests
    assert result.received_bytes > 0
    assert 0 < result.generator_cpu_percent <= 150


def test_a_wrong_answer_counts_as_failed() -> None:
    asked = 0

    async def respond(body: bytes) -> aiohttp_web.Response:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.005)
        return good(b"another image") if asked % 4 == 0 else good(body)

    expectations = Expectations({"a.jpg": "class a", "b.jpg": "class b"})
    result = run(respond, Load(concurrency=1, seconds=0.3), expectations=expectations)
    assert result.ok > 0
    assert 0 < result.failed < result.ok
    assert set(result.failures) == {"WrongClass"}


def test_failures_by_kind_and_refusals_apart() -> None:
    asked = 0

    async def respond(body: bytes) -> aiohttp_web.Response:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.002)
        return [
            good(body),
            aiohttp_web.Response(status=503),
            aiohttp_web.Response(status=500),
            aiohttp_web.Response(text="<html>"),
            aiohttp_web.json_response({"predictions": []}),
        ][asked % 5]

    result = run(respond, Load(concurrency=1, seconds=0.3))
    assert result.ok > 0
    assert result.refused > 0
    assert result.refused_p50_ms is not None
    assert set(result.failures) == {"HTTP 500", "NoJSON", "NoPredictions"}
    assert result.failed == sum(result.failures.values())


def test_an_open_loop_does_not_hide_a_stall() -> None:
    """The server stands still for 0.3 s once; whoever was due meanwhile has waited."""
    stalled = False

    async def respond(body: bytes) -> aiohttp_web.Response:
        nonlocal stalled
        if not stalled:
            stalled = True
            time.sleep(0.3)  # the whole loop, client included
        return good(body)

    result = run(respond, Load(rate=100, seconds=0.6))
    assert result.requests == 60
    assert result.failed == 0
    assert result.p99_ms is not None
    assert result.p99_ms >= 250
    assert result.p50_ms is not None
    assert result.p50_ms < result.p99_ms
    # Half of the requests were due during the stall: a closed loop would have seen one slow one.
    assert result.mean_ms is not None
    assert result.mean_ms > 30
    assert result.start_lag_p99_ms is not None
    assert result.start_lag_p99_ms > 100  # and the generator says that it was late itself


def test_nobody_listens(closed_port: int) -> None:
    load = Load(concurrency=1, seconds=0.1)
    result = asyncio.run(measure(f"http://127.0.0.1:{closed_port}/", PICTURES, load))
    assert result.ok == 0
    assert result.failures.keys() == {"ClientConnectorError"}
    assert result.p50_ms is None


def test_a_server_that_says_nothing_is_given_up(silent_port: int) -> None:
    load = Load(concurrency=1, seconds=0.1)
    url = f"http://127.0.0.1:{silent_port}/"
    result = asyncio.run(measure(url, PICTURES, load, timeout_seconds=0.3))
    assert result.failed == 1
    assert result.ok == 0


# --- images ---


def test_drawn_images_are_photographs_in_size_and_always_the_same() -> None:
    data = draw_jpeg(3)
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert 480 <= image.width <= 520
    assert 20_000 < len(data) < 200_000
    assert draw_jpeg(3) == data != draw_jpeg(4)


def test_images_of_a_folder(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "b.JPG", "JPEG")
    Image.new("L", (8, 8)).save(tmp_path / "a.jpeg", "JPEG")
    (tmp_path / "labels.csv").write_text("file,class_id,label\nb.JPG,3,shark\n")
    assert [picture.name for picture in load_pictures(tmp_path)] == ["a.jpeg", "b.JPG"]
    assert [picture.name for picture in load_rgb(tmp_path)] == ["b.JPG"]
    assert read_labels(tmp_path) == {"b.JPG": "shark"}
    assert read_labels(None) == {}


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--images", str(tmp_path)]) == 2
    assert "has no .jpg" in capsys.readouterr().err


def test_multipart() -> None:
    picture = as_form(Picture("a.jpg", b"data"), "multipart", "request")
    assert picture.content_type == f"multipart/form-data; boundary={BOUNDARY}"
    assert b'name="request"' in picture.body
    assert picture.body.count(BOUNDARY.encode()) == 2
    assert b"\r\n\r\ndata\r\n--" in picture.body


def test_the_command_ends_with_one_json_line(
    closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    plot = tmp_path / "plot.png"
    times = ["--seconds", "0.1", "--warmup-seconds", "0.05"]
    status = benchmark.main(
        ["--url", url, "--concurrency", "2", "--rate", "20", *times, "--plot", str(plot)]
    )
    assert status == 1  # nothing was answered
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["url"] == f"{url}/predictions/mobilenet_v2"
    assert [m["concurrency"] for m in last["measurements"]] == [2, 0]
    assert last["machine"]["cores"] >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


# --- processes ---


def test_reading_proportional_set_size() -> None:
    text = "5581-7fff ---p 0 00:00 0 [rollup]\nRss:    4000 kB\nPss:    1536 kB\nPss_Anon: 1 kB\n"
    assert pss_bytes(text) == 1536 * 1024
    with pytest.raises(ValueError, match="no Pss"):
        pss_bytes("Rss: 4000 kB\n")


CHILD = "import time; print('up', flush=True); time.sleep(60)"
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
{CHILD}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_ends_with_its_daemons(tmp_path: Path) -> None:
    with running([sys.executable, "-c", PARENT], {}, tmp_path) as server:
        wait_for(lambda: server.log.read_text().count("up") == 2, 10)
        family = server.family()
        sizes = memory(server)
    assert len(family) == len(sizes) == 2
    assert all(1 < float(str(row["pss_mib"])) < 100 for row in sizes)
    assert not alive(family)


def test_what_a_failed_server_said(tmp_path: Path) -> None:
    code = "print('starting'); raise SystemError('no such thing')"
    with running([sys.executable, "-c", code], {}, tmp_path) as server:
        server.process.wait(10)
        assert server.has_ended()
        assert server.last_lines() == "SystemError: no such thing"


# --- the report ---


def measurement(clients: int, rps: float, p50: float, **more: Any) -> dict[str, Any]:
    figures = {"p95_ms": p50 * 2, "p99_ms": p50 * 3, "failed": 0, "refused": 0, "failures": {}}
    figures |= {"generator_cpu_percent": 12.0, "round": 1, "cached": 0}
    return figures | {"concurrency": clients, "throughput_rps": rps, "p50_ms": p50} | more


def subject(kind: str, *runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {
        "what": f"a {kind}",
        "kind": kind,
        "precision": None,
        "failed": None,
        "memory": [],
    }
    return (
        blank
        | {"failed_starts": [], "start_seconds": [], "runs": list(runs), "accuracy": None}
        | more
    )


@pytest.fixture
def data() -> dict[str, Any]:
    processes = [{"process": "java", "pss_mib": 300.0}, {"process": "python", "pss_mib": 200.0}]
    return {
        "conditions": {
            "started": "now",
            "finished": "then",
            "commit": "abc",
            "machine": {
                "cpu": "a CPU",
                "cores": 2,
                "memory_gib": 4,
                "system": "Linux",
                "python": "3",
            },
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
                    {"batch": 1, "processes": 1, "images_per_second": 130, "p50_ms": 8.0},
                    {"batch": 1, "processes": 2, "images_per_second": 230, "p50_ms": 8.5},
                    {"batch": 8, "processes": 2, "images_per_second": 250, "p50_ms": 60.0},
                ],
            }
        },
        "overload": {
            "ours-fp32": {
                **measurement(0, 190, 500, rate=630, best_rps=210, requests=100, refused=60),
                **{"refused_p50_ms": 3.0, "refused_p99_ms": 9.0, "start_lag_p99_ms": 1.0},
            }
        },
    }


def row(text: str, heading: str, start: str) -> list[str]:
    """The cells of the table row under a heading that starts so."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    line = next(line for line in part.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("| ").split("|")]


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
    assert row(text, "What failed", "broken-eager")[1] == "set-up: no / such package"
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

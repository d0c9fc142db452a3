"""./scripts/scale in front of a server of every mood, and what it reads there."""

import json

import pytest

from scripts.scale import main
from service.scaling import memory, scaling
from service.scaling.memory import MemoryHeadroom
from service.scaling.model import Counters, parse_counters
from tests.unit.conftest import Web
from tests.unit.service.scaling.conftest import JSON, Server

PAGE = """\
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="birds",model_version="default",hostname="h",} 7.0
ts_inference_requests_total{model_name="birds",model_version="1.0",hostname="h",} 2.0
ts_inference_requests_total{model_name="birds",model_version="2.0",hostname="h",} 100.0
ts_inference_requests_total{model_name="fish",model_version="default",hostname="h",} 100.0
ts_queue_latency_microseconds{model_name="birds",model_version="default",hostname="h",} 1.5E7
ts_inference_latency_microseconds{model_name="birds",model_version="default",hostname="h",} 2.5E7
classifier_requests_total{model="birds",version="1.0",status="200",Hostname="h",} 8.0
classifier_requests_total{model="birds",version="1.0",status="400",Hostname="h",} 1.0
classifier_requests_total{model="birds",version="2.0",status="200",Hostname="h",} 50.0
classifier_probes_total{model="birds",version="1.0",status="200",Hostname="h",} 3.0
classifier_worker_busy_seconds_total{model="birds",version="1.0",worker="0",Hostname="h",} 4.5
classifier_worker_busy_seconds_total{model="birds",version="1.0",worker="1",Hostname="h",} 3.5
classifier_stage_seconds_sum{model="birds",version="1.0",stage="inference",Hostname="h",} 5.0
classifier_stage_seconds_sum{model="birds",version="1.0",stage="total",Hostname="h",} 20.0
classifier_stage_seconds_count{model="birds",version="1.0",stage="total",Hostname="h",} 9.0
"""


@pytest.mark.parametrize(
    ("model", "versions", "counters"),
    [
        ("birds", {"default", "1.0"}, Counters(9, 1.5e7, 2.5e7, 8, 12, 20, 9)),
        ("birds", {"2.0"}, Counters(100, 0, 0, handled=50)),
        ("bird", {"default"}, Counters(0, 0, 0)),
    ],
)
def test_counters_of_the_metrics_page(model: str, versions: set[str], counters: Counters) -> None:
    assert parse_counters(PAGE, model, versions) == counters


def run(web: Web, *argv: str) -> int:
    return main(["birds", *argv, "--management", web.url, "--metrics", f"{web.url}/"])


def test_scaling_up(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.web, "3") == 0
    assert server.sizes == [3]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "worker  pid         device  memory  state",
        "9000    1073741824  cpu     -       READY",
        "note: memory is not checked: no worker of the model runs on this machine",
    ]
    assert lines[3].startswith("3 of 3 workers READY after ")
    assert [line.split()[0] for line in lines[4:]] == ["worker", "9000", "9001", "9002"]


@pytest.mark.parametrize("coming", [0, 1])
def test_scaling_down(server: Server, capsys: pytest.CaptureFixture[str], coming: int) -> None:
    """At a quiet moment if there is one."""
    server.workers, server.coming = 3, coming
    assert run(server.web, "1") == 0
    assert server.sizes == [1]
    done = capsys.readouterr()
    assert ("note: in 0.2 s the model was never without requests" in done.out) == (coming > 0)
    assert ("are answered with 500" in done.err) == (coming > 0)


def test_auto_is_what_serve_takes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "workers_for", lambda gpus: 5 + gpus)
    monkeypatch.setattr("service.torchserve.config.count_gpus", lambda: 2)
    monkeypatch.setattr(memory, "open_nvml", lambda: None)
    assert run(server.web, "auto") == 0
    server.gpu_usage = "gpuId::1 utilization.gpu [%]::0 %"
    assert run(server.web, "auto") == 0
    assert server.sizes == [5, 7]


@pytest.mark.parametrize("force", [False, True])
def test_memory_that_does_not_suffice(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], force: bool
) -> None:
    headroom = MemoryHeadroom("memory", 400 * 2**20, 1000 * 2**20)
    monkeypatch.setattr(scaling, "headroom_of", lambda state: [headroom])
    assert run(server.web, "4", *(["--force"] if force else [])) == (0 if force else 1)
    assert server.sizes == ([4] if force else [])
    message = "3 more do not fit, 2 do (memory: a worker takes 400 MiB, 1000 MiB free)"
    assert message in capsys.readouterr().err
    assert run(server.web, "3" if not force else "4") == 0


def test_workers_that_do_not_come(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.ready = 1
    assert run(server.web, "2", "--timeout", "1") == 1
    done = capsys.readouterr()
    assert done.err.startswith("error: 1 of 2 workers are READY after 1 s; the cause is in")
    assert "UNLOADING" in done.out


@pytest.mark.parametrize("argv", [["2"], ["--watch"]])
def test_an_unknown_model(web: Web, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    """The server says which there are, if it can."""
    assert run(web, *argv) == 2
    assert capsys.readouterr().err == f"error: {web.url} has no model birds\n"
    for names, words in ((["fish", "owls"], "fish, owls"), ([], "none")):
        models = {"models": [{"modelName": name} for name in names]}
        web.answers["/models"] = web.text(json.dumps(models), content_type=JSON)
        assert run(web, *argv) == 2
        assert capsys.readouterr().err == f"error: {web.url} has no model birds; it has {words}\n"


def test_an_unknown_version(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    web.answers["/models"] = web.text('{"models": [{"modelName": "birds"}]}', content_type=JSON)
    web.answers["/models/birds/all"] = web.text('[{"modelVersion": "1.0"}]', content_type=JSON)
    assert run(web, "2", "--version", "2.0") == 2
    message = f"error: {web.url} has no model birds/2.0; it has birds/1.0\n"
    assert capsys.readouterr().err == message


def test_nobody_answers(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{closed_port}"
    assert main(["birds", "2", "--management", address]) == 2
    message = f"error: {address} does not answer: is ./scripts/serve running?\n"
    assert capsys.readouterr().err == message


def test_somebody_else_answers(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    web.answers["/models/birds"] = Web.text("<html>")
    assert run(web, "2") == 2
    message = f"error: {web.url} does not answer: InvalidJSONError\n"
    assert capsys.readouterr().err == message


def test_what_the_server_says_against_it(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Web.text('{\n  "message": "no"\n}', 400, JSON)
    server.web.answers["/models/birds?min_worker=2&max_worker=2"] = refusal
    assert run(server.web, "2") == 2
    assert capsys.readouterr().err == 'error: HTTP 400 of the server: { "message": "no" }\n'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["birds", "many"], "argument N|auto: must be 1 to 1024, got 'many'"),
        (["birds"], "give either a number of workers (or auto), or --watch"),
        (["birds", "2", "--watch"], "give either a number of workers (or auto), or --watch"),
        (["birds", "--watch", "--minimum", "9"], "--minimum is 9, more than --maximum, 8"),
        (["birds", "--watch", "--interval", "0"], "--interval: must be 1 to 86400, got '0'"),
        (["birds", "2", "--management", "x"], "--management must be http://HOST:PORT, got 'x'"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{message}; see ./scripts/scale --help")

"""The health check against a management port that says all kinds of things."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from scripts.healthcheck import main
from tests.unit.conftest import Web
from tests.unit.service.described import described

JSON = "application/json"


def serve(web: Web, **models: Any) -> None:
    listed = {"models": [{"modelName": name, "modelUrl": f"{name}.mar"} for name in models]}
    web.answers["/models"] = web.text(json.dumps(listed), content_type=JSON)
    for name, facts in models.items():
        answer = web.text(json.dumps(facts), content_type=JSON)
        web.answers[f"/models/{name}"] = web.answers[f"/models/{name}/all"] = answer
        web.answers[f"/predictions/{name}"] = web.text("{}", content_type=JSON)


def check(web: Web, *models: str) -> int:
    return main(["--management", web.url, "--predictions", web.url, *models])


def test_all_workers_ready(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    serve(web, birds=described("READY", "READY"))
    assert check(web) == 0
    assert capsys.readouterr().out == "birds: 2 of 2 workers READY\n"


@pytest.mark.parametrize("workers", [[], ["READY"], ["READY", "UNLOADING"]], ids=" ".join)
def test_not_all_workers_ready(
    web: Web, workers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(web, birds=described(*workers))
    assert check(web) == 1
    assert f"birds: {workers.count('READY')} of 2 workers READY" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (500, ", predictions of birds fail with status 500"),
        (507, ", predictions of birds fail with status 507"),
        (503, ""),  # a full queue: who refuses is alive
    ],
)
def test_ready_workers_whose_predictions_fail(
    web: Web, capsys: pytest.CaptureFixture[str], status: int, words: str
) -> None:
    serve(web, birds=described("READY", "READY"))
    web.answers["/predictions/birds"] = web.text("{}", status, JSON)
    assert check(web) == bool(words)
    assert capsys.readouterr().out == f"birds: 2 of 2 workers READY{words}\n"


def test_ready_workers_that_do_not_answer(
    web: Web,
    silent_port: int,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("service.health.TIMEOUT_SECONDS", 0.5)
    serve(web, birds=described("READY", "READY"))
    for port, words in (
        (silent_port, "no prediction of birds within 0.5 s"),
        (closed_port, "does not answer"),
    ):
        url = f"http://127.0.0.1:{port}"
        assert main(["--management", web.url, "--predictions", url]) == 1
        assert capsys.readouterr().out == f"birds: 2 of 2 workers READY, {words}\n"


def test_more_or_fewer_workers_than_expected(web: Web) -> None:
    """As while scaling down; scaled to 0 there are as many as expected, and nobody to answer."""
    serve(web, birds=described("READY", "READY", "UNLOADING", expected=1))
    assert check(web) == 0
    serve(web, birds=described(expected=0))
    assert check(web) == 1


def test_every_model_counts(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    serve(web, birds=described("READY", "READY"), fish=described("READY"))
    assert check(web) == 1
    assert capsys.readouterr().out.splitlines() == [
        "birds: 2 of 2 workers READY",
        "fish: 1 of 2 workers READY",
    ]


def test_every_version_counts(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    """TorchServe lists versions in no order, and describes the default one to who names none."""
    first, second = described("READY", expected=1)[0], described(expected=0)[0]
    serve(web, birds=[second | {"modelVersion": "2.0"}, first])
    for version, facts in (("1.0", first), ("2.0", second)):
        path = f"birds/{version}"
        web.answers[f"/models/{path}"] = web.text(json.dumps([facts]), content_type=JSON)
        web.answers[f"/predictions/{path}"] = web.text("{}", content_type=JSON)
    assert check(web) == 1
    lines = ["birds/1.0: 1 of 1 workers READY", "birds/2.0: 0 of 0 workers READY"]
    assert capsys.readouterr().out.splitlines() == lines
    assert [check(web, "birds/1.0"), check(web, "birds/2.0")] == [0, 1]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_model_that_is_unregistered_meanwhile(web: Web) -> None:
    serve(web, birds=described("READY", "READY"), fish=described("READY"))
    del web.answers["/models/fish/all"]
    assert check(web) == 0


def test_only_the_models_named_count(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    serve(web, birds=described("READY", "READY"), fish=described("READY"))
    assert check(web, "birds") == 0
    assert "/models" not in web.asked
    assert check(web, "birds", "owls") == 1
    assert "owls: not registered" in capsys.readouterr().out


def test_no_model_at_all(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    """TorchServe's own /ping says Healthy here."""
    serve(web)
    assert check(web) == 1
    assert capsys.readouterr().out == "no model is registered\n"


def test_models_on_several_pages(web: Web) -> None:
    serve(web, birds=described("READY", "READY"), fish=described("READY"))
    first = {"nextPageToken": "1", "models": [{"modelName": "birds"}]}
    web.answers["/models"] = web.text(json.dumps(first), content_type=JSON)
    second = {"models": [{"modelName": "fish"}]}
    web.answers["/models?next_page_token=1"] = web.text(json.dumps(second), content_type=JSON)
    assert check(web) == 1
    assert "/models/fish/all" in web.asked


def test_nobody_answers(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{closed_port}"
    assert main(["--management", address]) == 1
    assert capsys.readouterr().out == f"{address} does not answer: is ./scripts/serve running?\n"


@pytest.mark.parametrize("models", [[], ["birds"]], ids=["all", "named"])
@pytest.mark.parametrize(
    "answer",
    [Web.text("broken", 500), Web.text("<html></html>"), Web.raw(b"SSH-2.0\r\n"), Web.raw(b"")],
    ids=["500", "no JSON", "no HTTP", "nothing"],
)
def test_somebody_else_answers(
    web: Web,
    models: list[str],
    answer: Callable[[BaseHTTPRequestHandler], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    web.answers["/models"] = web.answers["/models/birds"] = answer
    assert check(web, *models) == 1
    assert f"{web.url} does not answer: " in capsys.readouterr().out


@pytest.mark.parametrize(("status", "exit_status"), [(200, 0), (503, 1)])
def test_the_gateway_is_asked_where_its_variables_say(
    web: Web,
    status: int,
    exit_status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    web.answers["/health"] = web.text('{"status": "what it says"}\n', status)
    monkeypatch.setenv("GATEWAY_PORT", web.url.rpartition(":")[2])
    assert main(["--gateway"]) == exit_status
    assert capsys.readouterr().out == '{"status": "what it says"}\n'


def test_a_gateway_that_does_not_answer(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATEWAY_PORT", str(closed_port))
    assert main(["--gateway"]) == 1
    message = f":{closed_port}/health does not answer: is ./scripts/gateway running?\n"
    assert capsys.readouterr().out.endswith(message)
    monkeypatch.setenv("GATEWAY_PORT", "0")
    assert main(["--gateway"]) == 1
    assert "GATEWAY_PORT must be 1 to 65535" in capsys.readouterr().out

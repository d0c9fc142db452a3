"""What Prometheus sees of the service under load, held against what its clients saw."""

import json
import math
import os
import re
import signal
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import pytest
import requests
import yaml

from handler.metrics import FAMILIES, OUTCOMES, STAGE, STAGES, STATUSES
from service.chaos.prometheus import MONITORING
from tests import ROOT
from tests.drawing import encode, noise
from tests.load import Load
from tests.monitoring.conftest import Prometheus
from tests.monitoring.test_rules import ALERTS, DASHBOARD, PANELS
from tests.server.colours import LABELS, encoded
from tests.server.serving import Server

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BOUNDS = FAMILIES[STAGE].bounds
CLIENTS = 2
BODY = encode(noise((1600, 1200)), "JPEG")  # large: the work outweighs the way there
LOAD_SECONDS = 30

# Named in rules and panels, and not on the page of a machine without a GPU.
GPU_METRICS = {
    "classifier_gpu_utilization_ratio",
    "classifier_gpu_memory_used_bytes",
    "classifier_gpu_memory_total_bytes",
}


DRIFT_METRICS = {name for name in FAMILIES if name.startswith("classifier_drift_")}
ABSENT = GPU_METRICS | DRIFT_METRICS  # the archive is packaged without --calibrate


@pytest.fixture(scope="module")
def load(service: Server, prometheus: Prometheus) -> Load:
    """Some seconds of load, all of it scraped."""
    with Load(service.predictions, BODY, CLIENTS) as load:
        time.sleep(LOAD_SECONDS)
    # One of each kind that rules and panels ask for. The last is TorchServe's own 500.
    for label in LABELS:
        requests.post(service.predictions, data=encoded(label), timeout=30)
    assert requests.post(service.predictions, data=b"no image", timeout=30).status_code == 400
    files = {"file1": encoded("red", "PNG"), "file2": b"%PDF-"}
    assert requests.post(service.predictions, files=files, timeout=30).status_code == 200
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(3):
        broken = requests.post(service.predictions, data=b"%zz=%", headers=form, timeout=30)
        assert broken.status_code == 500
        time.sleep(1.2)
    prometheus.wait_for_counts()
    return load


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[math.ceil(q * len(values)) - 1]


def bucket(seconds: float) -> int:
    return bisect_left(BOUNDS, seconds)


def names(expr: str) -> set[str]:
    """The metrics that an expression names."""
    bare = re.sub(
        r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|\b(by|on|without|group_left) *\([^)]*\)", "", expr
    )
    words = set(re.findall(r"(?<![\w:])[a-zA-Z_:][\w:]*(?! *\()(?![\w:])", bare))
    return words - {"and", "or", "unless", "by", "on", "group_left", "time", "vector", "sum"}


def absent_metrics() -> set[str]:
    """Those of the gateway, which does not run here, of drift, and what rules make of them."""
    code = [path.read_text() for path in (ROOT / "deploy" / "gateway").glob("*.lua")]
    found = set(re.findall(r"# TYPE (gateway_\w+)", "\n".join(code))) | DRIFT_METRICS
    for name, expr in expressions():
        if names(expr) & found:
            found.add(name)
    return found


def exists(prometheus: Prometheus) -> set[str]:
    return set(prometheus.ask("label/__name__/values"))


def test_every_documented_metric_is_scraped(prometheus: Prometheus, load: Load) -> None:
    families = {name: family for name, family in FAMILIES.items() if name not in ABSENT}
    series = {series for name, family in families.items() for series in family.series(name)}
    assert series <= exists(prometheus)
    metadata = prometheus.ask("metadata")
    for name, family in families.items():
        for series_name, (kind, labels) in family.series(name).items():
            [about] = metadata[series_name]
            assert about["type"] == kind
            assert about["help"].endswith(family.help)
            for found, _ in prometheus.query(series_name):
                assert set(labels) <= set(found), series_name


def test_series_that_matter_are_there_at_0(prometheus: Prometheus, load: Load) -> None:
    for name, label, values in (
        ("classifier_requests_total", "status", STATUSES),
        ("classifier_images_total", "outcome", OUTCOMES),
        ("classifier_stage_seconds_count", "stage", STAGES),
    ):
        assert set(values) <= {labels[label] for labels, _ in prometheus.query(name)}
    assert prometheus.value('classifier_requests_total{status="413"}') == 0


def test_counts_are_those_of_the_clients(prometheus: Prometheus, load: Load) -> None:
    assert load.failures == []
    assert prometheus.value('classifier_requests_total{status="200"}') == load.total + 4
    assert prometheus.value('classifier_requests_total{status="400"}') == 1
    assert prometheus.value('classifier_images_total{outcome="success"}') == load.total + 4
    for error in ("UnreadableImage", "UnsupportedFormat"):
        assert prometheus.value(f'classifier_images_total{{outcome="{error}"}}') == 1
    assert prometheus.value('classifier_stage_seconds_count{stage="queue"}') == load.total
    assert prometheus.value("sum(ts_inference_requests_total)") >= load.total + 5
    assert prometheus.value("Requests5XX") == 3


def test_rates_are_those_of_the_clients(prometheus: Prometheus, load: Load) -> None:
    """Over the seconds in which all of them asked; a worker's counts come in steps of 5 s."""
    ends = [answer.end for answer in load.answers]
    seconds = 20
    until = max(ends)
    seen = sum(until - seconds - 3 < end <= until - 3 for end in ends) / seconds
    expr = f'sum(rate(classifier_requests_total{{status="200"}}[{seconds}s]))'
    found = prometheus.ask("query", query=expr, time=until)["result"]
    assert float(found[0]["value"][1]) == pytest.approx(seen, rel=0.35)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.99])
def test_percentiles_are_those_of_the_log(
    service: Server, prometheus: Prometheus, load: Load, q: float
) -> None:
    """In the same bucket: the histogram holds exactly what was logged."""
    logged = [
        ((line["queue_ms"] or 0) + line["total_ms"]) / 1000 for line in service.log("request")
    ]
    expr = f'histogram_quantile({q}, sum by (le) ({STAGE}_bucket{{stage="response"}}))'
    assert len(logged) == load.total + 5
    assert bucket(prometheus.value(expr)) == bucket(quantile(logged, q))


@pytest.mark.parametrize("percent", [50, 95])
def test_percentiles_are_those_of_the_clients(
    prometheus: Prometheus, load: Load, percent: int
) -> None:
    """Within a bucket's width of what they measured, by the rule that the dashboard shows."""
    seen = quantile([answer.seconds for answer in load.answers], percent / 100)
    found = prometheus.value(f'classifier:stage_seconds:p{percent}{{stage="response"}}')
    assert abs(bucket(found) - bucket(seen)) <= 1, (found, seen)


def test_a_request_can_be_followed(service: Server, load: Load) -> None:
    """By the id in its answer and header, and by the client's trace."""
    response = requests.post(
        service.predictions,
        files={"file": encoded("blue")},
        headers={"traceparent": TRACE, "Authorization": "Bearer secret-key"},
        timeout=30,
    )
    request_id = response.headers["x-request-id"]
    assert response.json()["metadata"]["request_id"] == request_id
    line = service.request_line(request_id)
    seen = {"traceparent": TRACE, "model": "mobilenet_v2", "status": 200, "top_class": "blue"}
    assert line == line | seen
    stages = line["preprocess_ms"], line["inference_ms"], line["postprocess_ms"]
    assert line["total_ms"] >= max(stages) >= min(stages) > 0
    assert "secret-key" not in service.text()


def test_every_line_of_the_log_is_json(service: Server, load: Load) -> None:
    """TorchServe's, Java's and the launcher's as well; none but ours and warnings is written."""
    seen = Counter[str]()
    for line in service.text().splitlines():
        facts = json.loads(line)
        assert {"time", "level", "event"} <= set(facts)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", facts["time"])
        assert facts["level"] in ("INFO", "WARNING", "ERROR")
        seen[facts["event"]] += 1
    assert set(seen) <= {"java", "torchserve", "model_ready", "ready", "request"}
    assert (seen["ready"], seen["model_ready"]) == (1, 2)
    assert seen["java"] >= 1
    assert seen["request"] >= load.total


def test_rules_are_evaluated_without_errors(prometheus: Prometheus, load: Load) -> None:
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert sum(rule["type"] == "alerting" for rule in rules) == len(ALERTS)


def expressions() -> Iterator[tuple[str, str]]:
    """Where each is, and the expression, of every rule and panel."""
    for file in ("rules.yml", "alerts.yml"):
        for group in yaml.safe_load((MONITORING / file).read_text())["groups"]:
            for rule in group["rules"]:
                yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_every_metric_that_is_named_exists(prometheus: Prometheus, load: Load) -> None:
    known = exists(prometheus) | {"ALERTS"}
    named = {name: place for place, expr in expressions() for name in names(expr)}
    assert set(named) >= GPU_METRICS
    assert len(named) > 25
    elsewhere = GPU_METRICS | absent_metrics()
    missing = {name: place for name, place in named.items() if name not in known | elsewhere}
    assert not missing


def test_every_panel_shows_something(prometheus: Prometheus, load: Load) -> None:
    variables = {"job": "classifier", "model": ".*", "version": ".*", "__rate_interval": "1m"}

    def filled(expr: str) -> str:
        return re.sub(r"\$(\w+)", lambda match: variables[match[1]], expr)

    empty = {
        panel["title"]
        for panel in PANELS
        for target in panel.get("targets", [])
        if not prometheus.query(filled(target["expr"]))
    }
    feedback = {"Accuracy by feedback", "Classes that are most often wrong"}  # nor a gateway
    drift = {"Drift", "Images by bin"}  # nor --calibrate
    assert empty == {"GPU in use", "GPU memory in use"} | feedback | drift  # there is none
    for annotation in DASHBOARD["annotations"]["list"]:
        prometheus.query(filled(annotation["expr"]))
    for variable in DASHBOARD["templating"]["list"][1:]:
        selector, label = re.fullmatch(
            r"label_values\((.+), (\w+)\)", variable["definition"]
        ).groups()  # type: ignore[union-attr]
        assert {labels[label] for labels, _ in prometheus.query(filled(selector))}


def test_counters_survive_a_killed_worker(
    service: Server, prometheus: Prometheus, load: Load
) -> None:
    """At most its last five seconds are lost; nothing is counted twice, falls, or is renamed."""
    before = prometheus.value('classifier_requests_total{status="200"}')
    starts = prometheus.value("sum(classifier_worker_starts_total)")
    logged_before = len(service.log("request"))
    victim = min(service.worker_pids())
    with Load(service.predictions, BODY, CLIENTS) as more:
        time.sleep(10)
        os.kill(victim, signal.SIGKILL)
        time.sleep(4)
    prometheus.wait(f"sum(classifier_worker_starts_total) == {starts + 1}", 60)
    prometheus.wait("classifier:workers:fresh == 2", 60)
    prometheus.wait_for_counts()
    after = prometheus.value('classifier_requests_total{status="200"}')
    good = [answer for answer in more.answers if answer.status == 200]
    assert set(more.statuses) <= {0, 200, 500, 507}  # 500 closes the connection
    logged = [line for line in service.log("request")[logged_before:] if line["status"] == 200]
    killed = max(
        (answer.end for answer in more.answers if answer.status != 200),
        default=more.answers[len(more.answers) // 2].end,
    )
    at_risk = sum(killed - 7 < answer.end < killed + 1 for answer in good)
    unlogged = sum(killed - 2 < answer.end < killed + 1 for answer in good)
    assert len(good) - unlogged <= len(logged)
    assert 0 < len(good) - at_risk <= after - before <= len(logged)
    for name, family in FAMILIES.items():
        for series, (kind, _) in family.series(name).items():
            if kind == "counter" and name not in ABSENT:
                assert prometheus.value(f"max(resets({series}[10m]))") == 0, series
    rates = "min_over_time(sum(rate(classifier_requests_total[20s]))[10m:1s])"
    assert prometheus.value(rates) >= 0
    most = prometheus.value(rates.replace("min_", "max_"))
    assert most <= 3 * max(1, len(load.answers) / LOAD_SECONDS), "no spike"
    workers = {labels["worker"] for labels, _ in prometheus.query("classifier_worker_starts_total")}
    assert workers == {"0", "1"}


def test_a_worker_that_was_scaled_away_is_not_fresh(
    service: Server, prometheus: Prometheus, load: Load
) -> None:
    """Its gauges stay on the page; the rules leave them out."""
    url = f"{service.management}/models/{service.model}?min_worker=1"
    assert requests.put(url, timeout=30).status_code == 202
    prometheus.wait("classifier:workers:fresh == 1", 60)
    assert len(prometheus.query("classifier_worker_resident_memory_bytes")) == 2
    assert len(prometheus.query("classifier:worker_resident_memory_bytes:fresh")) == 1
    assert requests.put(url.replace("=1", "=2"), timeout=30).status_code == 202
    prometheus.wait("classifier:workers:fresh == 2", 120)
    workers = {labels["worker"] for labels, _ in prometheus.query("classifier_worker_starts_total")}
    assert workers == {"0", "1"}, "the slot was taken again"

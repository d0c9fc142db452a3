"""What Prometheus sees of the service under load, held against what its clients saw."""

import json
import math
import os
import re
import signal
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import pytest
import requests
import yaml

from handler.metrics import FAMILIES, OUTCOMES, STAGE, STAGES, STATUSES
from tests.drawing import encode, noise
from tests.monitoring.conftest import MONITORING, Prometheus
from tests.monitoring.test_rules import ALERTS, DASHBOARD, PANELS
from tests.server.colours import LABELS, encoded
from tests.server.serving import Server

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BOUNDS = FAMILIES[STAGE].bounds
CLIENTS = 2
LOAD_SECONDS = 15

# Named in rules and panels, and not on the page of a machine without a GPU.
GPU_METRICS = {
    "classifier_gpu_utilization_ratio",
    "classifier_gpu_memory_used_bytes",
    "classifier_gpu_memory_total_bytes",
}


@dataclass
class Answered:
    """One request as its client saw it."""

    status: int
    request_id: str
    seconds: float
    end: float  # time.time()


@dataclass
class Load:
    """Clients that ask again and again, each on a connection of its own."""

    answers: list[Answered] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, url: str, body: bytes) -> None:
        with requests.Session() as session:
            session.trust_env = False
            for number in count():
                if self.stop.is_set():
                    return
                start = time.time()
                headers = {"X-Request-Start": f"t={start:.3f}", "traceparent": TRACE}
                try:
                    # What follows an image's end is ignored, and makes it one that is not cached.
                    image = body + str(number).encode()
                    response = session.post(url, data=image, headers=headers, timeout=60)
                except requests.ConnectionError:  # an answer of 500 closes the connection
                    continue
                end = time.time()
                request_id = response.headers.get("x-request-id", "")
                self.answers.append(Answered(response.status_code, request_id, end - start, end))

    def run(self, url: str, seconds: float) -> None:
        # Large, so that the work outweighs the way there.
        bodies = [encode(noise((1600, 1200), seed=seed), "JPEG") for seed in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            jobs = [pool.submit(self.ask, url, body) for body in bodies]
            time.sleep(seconds)
            self.stop.set()
            for job in jobs:
                job.result()


@pytest.fixture(scope="module")
def load(service: Server, prometheus: Prometheus) -> Load:
    """Some seconds of load, all of it scraped."""
    load = Load()
    load.run(service.predictions, LOAD_SECONDS)
    # One of each kind that rules and panels ask for. The last is TorchServe's own 500.
    for label in LABELS:
        requests.post(service.predictions, data=encoded(label), timeout=30)
    assert requests.post(service.predictions, data=b"no image", timeout=30).status_code == 400
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(3):
        broken = requests.post(service.predictions, data=b"%zz=%", headers=form, timeout=30)
        assert broken.status_code == 500
        time.sleep(1.2)
    prometheus.wait("classifier_top_class_total", 60)  # in every 15th flush
    time.sleep(3)
    return load


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[math.ceil(q * len(values)) - 1]


def bucket(seconds: float) -> int:
    return bisect_left(BOUNDS, seconds)


def names(expr: str) -> set[str]:
    """The metrics that an expression names."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|without|group_left) *\([^)]*\)", "", expr)
    words = set(re.findall(r"(?<![\w:])[a-zA-Z_:][\w:]*(?! *\()(?![\w:])", bare))
    return words - {"and", "or", "unless", "by", "on", "group_left", "time", "vector", "sum"}


def exists(prometheus: Prometheus) -> set[str]:
    return set(prometheus.ask("label/__name__/values"))


def test_every_documented_metric_is_scraped(prometheus: Prometheus, load: Load) -> None:
    families = {name: family for name, family in FAMILIES.items() if name not in GPU_METRICS}
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
    assert {answer.status for answer in load.answers} == {200}
    assert prometheus.value('classifier_requests_total{status="200"}') == len(load.answers) + 3
    assert prometheus.value('classifier_requests_total{status="400"}') == 1
    assert prometheus.value('classifier_images_total{outcome="UnreadableImage"}') == 1
    assert prometheus.value('classifier_stage_seconds_count{stage="queue"}') == len(load.answers)
    assert prometheus.value("sum(ts_inference_requests_total)") >= len(load.answers) + 4
    assert prometheus.value("Requests5XX") == 3


def test_rates_are_those_of_the_clients(prometheus: Prometheus, load: Load) -> None:
    """Over the seconds in which all of them asked."""
    ends = [answer.end for answer in load.answers]
    seconds = 8
    until = max(ends) - 3
    seen = sum(until - seconds - 1 < end <= until - 1 for end in ends) / seconds
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
    assert len(logged) == len(load.answers) + 4
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
        data=encoded("red"),
        headers={"traceparent": TRACE, "Authorization": "Bearer secret-key"},
        timeout=30,
    )
    request_id = response.headers["x-request-id"]
    assert response.json()["metadata"]["request_id"] == request_id
    assert service.request_line(request_id)["traceparent"] == TRACE
    assert "secret-key" not in service.text()
    assert {line["traceparent"] for line in service.log("request")} <= {TRACE, None}


def test_every_line_of_the_log_is_json(service: Server, load: Load) -> None:
    """TorchServe's, Java's and the launcher's as well."""
    events = Counter[str]()
    for line in service.text().splitlines():
        facts = json.loads(line)
        assert {"time", "level", "event"} <= set(facts)
        assert facts["level"] in ("INFO", "WARNING", "ERROR")
        events[facts["event"]] += 1
    assert events["ready"] == 1
    assert events["model_ready"] == 2
    assert events["java"] >= 1
    assert events["request"] >= len(load.answers)


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
    missing = {name: place for name, place in named.items() if name not in known | GPU_METRICS}
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
    assert empty == {"GPU in use", "GPU memory in use"}  # there is none
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
    """At most its last second is lost; nothing is counted twice, falls, or changes its label."""
    before = prometheus.value('classifier_requests_total{status="200"}')
    starts = prometheus.value("sum(classifier_worker_starts_total)")
    logged_before = len(service.log("request"))
    victim = min(service.worker_pids())
    more = Load()

    def kill() -> None:
        time.sleep(4)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    more.run(service.predictions, 8)
    killer.join()
    prometheus.wait(f"sum(classifier_worker_starts_total) == {starts + 1}", 60)
    prometheus.wait("classifier:workers:fresh == 2", 60)
    time.sleep(3)
    after = prometheus.value('classifier_requests_total{status="200"}')
    good = [answer for answer in more.answers if answer.status == 200]
    assert {answer.status for answer in more.answers} <= {200, 500, 507}
    logged = [line for line in service.log("request")[logged_before:] if line["status"] == 200]
    assert len(logged) >= len(good)
    killed = max(
        (answer.end for answer in more.answers if answer.status != 200),
        default=more.answers[len(more.answers) // 2].end,
    )
    at_risk = sum(killed - 3 < answer.end < killed + 1 for answer in good)
    assert len(good) - at_risk <= after - before <= len(logged)
    for name, family in FAMILIES.items():
        for series, (kind, _) in family.series(name).items():
            if kind == "counter":
                assert prometheus.value(f"max(resets({series}[10m]))") == 0, series
    rates = "min_over_time(sum(rate(classifier_requests_total[5s]))[10m:1s])"
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

"""The capacity ratio of rules.yml and that of ./scripts/scale --watch are the same."""

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from service.chaos.prometheus import MONITORING
from service.scaling.autoscaler import compare, measure_cost
from service.scaling.capacity import LEAST_FULL
from service.scaling.model import Counters
from service.torchserve.management import ModelState, Worker

POD = 'job="classifier", namespace="n", pod="p", instance="a"'
MODEL = f'{POD}, model="m", version="1"'


@dataclass(frozen=True, kw_only=True)
class Load:
    """What happens in each second, and how much of it the metrics say."""

    arrivals: float = 0
    answered: float = 0
    probes: float = 0
    busy: float = 0  # seconds, of all workers
    own: float = 0  # seconds of the batch, of all requests
    waited: float = 0  # seconds in the queue, of all requests
    workers: int = 2
    dead: int = 0  # workers that report no more

    def series(self) -> dict[str, float]:
        """Counters -> their increment in a second."""
        torchserve = f'{POD}, model_name="m", model_version="default"'
        return {
            f"ts_inference_requests_total{{{torchserve}}}": self.arrivals,
            f"ts_queue_latency_microseconds{{{torchserve}}}": 1e6 * self.waited,
            f'classifier_requests_total{{{MODEL}, status="200"}}': self.answered,
            f'classifier_probes_total{{{MODEL}, status="200"}}': self.probes,
            f'classifier_worker_busy_seconds_total{{{MODEL}, worker="0"}}': self.busy,
            f'classifier_stage_seconds_sum{{{MODEL}, stage="total"}}': self.own,
            f'classifier_stage_seconds_count{{{MODEL}, stage="total"}}': self.answered,
        }

    def watched(self, seconds: float) -> float | None:
        """What ./scripts/scale --watch makes of it."""
        before = Counters(0, 0, 0)
        after = Counters(
            requests=seconds * self.arrivals,
            queue_us=seconds * 1e6 * self.waited,
            latency_us=0,
            busy_seconds=seconds * self.busy,
            handled=seconds * (self.answered + self.probes),
            own_seconds=seconds * self.own,
            own_count=seconds * self.answered,
        )
        ready = tuple(Worker(str(n), n, "cpu", "READY") for n in range(self.workers))
        state = ModelState("1", self.workers, ready, pending=0, remaining=100)
        sample = compare(state, before, after, seconds, measure_cost(before, after))
        assert sample
        return sample.capacity_ratio


LOADS = {
    "idle": Load(),
    "half full": Load(arrivals=100, answered=100, busy=1, own=2, waited=0.5),
    "refused by TorchServe": Load(arrivals=600, answered=200, busy=1.9, own=5, waited=80),
    "refused by the gateway": Load(arrivals=200, answered=200, busy=1.9, own=5, waited=60),
    "slow model": Load(arrivals=20, answered=20, busy=1.2, own=1.6, waited=0.3),
    "slower than the objective": Load(arrivals=1, answered=1, busy=0.8, own=0.8),
    "health checks": Load(arrivals=1, probes=1, busy=0.01),
    "a worker died": Load(arrivals=100, answered=100, busy=0.7, own=2, workers=1, dead=1),
    "nothing is answered": Load(arrivals=3, workers=2),
}


def ask(promtool: str, folder: Path, load: Load, expected: float | None) -> None:
    """Have promtool check what the rules say of a load that lasts."""
    interval, count = 10, 60
    series = [
        {"series": name, "values": f"0+{interval * value}x{count}"}
        for name, value in load.series().items()
    ]
    for number in range(load.workers + load.dead):
        series.append(
            {
                "series": "classifier_worker_last_flush_timestamp_seconds"
                f'{{{MODEL}, worker="{number}"}}',
                "values": f"0+{interval if number < load.workers else 0}x{count}",
            }
        )
    sample = {"labels": f"{{{MODEL}}}", "value": expected}
    test = {
        "rule_files": [str(MONITORING / "rules.yml")],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": f"{interval}s",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": "round(classifier_capacity_ratio, 0.001)",
                        "eval_time": "8m",
                        "exp_samples": [] if expected is None else [sample],
                    }
                ],
            }
        ],
    }
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump(test))
    command = [promtool, "test", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_prometheus_and_the_command_agree(promtool: str, tmp_path: Path, load: Load) -> None:
    ratio = load.watched(seconds=60)
    ask(promtool, tmp_path, load, None if ratio is None else math.floor(1000 * ratio + 0.5) / 1000)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("idle", 0, 0),
        ("half full", 0.52, 0.54),  # busy for half of the time, and a little queue
        ("refused by TorchServe", 3, 10),  # three times as many come as are answered
        ("refused by the gateway", 1.5, 2),  # the queue is as long as the gateway lets it be
        ("slower than the objective", 0.4 / LEAST_FULL, 0.4 / LEAST_FULL),
        ("a worker died", 0.7, 0.8),
    ],
)
def test_the_ratio_says_what_it_should(name: str, low: float, high: float) -> None:
    ratio = LOADS[name].watched(seconds=60)
    assert ratio is not None
    assert low <= ratio <= high


def test_what_nobody_measured_is_unknown() -> None:
    assert LOADS["nothing is answered"].watched(seconds=60) is None

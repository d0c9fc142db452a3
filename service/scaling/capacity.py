"""How much of what it can carry a service carries now: `classifier_capacity_ratio`.

The definition is in docs/scale.md. Prometheus computes the same by deploy/monitoring/rules.yml, and
a test holds the two together.
"""

import math
from dataclasses import dataclass

OBJECTIVE_SECONDS = 0.5  # that of deploy/monitoring/alerts.yml
LATE_SHARE = 0.01  # of the requests, which may take longer
LEAST_FULL = 0.2  # the share of busy time that counts as full, if queueing theory says less
LEAST_SLACK_SECONDS = 0.01  # that are left for waiting, if a request alone takes too long


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a request takes at present, on average."""

    busy_seconds: float  # of a worker; those of a batch share its time
    own_seconds: float  # from its arrival at a worker to its answer: the whole batch's time


def full_share(cost: Cost, workers: int) -> float:
    """The share of time in which workers may be busy so that few requests are late, 0 to 1.

    The wait in an M/M/m queue is longer than t with probability C exp(-(1 - share) m t / S), where
    S is the time a worker needs for a request and C, at most 1, is Erlang's C formula.
    """
    slack = max(LEAST_SLACK_SECONDS, OBJECTIVE_SECONDS - cost.own_seconds)
    return max(LEAST_FULL, 1 - math.log(1 / LATE_SHARE) * cost.busy_seconds / (workers * slack))


def capacity_ratio(arrivals: float, waiting: float, cost: Cost, workers: int) -> float:
    """The present load over what the workers carry within the objective; 0 idle, 1 full.

    `arrivals` is requests a second, refused ones included; `waiting` is the mean length of the
    queue, which is to be gone within the objective. `workers` (at least 1) are those that live.
    """
    load = (arrivals + waiting / OBJECTIVE_SECONDS) * cost.busy_seconds / workers
    return load / full_share(cost, workers)

"""The HorizontalPodAutoscaler's decisions, as Kubernetes documents and codes them.

https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/, and
pkg/controller/podautoscaler of kubernetes/kubernetes for the order of the steps.
"""

import math
from collections.abc import Sequence

from handler.errors import SetupError
from service.rehearsal.manifests import Object, quantity

SYNC_SECONDS = 15.0  # between two decisions (--horizontal-pod-autoscaler-sync-period)
TOLERANCE = 0.1  # by which the metric may be off its target (--horizontal-pod-autoscaler-tolerance)
DOUBLE = {"type": "Percent", "value": 100, "periodSeconds": 15}
FOUR = {"type": "Pods", "value": 4, "periodSeconds": 15}
UP = {"stabilizationWindowSeconds": 0, "selectPolicy": "Max", "policies": [DOUBLE, FOUR]}
DOWN = {"stabilizationWindowSeconds": 300, "selectPolicy": "Max", "policies": [DOUBLE]}


class Autoscaler:
    """Decides on one reading after the other; times are of any clock in seconds."""

    def __init__(self, spec: Object) -> None:
        """`spec` is the object's. Raises SetupError if its one metric is not the pods'."""
        (metric,) = spec["metrics"]
        if metric["type"] != "Pods":
            raise SetupError(f"the autoscaler's metric must be of type Pods, got {metric['type']}")
        self.metric: str = metric["pods"]["metric"]["name"]
        self.target = quantity(metric["pods"]["target"]["averageValue"])  # of the mean
        self.minimum: int = spec.get("minReplicas", 1)
        self.maximum: int = spec["maxReplicas"]
        behavior = spec.get("behavior") or {}
        self._up: Object = UP | (behavior.get("scaleUp") or {})
        self._down: Object = DOWN | (behavior.get("scaleDown") or {})
        self._wanted: list[tuple[float, int]] = []  # what was recommended, and when
        self._changes: list[tuple[float, int]] = []  # pods more or fewer, and when

    def decide(self, now: float, current: int, values: Sequence[float | None]) -> int:
        """How many pods there should be; `values` are the pods' metrics, None: it has none."""
        wanted = self._recommend(current, values)
        self._wanted.append((now, min(self.maximum, max(self.minimum, wanted))))
        wanted = self._stabilise(now, current)
        if wanted > current:
            wanted = min(wanted, max(current, self._reach(now, current, self._up, 1)))
        elif wanted < current:
            wanted = max(wanted, min(current, self._reach(now, current, self._down, -1)))
        if wanted != current:
            self._changes.append((now, wanted - current))
        return wanted

    def _recommend(self, current: int, values: Sequence[float | None]) -> int:
        """By the formula alone."""
        known = [value for value in values if value is not None]
        if not known or abs((ratio := self._ratio(known)) - 1) <= TOLERANCE:
            return current
        missing = len(values) - len(known)
        if not missing:
            return math.ceil(ratio * len(known))
        # Pods of which nothing is known count so that less is done: as idle on the way up, and as
        # just busy enough on the way down.
        assumed = 0.0 if ratio > 1 else self.target
        damped = self._ratio([*known, *[assumed] * missing])
        if abs(damped - 1) <= TOLERANCE or (damped > 1) != (ratio > 1):
            return current
        wanted = math.ceil(damped * len(values))
        return max(current, wanted) if damped > 1 else min(current, wanted)

    def _ratio(self, values: Sequence[float]) -> float:
        return sum(values) / len(values) / self.target

    def _stabilise(self, now: float, current: int) -> int:
        """The recommendation of each direction's window that changes least."""
        up, down = (rules["stabilizationWindowSeconds"] for rules in (self._up, self._down))
        lowest = min(wanted for then, wanted in self._wanted if now - then <= up)
        highest = max(wanted for then, wanted in self._wanted if now - then <= down)
        return min(max(current, lowest), highest)

    def _reach(self, now: float, current: int, rules: Object, sign: int) -> int:
        """How far the policies of a direction let the pods go; `sign` is 1 for up."""
        if rules["selectPolicy"] == "Disabled":
            return current
        reaches = []
        for policy in rules["policies"]:
            recent = [by for then, by in self._changes if now - then < policy["periodSeconds"]]
            begun_with, value = current - sum(recent), policy["value"]
            if policy["type"] == "Percent":
                share = begun_with * (1 + sign * value / 100)
                reaches.append(math.ceil(share) if sign > 0 else int(share))
            else:
                reaches.append(begun_with + sign * value)
        return max(reaches) if (sign > 0) == (rules["selectPolicy"] == "Max") else min(reaches)

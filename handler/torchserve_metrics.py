"""How metrics reach TorchServe: as lines that its own classes write."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.metrics.metric_type_enum import MetricTypes

from handler.collector import Emit
from handler.metrics import FAMILIES

PREDICTION_TIME = "PredictionTime"  # ts/service.py


@lru_cache(maxsize=4096)
def label_value(text: str) -> str:
    """A label's value in a form that passes through TorchServe.

    TorchServe splits its lines at "|", "," and ":", and drops a sample with an empty value. Only
    ASCII is kept, because TorchServe also breaks lines at U+2028.
    """
    return re.sub(r"[^ -~]|[|,:]", "_", text).strip() or "_"


class _Unsent(CachingMetric):
    """A metric of TorchServe's own that goes nowhere."""

    def add_or_update(self, *_: Any, **__: Any) -> None:
        pass


def leave_out_prediction_time(cache: MetricsCacheYamlImpl) -> None:
    """TorchServe's worker sends its PredictionTime with each batch, and the frontend drops it."""
    gauges = cache.cache.setdefault(MetricTypes.GAUGE, {})
    gauges[PREDICTION_TIME] = _Unsent(PREDICTION_TIME, "ms", [], MetricTypes.GAUGE)


def torchserve_emit() -> Emit:
    """A function that hands values over as TorchServe's own metrics do.

    The frontend adds the label `Hostname`. It drops metrics that its metrics.yaml does not declare,
    so an archive that runs in a TorchServe with other metrics loses these and nothing else.
    """
    metrics = {
        # TorchServe ignores the unit in a line: the page's HELP has the one of metrics.yaml.
        series: CachingMetric(series, "Count", [*labels], MetricTypes(kind))
        for name, family in FAMILIES.items()
        for series, (kind, labels) in family.series(name).items()
    }

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        metrics[name].add_or_update(value, [label_value(label) for label in labels])

    return emit

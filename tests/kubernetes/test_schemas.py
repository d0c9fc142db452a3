"""Every object against Kubernetes' own schemas, strictly: an unknown field is an error."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import kubernetes_validate
import pytest

from tests.kubernetes.rendered import RELEASES, release

VERSIONS = ("1.30.0", kubernetes_validate.latest_version())  # that the chart takes, from and to
# Kinds of others, whose schemas no package has: test_wiring.py checks what they refer to.
CUSTOM = {"GRPCRoute", "HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", RELEASES)
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    checked = 0
    for one in release(name):
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(plain(one), version, strict=True)
            checked += 1
    assert checked >= 11


def plain(one: Mapping[str, Any]) -> dict[str, Any]:
    return deepcopy(dict(one))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"])
def test_a_misspelled_field_is_found(kind: str, version: str) -> None:
    one = plain(next(one for one in release("default") if one["kind"] == kind))
    one["spec"]["replicass"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, version, strict=True)

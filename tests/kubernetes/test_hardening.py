"""Pod Security "restricted", and what kube-linter asks for."""

from copy import deepcopy
from typing import Any

import pytest

from tests.kubernetes.hardening import faults
from tests.kubernetes.rendered import RELEASES, key, of_kind, release


@pytest.mark.parametrize("component", ["gateway", "replica"])
@pytest.mark.parametrize("name", RELEASES)
def test_nothing_is_lacking(name: str, component: str) -> None:
    assert faults(of_kind(release(name), "Deployment")[component]) == []


PLANTED: dict[str, tuple[str, Any]] = {  # the fault -> where, and the value; None: taken away
    "runs as root": ("securityContext/runAsUser", 0),
    "no seccomp profile": ("securityContext/seccompProfile", None),
    "has a token": ("automountServiceAccountToken", True),
    "default service account": ("serviceAccountName", None),
    "service links": ("enableServiceLinks", None),
    "hostNetwork is set": ("hostNetwork", True),
    "volume keys is of a kind that is not allowed": (
        "volumes/0",
        {"name": "keys", "hostPath": {"path": "/etc"}},
    ),
    "volume tmp has no limit": ("volumes/1/emptyDir/sizeLimit", None),
    "not spread": ("topologySpreadConstraints", None),
    "wait: no limits": ("initContainers/0/resources/limits/cpu", None),
    "gateway: no livenessProbe": ("containers/0/livenessProbe", None),
    "gateway: no preStop": ("containers/0/lifecycle/preStop", None),
    "gateway: may gain rights": ("containers/0/securityContext/allowPrivilegeEscalation", True),
    "gateway: privileged": ("containers/0/securityContext/privileged", True),
    "gateway: has capabilities": ("containers/0/securityContext/capabilities/drop", ["NET_RAW"]),
    "gateway: root can be written": ("containers/0/securityContext/readOnlyRootFilesystem", False),
    "gateway: sets aside what the pod says": ("containers/0/securityContext/runAsUser", 0),
    "gateway: has a port of the node's": ("containers/0/ports/0/hostPort", 80),
    "gateway: no fixed image": ("containers/0/image", "host:5000/classifier:latest"),
    "gateway: no requests": ("containers/0/resources/requests/cpu", None),
    "gateway: more memory than it asks for": ("containers/0/resources/limits/memory", "9G"),
    "gateway: a secret in the environment": (
        "containers/0/env/0",
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_found(fault: str) -> None:
    deployment = deepcopy(dict(of_kind(release("default"), "Deployment")["gateway"]))
    path, value = PLANTED[fault]
    place: Any = deployment["spec"]["template"]["spec"]
    *way, last = [int(word) if word.isdigit() else word for word in path.split("/")]
    for word in way:
        place = place[word]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert faults(deployment) == [fault]


@pytest.mark.parametrize("name", RELEASES)
def test_no_secret_is_in_the_manifests(name: str) -> None:
    assert "Secret" not in {kind for kind, _ in map(key, release(name))}

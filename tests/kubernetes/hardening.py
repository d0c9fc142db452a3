"""What a manifest must have to be fit for production, as kube-linter and Pod Security check it.

No package has kube-linter's binary. "restricted" is
https://kubernetes.io/docs/concepts/security/pod-security-standards/, as far as a field that is not
set cannot break it.
"""

from collections.abc import Iterator
from typing import Any

from tests.kubernetes.rendered import Object

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
FORBIDDEN = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace")


def faults(deployment: Object) -> list[str]:
    """What a Deployment lacks; empty: nothing."""
    return sorted(_faults(deployment["spec"]))


def _faults(spec: dict[str, Any]) -> Iterator[str]:
    pod = spec["template"]["spec"]
    context = pod.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0:
        yield "runs as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "has a token"
    if pod.get("serviceAccountName", "default") == "default":
        yield "default service account"
    if pod.get("enableServiceLinks") is not False:
        yield "service links"
    yield from (f"{name} is set" for name in FORBIDDEN if name in pod)
    for volume in pod.get("volumes", []):
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not allowed"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no limit"
    if "topologySpreadConstraints" not in pod:
        yield "not spread"
    if spec.get("strategy", {}).get("rollingUpdate", {}).keys() != {"maxSurge", "maxUnavailable"}:
        yield "no rollout strategy"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        yield from (f"{container['name']}: {fault}" for fault in _container(container))
    for container in pod["containers"]:
        yield from (f"{container['name']}: no {one}" for one in PROBES if one not in container)
        if "preStop" not in container.get("lifecycle", {}):
            yield f"{container['name']}: no preStop"


def _container(container: dict[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "may gain rights"
    if context.get("privileged"):
        yield "privileged"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "has capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "root can be written"
    if any(
        name in context for name in ("runAsUser", "runAsNonRoot", "seccompProfile", "procMount")
    ):
        yield "sets aside what the pod says"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "has a port of the node's"
    _, _, tag = container["image"].rpartition("/")[2].partition(":")
    if tag in ("", "latest"):
        yield "no fixed image"
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        if not {"cpu", "memory"} <= resources.get(kind, {}).keys():
            yield f"no {kind}"
    if resources.get("requests", {}).get("memory") != resources.get("limits", {}).get("memory"):
        yield "more memory than it asks for"
    for variable in container.get("env", []):
        if "secretKeyRef" in variable.get("valueFrom", {}):
            yield "a secret in the environment"

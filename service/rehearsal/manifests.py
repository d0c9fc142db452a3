"""The objects of rendered manifests that a rehearsal plays."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from handler.errors import SetupError

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Deployment:
    """One whose pods have one container; its `spec` is as the manifest has it."""

    name: str
    spec: Object
    environ: Mapping[str, str]  # of the container; secrets are in no manifest

    @property
    def pod(self) -> Object:
        spec: Object = self.spec["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        (one,) = self.pod["containers"]
        return dict(one)

    @property
    def command(self) -> list[str]:
        return command_of(self.container)

    @property
    def init(self) -> list[list[str]]:
        """What its own image runs before; other images bring archives."""
        before, image = self.pod.get("initContainers", ()), self.container["image"]
        return [command_of(one) for one in before if one["image"] == image]

    @property
    def cpus(self) -> int:
        """The limit, in whole cores; 1 if there is none."""
        limits = self.container.get("resources", {}).get("limits", {})
        return math.ceil(quantity(limits.get("cpu", 1)))

    def port(self, name: str | int) -> int:
        """Of a probe; LookupError if the container names none so."""
        ports = {port.get("name"): port["containerPort"] for port in self.container["ports"]}
        return name if isinstance(name, int) else int(ports[name])

    def bounds(self, desired: int) -> tuple[int, int]:
        """The fewest pods that may be available in a rollout, and the most that there may be."""
        rolling = self.spec.get("strategy", {}).get("rollingUpdate") or {}
        surge = share(rolling.get("maxSurge", "25%"), desired, math.ceil)
        unavailable = share(rolling.get("maxUnavailable", "25%"), desired, math.floor)
        return desired - (unavailable or int(not surge)), desired + surge


@dataclass(frozen=True, kw_only=True)
class Manifests:
    replicas: Deployment
    gateways: Deployment
    names: Sequence[str]  # of the replicas' headless Services
    budget: Object  # the spec of the replicas' PodDisruptionBudget; empty: none
    autoscaler: Object  # likewise

    def least_ready(self, desired: int) -> int:
        """The fewest ready replicas that an eviction may leave."""
        if "maxUnavailable" in self.budget:
            return desired - share(self.budget["maxUnavailable"], desired, math.ceil)
        return share(self.budget.get("minAvailable", 0), desired, math.ceil)


def read_manifests(paths: Iterable[Path]) -> Manifests:
    """From files, and all *.yaml of folders. Raises SetupError for what cannot be played."""
    objects: list[Object] = []
    for path in paths:
        for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
            try:
                objects += filter(None, yaml.safe_load_all(file.read_bytes()))
            except (OSError, yaml.YAMLError) as exc:
                raise SetupError(f"{file} cannot be read: {exc}") from exc
    try:
        return _read(objects)
    except (LookupError, TypeError, AttributeError, ValueError) as exc:
        raise SetupError(f"the manifests are not what a rehearsal expects: {exc!r}") from exc


def _read(objects: Sequence[Object]) -> Manifests:
    def of(kind: str, part: str = "spec") -> list[tuple[str, Object]]:
        found = [one for one in objects if one["kind"] == kind]
        return [(one["metadata"]["name"], one.get(part, {})) for one in found]

    maps = dict(of("ConfigMap", "data"))
    deployments = [Deployment(name, spec, _environ(spec, maps)) for name, spec in of("Deployment")]
    replicas = _that_runs("scripts/serve.py", deployments)
    labels = replicas.spec["template"]["metadata"]["labels"].items()
    names = [
        name
        for name, spec in of("Service")
        if spec.get("clusterIP") == "None" and spec["selector"].items() <= labels
    ]
    budgets = [
        spec
        for _, spec in of("PodDisruptionBudget")
        if spec["selector"]["matchLabels"].items() <= labels
    ]
    scalers = [
        spec
        for _, spec in of("HorizontalPodAutoscaler")
        if spec["scaleTargetRef"]["name"] == replicas.name
    ]
    gateways = _that_runs("scripts/gateway.py", deployments)
    name = gateways.environ["GATEWAY_UPSTREAMS"].partition(":")[0].partition(".")[0]
    if name not in names:
        raise SetupError(f"the gateway asks {name!r}; headless Services of the replicas: {names}")
    return Manifests(
        replicas=replicas,
        gateways=gateways,
        names=names,
        budget=next(iter(budgets), {}),
        autoscaler=next(iter(scalers), {}),
    )


def _that_runs(script: str, deployments: Iterable[Deployment]) -> Deployment:
    found = [one for one in deployments if script in one.command]
    if len(found) != 1:
        raise SetupError(f"there must be one Deployment that runs {script}, got {len(found)}")
    return found[0]


def _environ(spec: Object, maps: Mapping[str, Object]) -> dict[str, str]:
    (container,) = spec["template"]["spec"]["containers"]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]
    return found | {one["name"]: one["value"] for one in container.get("env", ())}


def command_of(container: Object) -> list[str]:
    """The image's ENTRYPOINT is python, unless the manifest has another."""
    return [*container.get("command", ["python"]), *container.get("args", ())]


def quantity(value: str | float) -> float:
    """A number as Kubernetes writes it: 2, "0.7", "700m"."""
    text = str(value)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


def share(value: str | int, whole: int, round_to: Callable[[float], int]) -> int:
    """A count as it is, and of a percentage so many of the whole."""
    text = str(value)
    return round_to(whole * int(text[:-1]) / 100) if text.endswith("%") else int(text)

"""KServe's own model classes: reads objects into them, and prints what they do not take.

For an environment of its own, since KServe's pins clash with ours. Its argument is a JSON list of
objects, its output one of a list of complaints for each.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import kubernetes.client
from kserve import models

NAMED_ONLY = {  # types that KServe's package names and does not have
    "V1beta1MetricQuantity": str,
    "K8sIoApiAppsV1DeploymentStrategy": kubernetes.client.V1DeploymentStrategy,
}


def complaints(one: dict[str, Any]) -> list[str]:
    """Fields that the class does not know, or takes for something else."""
    client = kubernetes.client.ApiClient()
    name = one["apiVersion"].rpartition("/")[2].capitalize() + one["kind"]
    try:
        read = client.deserialize(SimpleNamespace(data=json.dumps(one)), name)
    except ValueError as exc:
        return [str(exc)]
    return list(differences(one, client.sanitize_for_serialization(read), name))


def differences(given: Any, kept: Any, place: str) -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            found
            for key, value in given.items()
            for found in differences(value, kept.get(key), f"{place}.{key}")
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            found
            for number, (one, other) in enumerate(zip(given, kept, strict=True))
            for found in differences(one, other, f"{place}[{number}]")
        ]
    return [] if given == kept else [f"{place}: {given!r} became {kept!r}"]


if __name__ == "__main__":
    for model, kind in vars(models).items():  # the client looks for names in its own
        if isinstance(kind, type):
            vars(kubernetes.client.models)[model] = kind
    vars(kubernetes.client.models).update(NAMED_ONLY)
    print(json.dumps([complaints(one) for one in json.loads(sys.argv[1])]))

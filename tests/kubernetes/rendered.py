"""The manifests, as the real helm and kubectl make them."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from service.manifests import CHART, KUBERNETES, NAME, run, template

Object = Mapping[str, Any]
# What is installed -> the values files beside the default ones.
RELEASES = {
    "default": [],
    "cpu": ["cpu"],
    "gpu": ["gpu"],
    "canary": ["canary"],
    "modelcar": ["gpu", "modelcar"],
    "volume": ["cpu", "volume"],
    "grpc": ["cpu", "grpc"],
    "keda": ["cpu"],
}
RELEASE_NAMES = {"canary": f"canary-{NAME}"}
FLAGS = {"keda": ["--set", "autoscaling.kind=keda"]}


@cache
def release(name: str) -> list[Object]:
    """The objects of one of RELEASES."""
    files = [word for file in RELEASES[name] for word in ("-f", CHART / f"values-{file}.yaml")]
    return load(template(*files, *FLAGS.get(name, []), release=RELEASE_NAMES.get(name, NAME)))


def kustomized(folder: Path) -> list[Object]:
    return load(run("kubectl", "kustomize", folder))


def combined(folder: Path, resource: str, *components: str) -> list[Object]:
    """An overlay with components on top; `folder` gets the kustomization."""
    content = {
        "resources": [os.path.relpath(KUBERNETES / resource, folder.resolve())],
        "components": [
            os.path.relpath(KUBERNETES / "components" / name, folder.resolve())
            for name in components
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return kustomized(folder)


def load(text: str) -> list[Object]:
    return sorted((one for one in yaml.safe_load_all(text) if one), key=key)


def key(one: Object) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """By the last word of the name: gateway or replica."""
    return {
        one["metadata"]["name"].rpartition("-")[2]: one for one in objects if one["kind"] == kind
    }


def pod(deployment: Object) -> dict[str, Any]:
    return dict(deployment["spec"]["template"]["spec"])


def container(deployment: Object) -> dict[str, Any]:
    (found,) = pod(deployment)["containers"]
    return dict(found)

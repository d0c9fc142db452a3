"""What the figures of a benchmark depend on, besides what is measured."""

import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from benchmarks.servers import Servers
from benchmarks.subjects import ROOT
from service.load.images import ImageRequest, load_images
from service.load.report import machine

LIBRARIES = ("torch", "torchvision", "torchserve", "openvino", "pillow", "aiohttp")


def conditions(servers: Servers, images: Sequence[ImageRequest]) -> dict[str, Any]:
    """The machine, the versions, the model and the images."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    weights = servers.weights
    return {
        "started": now(),
        "commit": commit.stdout.strip() or None,
        "machine": machine(),
        "versions": {name: version(name) for name in LIBRARIES},
        "model": servers.model,
        "weights": weights if isinstance(weights, str) else weights.name,
        "recipe": servers.recipe,
        "images": len(images),
        "image_bytes": sum(len(image.body) for image in images) // len(images),
        "images_left_out": len(load_images(servers.images)) - len(images),
        "drawn": servers.images is None,
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

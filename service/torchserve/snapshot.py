"""The models of a start as a snapshot of TorchServe, the file that it restores its models from.

Of TorchServe's ways to be told what to serve, only this one takes a maxBatchDelay of 0: from
model-config.yaml and through the management port it reads that as 100 ms
(org.pytorch.serve.wlm.ModelManager.createModel).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handler.machine import available_cores
from service.archive.mar import CONFIG_FILE, parse_config

# What TorchServe takes without a configuration, but for the workers: one a core.
DEFAULTS = {"batchSize": 1, "maxBatchDelay": 100, "responseTimeout": 120, "startupTimeout": 120}


def make_snapshot(folders: Sequence[Path]) -> str:
    """The line of config.properties with which TorchServe serves these unpacked archives.

    Of several versions of a model the first is the default.
    """
    models: dict[str, dict[str, Any]] = {}
    for folder in folders:
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text("utf-8"))["model"]
        versions = models.setdefault(manifest["modelName"], {})
        versions[str(manifest["modelVersion"])] = {
            "defaultVersion": not versions,
            "marName": folder.name,
            **_state(parse_config((folder / CONFIG_FILE).read_text("utf-8"))),
        }
    count = sum(map(len, models.values()))
    snapshot = {"name": "start", "modelCount": count, "created": 0, "models": models}
    # In a file of properties a backslash begins an escape.
    return "model_snapshot=" + json.dumps(snapshot).replace("\\", "\\\\") + "\n"


def _state(config: Mapping[str, Any]) -> dict[str, Any]:
    """What TorchServe reads of a model from the snapshot instead of from its configuration."""
    workers = config.get("minWorkers", available_cores())
    return {
        "minWorkers": workers,
        "maxWorkers": config.get("maxWorkers", workers),
        **{name: config.get(name, default) for name, default in DEFAULTS.items()},
    }

"""What TorchServe is told to serve."""

import json
from pathlib import Path
from typing import Any

from handler.machine import available_cores
from service.archive.mar import dump_config
from service.torchserve.snapshot import make_snapshot


def lay_out(folder: Path, name: str, version: str, config: dict[str, Any]) -> Path:
    (folder / "MAR-INF").mkdir(parents=True)
    manifest = {"model": {"modelName": name, "modelVersion": version}}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (folder / "model-config.yaml").write_text(dump_config(config))
    return folder


def read(line: str) -> Any:
    key, _, value = line.removesuffix("\n").partition("=")
    assert key == "model_snapshot"
    return json.loads(value.replace("\\\\", "\\"))


def test_a_batch_need_not_wait(tmp_path: Path) -> None:
    config = {"batchSize": 2, "maxBatchDelay": 0, "minWorkers": 3, "maxWorkers": 3}
    folder = lay_out(tmp_path / "0-birds", "birds", "1.0", config)
    assert "maxBatchDelay: 1\n" in (folder / "model-config.yaml").read_text()
    assert read(make_snapshot([folder]))["models"] == {
        "birds": {
            "1.0": {
                "defaultVersion": True,
                "marName": "0-birds",
                "minWorkers": 3,
                "maxWorkers": 3,
                "batchSize": 2,
                "maxBatchDelay": 0,
                "responseTimeout": 120,
                "startupTimeout": 120,
            }
        }
    }


def test_the_first_version_is_the_default(tmp_path: Path) -> None:
    config = {"batchSize": 4, "maxBatchDelay": 5, "responseTimeout": 7}
    folders = [lay_out(tmp_path / version, "birds", version, config) for version in ("2.0", "1.0")]
    snapshot = read(make_snapshot(folders))
    assert snapshot["modelCount"] == 2
    versions = snapshot["models"]["birds"]
    assert {name: one["defaultVersion"] for name, one in versions.items()} == {
        "2.0": True,
        "1.0": False,
    }
    assert versions["1.0"]["maxBatchDelay"] == 5
    assert versions["1.0"]["responseTimeout"] == 7
    assert versions["1.0"]["minWorkers"] == available_cores()


def test_names_pass_through_a_file_of_properties(tmp_path: Path) -> None:
    line = make_snapshot([lay_out(tmp_path / "0", "zaunk\u00f6nig", "1.0", {})])
    assert line.isascii()
    assert "zaunk\\\\u00f6nig" in line
    assert "zaunk\u00f6nig" in read(line)["models"]

"""What a start is going to do: the model configuration, archives that are given, limits."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torchvision
import yaml

from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.settings import Settings
from service import plan as planning
from service.archive.mar import CONFIG_FILE, configure, put, read_config
from service.options import parse_package, parse_serve
from service.plan import (
    CONFIGS,
    MODEL_CONFIG,
    ModelPlan,
    check_device_ids,
    plan_package,
    plan_service,
    workers_for,
)
from service.torchserve.config import ServerConfig
from tests.unit.service.planning import MODEL, planned

FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configurations in place of ours."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "default.yaml").write_text("batchSize: 8\nmaxBatchDelay: 1\nhandler: {top_k: 3}\n")
    monkeypatch.setattr(planning, "CONFIGS", folder)
    return folder


def config_of(model: str = MODEL, *argv: str) -> dict[str, Any]:
    options = parse_package(["--workers", "1", *argv])
    return dict(plan_package(model, options, ServerConfig.load()).config)


# --- TorchServe's model configuration


WITHOUT_MODEL = {"metrics.yaml"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name not in WITHOUT_MODEL], ids=lambda path: path.name
)
def test_our_configurations_are_valid(path: Path) -> None:
    config = config_of(path.stem)
    assert set(config) <= set(MODEL_CONFIG) | {"minWorkers", "maxWorkers"}
    Settings.load(config["handler"], {})
    assert config["responseTimeout"] > 0  # TorchServe's default is two minutes


def test_our_configurations_are_of_known_models() -> None:
    names = {path.stem for path in FILES if path.name not in WITHOUT_MODEL} - {"default", "gpu"}
    assert names <= set(torchvision.models.list_models())


def test_default_alone(configs: Path) -> None:
    assert config_of() == {
        "batchSize": 8,
        "maxBatchDelay": 1,
        "handler": {"top_k": 3},
        "minWorkers": 1,
        "maxWorkers": 1,
    }


def test_the_models_own_file_goes_over_default(configs: Path) -> None:
    (configs / "default.yaml").write_text("batchSize: 8\nhandler: {top_k: 3, max_images: 4}\n")
    (configs / f"{MODEL}.yaml").write_text("batchSize: 2\nhandler: {max_images: 2}\n")
    config = config_of()
    assert (config["batchSize"], config["handler"]) == (2, {"top_k": 3, "max_images": 2})
    assert config_of("alexnet")["batchSize"] == 8


def test_options_go_over_both(configs: Path) -> None:
    (configs / f"{MODEL}.yaml").write_text("batchSize: 2\nmaxBatchDelay: 5\n")
    argv = "--batch-size 16 --max-batch-delay-ms 7 --workers 3 --device cpu --precision bf16"
    assert config_of(MODEL, *argv.split()) == {
        "batchSize": 16,
        "maxBatchDelay": 7,
        "handler": {"top_k": 3, "device": "cpu", "precision": "bf16"},
        "minWorkers": 3,
        "maxWorkers": 3,
        "deviceType": "cpu",
    }


def test_gpu_is_called_so_by_torchserve(configs: Path) -> None:
    config = config_of(MODEL, "--device", "cuda")
    assert (config["deviceType"], config["handler"]["device"]) == ("gpu", "cuda")


@pytest.mark.parametrize(
    ("argv", "gpus", "workers"),
    [
        ("", 0, 6),
        ("--device cpu", 2, 6),
        ("", 1, 3),  # half of the cores
        ("--device cuda", 3, 3),  # 2 cores for each
        ("", 8, 8),  # one at least
        ("--workers-per-gpu 5", 2, 10),
        ("--workers-per-gpu 5", 0, 6),
        ("--workers-per-gpu 5 --workers 3", 2, 3),
        ("--device-ids 1", 2, 3),
        ("--device-ids 1,2 --workers-per-gpu 2", 4, 4),
        ("--device-ids 1", 0, 6),
    ],
)
def test_workers_by_themselves(
    configs: Path, monkeypatch: pytest.MonkeyPatch, argv: str, gpus: int, workers: int
) -> None:
    monkeypatch.setattr(planning, "available_cores", lambda: 6)
    monkeypatch.setattr("service.torchserve.config.count_gpus", lambda: gpus)
    config = plan_package(MODEL, parse_package(argv.split()), ServerConfig.load()).config
    assert (config["minWorkers"], config["maxWorkers"]) == (workers, workers)


@pytest.mark.parametrize(
    ("cores", "gpus", "gibibytes", "workers"),
    [
        (16, 1, 80, 8),
        (64, 1, 80, 8),  # no more than 8 on one
        (64, 8, 80, 32),  # the GPUs share the cores
        (16, 1, 9.75, 4),  # a MIG device
        (16, 2, 5, 4),
        (16, 1, 1.5, 1),  # one at least
        (16, 1, None, 8),  # the driver does not say
        (1, 1, 80, 1),
    ],
)
def test_workers_that_a_gpu_holds(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, gibibytes: float | None, workers: int
) -> None:
    monkeypatch.setattr(planning, "available_cores", lambda: cores)
    memory = None if gibibytes is None else int(gibibytes * 2**30)
    monkeypatch.setattr(planning, "gpu_memory", lambda: memory)
    assert workers_for(gpus) == workers
    assert workers_for(gpus, 5) == 5 * gpus  # the user knows better


@pytest.mark.parametrize(("gpus", "batch"), [(0, 2), (1, 32)])
def test_the_answers_of_full_batches_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, batch: int
) -> None:
    """Of every request with the most images and all classes of ImageNet."""
    monkeypatch.setattr("service.torchserve.config.count_gpus", lambda: gpus)
    plan = planned(tmp_path)
    assert plan.config["batchSize"] == batch
    plan.check_limits(["a name of some thirty characters"] * 1000)


def test_a_batch_that_fits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.torchserve.config.count_gpus", lambda: 1)
    labels = ["tench"] * 10_000
    with pytest.raises(InvalidSettings, match=r"use --batch-size \d+$") as refused:
        planned(tmp_path).check_limits(labels)
    fitting = int(str(refused.value).rpartition(" ")[2])
    planned(tmp_path, "--batch-size", str(fitting)).check_limits(labels)
    with pytest.raises(InvalidSettings, match=f"use --batch-size {fitting}$"):
        planned(tmp_path, "--batch-size", str(fitting + 1)).check_limits(labels)
    with pytest.raises(InvalidSettings, match=r"lower max_images$"):
        planned(tmp_path).check_limits(["tench"] * 1_000_000)


def test_device_ids_go_over_the_file(configs: Path) -> None:
    (configs / f"{MODEL}.yaml").write_text("deviceIds: [3]\n")
    assert config_of()["deviceIds"] == [3]
    assert config_of(MODEL, "--device-ids", "1,0")["deviceIds"] == [1, 0]


@pytest.mark.parametrize("ids", [[2], [0, 2], [-1]])
def test_a_gpu_that_is_not_there(ids: list[int]) -> None:
    with pytest.raises(InvalidSettings) as refused:
        check_device_ids({"deviceIds": ids}, 2)
    assert str(refused.value) == f"deviceIds must be 0 to 1, the GPUs here, got {ids[-1]}"
    check_device_ids({"deviceIds": [0, 1]}, 2)
    check_device_ids({"deviceIds": ids}, 0)  # on a CPU


def test_empty_files_say_nothing(configs: Path) -> None:
    (configs / "default.yaml").write_text("# nothing\nhandler:\n")
    (configs / f"{MODEL}.yaml").write_text("")
    assert config_of() == {"handler": {}, "minWorkers": 1, "maxWorkers": 1}


@pytest.mark.parametrize("key", ["batchsize", "top_k", "3", "minWorkers"])
def test_unknown_key_is_refused(configs: Path, key: str) -> None:
    (configs / f"{MODEL}.yaml").write_text(f"{key}: 3\n")
    with pytest.raises(
        InvalidSettings, match=f"^{MODEL}.yaml: {key} is unknown; known: .*batchSize"
    ):
        config_of()


@pytest.mark.parametrize(("key", "least"), [("maxBatchDelay", 0), ("batchSize", 1)])
@pytest.mark.parametrize("value", ["true", "'8'", "8.5", "[8]", "null", "eight", "-1", "-3"])
def test_value_that_torchserve_would_ignore_is_refused(
    configs: Path, key: str, least: int, value: str
) -> None:
    (configs / "default.yaml").write_text(f"{key}: {value}\n")
    with pytest.raises(InvalidSettings) as refused:
        config_of()
    seen = yaml.safe_load(value)
    assert str(refused.value) == (
        f"default.yaml: {key} must be a whole number, {least} or more, got {seen!r}"
    )


@pytest.mark.parametrize("text", ["a: [", "- batchSize", "text", "handler: 3", "handler: [top_k]"])
def test_what_is_no_mapping_is_refused(configs: Path, text: str) -> None:
    (configs / "default.yaml").write_text(text)
    with pytest.raises(InvalidSettings, match=r"default\.yaml"):
        config_of()


def test_an_option_that_the_environment_contradicts_is_refused(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_PRECISION", "fp32")
    with pytest.raises(InvalidSettings, match="--precision bf16 and CLASSIFIER_PRECISION=fp32"):
        config_of(MODEL, "--precision", "bf16")


@pytest.mark.parametrize(
    ("batch", "limits", "words"),
    [
        (1024, {}, "max_response_size"),
        (8, {"max_response_size": 1_000_000}, "max_response_size"),
        (8, {"max_request_size": 10_000}, "max_request_size"),
    ],
)
def test_limits_that_torchserve_would_not_hold_are_refused(
    tmp_path: Path, batch: int, limits: dict[str, Any], words: str
) -> None:
    plan = planned(tmp_path, "--batch-size", str(batch))
    plan = replace(plan, server=replace(plan.server, **limits))
    with pytest.raises(InvalidSettings, match=words):
        plan.check_limits(["tench"] * 1000)


# --- Archives that are given


def given(*argv: str) -> tuple[ModelPlan, ...]:
    return plan_service(parse_serve([*argv])).given


def test_a_given_archive_is_served_under_the_options_of_the_start(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = read_config(archive)
    (plan,) = given("--archive", str(archive), "--workers", "3", "--device", "cpu")
    assert plan.served_as == f"{MODEL}/1.0"
    assert plan.config == own | {
        "minWorkers": 3,
        "maxWorkers": 3,
        "deviceType": "cpu",
        "handler": own["handler"] | {"device": "cpu"},
    }
    monkeypatch.setattr(planning, "available_cores", lambda: 7)  # and not those of its maker
    (plan,) = given("--archive", str(archive), "--device", "cpu")
    assert plan.config["minWorkers"] == 7


def test_a_given_archive_is_held_against_the_settings(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidSettings, match="max_response_size"):
        given("--archive", str(archive), "--batch-size", "1024")
    monkeypatch.setenv("CLASSIFIER_ENV", "production")
    with pytest.raises(InvalidSettings, match=r"mar is untrained.* production"):
        given("--archive", str(archive))


def test_a_given_archive_of_others_is_refused(tmp_path: Path) -> None:
    manifest = {"model": {"modelName": "other", "modelVersion": "1.0"}}
    with zipfile.ZipFile(tmp_path / "other.mar", "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    with pytest.raises(InvalidModel, match=r"other\.mar is damaged, or was not made by"):
        given("--archive", str(tmp_path / "other.mar"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parallelType": "custom"}, "parallelType is unknown"),
        ({"minWorkers": 0}, "minWorkers must be a whole number, 1 or more, got 0"),
        ({"deviceType": "tpu"}, "deviceType must be one of cpu, gpu, got 'tpu'"),
        ({"handler": {"topk": 3}}, "handler.topk is unknown"),
    ],
)
def test_a_given_archives_configuration_is_held_against_the_rules(
    archive: Path, change: dict[str, Any], words: str
) -> None:
    """No hash covers it, and TorchServe would take whatever it says."""
    configure(archive, read_config(archive) | change)
    with pytest.raises(InvalidSettings, match=words):
        given("--archive", str(archive))


@pytest.mark.parametrize(
    "content", [b"", b"[1", b"!!bool x", b"3", b"handler: null\nbatchSize: 1", b"batchSize: 1"]
)
def test_a_given_archive_with_a_broken_configuration_is_one_line(
    archive: Path, content: bytes
) -> None:
    put(archive, CONFIG_FILE, content)
    with pytest.raises(InvalidSettings, match=r"mar: model-config\.yaml: [^\n]+$"):
        given("--archive", str(archive))


def test_a_folder_stands_for_its_archives(archive: Path, tmp_path: Path) -> None:
    folder = ["--archive", str(archive.parent)]
    assert [(plan.archive, plan.served_as) for plan in given(*folder)] == [
        (archive, f"{MODEL}/1.0")
    ]
    for other in (["--archive", str(archive)], ["--model", MODEL]):
        with pytest.raises(SetupError, match=f"{MODEL}/1.0, which is served already"):
            given(*folder, *other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match=r"no \.mar file in .*empty"):
        given("--archive", str(tmp_path / "empty"))


def test_a_gpu_that_is_not_there_is_refused_for_each_model(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.torchserve.config.count_gpus", lambda: 2)
    for model in (["--archive", str(archive)], ["--model", MODEL]):
        with pytest.raises(InvalidSettings, match="deviceIds must be 0 to 1"):
            given(*model, "--device-ids", "2")

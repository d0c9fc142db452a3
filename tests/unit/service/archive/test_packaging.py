"""Archives: their configuration, what they hold, and when they are made again."""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from ts.context import Context, RequestProcessor

from handler.engines import load_engine
from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.image_classifier import ImageClassifier
from handler.metrics import Metrics
from handler.model_card import ModelCard
from handler.networks import build_network, get_recipe
from handler.settings import Settings
from service import serving as serve
from service.archive import store as archives
from service.archive import weights
from service.archive.packaging import main, package
from service.archive.store import (
    HANDLER,
    check_device_ids,
    check_limits,
    file_facts,
    find_current,
    given_config,
    model_config,
    read_card,
    read_digest,
    untrained_facts,
)
from service.archive.weights import DownloadFailed
from service.logs import Log
from service.options import parse_package, parse_serve
from service.serving import find_archives
from service.torchserve.server import MODEL_CONFIG
from tests.drawing import encode, noise, plain
from tests.processes import free_ports

MODEL = "squeezenet1_1"
RECIPE = get_recipe(MODEL)
CONFIGS = sorted((HANDLER / "configs").glob("*.yaml"))


def options(*argv: str) -> Namespace:
    return parse_package(["--model", MODEL, "--weights", "untrained", "--workers", "1", *argv])


# --- TorchServe's model configuration


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configurations in place of ours."""
    folder = tmp_path / "handler" / "configs"
    folder.mkdir(parents=True)
    (folder / "default.yaml").write_text("batchSize: 8\nmaxBatchDelay: 1\nhandler: {top_k: 3}\n")
    monkeypatch.setattr(archives, "HANDLER", tmp_path / "handler")
    return folder


def config_of(model: str = MODEL, *argv: str) -> dict[str, Any]:
    return model_config(model, parse_package(["--workers", "1", *argv]))


WITHOUT_MODEL = {"metrics.yaml"}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.name not in WITHOUT_MODEL], ids=lambda path: path.name
)
def test_our_configurations_are_valid(path: Path) -> None:
    config = config_of(path.stem)
    assert set(config) <= set(MODEL_CONFIG) | {"minWorkers", "maxWorkers"}
    Settings.load(config["handler"], {})
    assert config["responseTimeout"] > 0  # TorchServe's default is two minutes
    assert config["maxBatchDelay"] > 0  # TorchServe takes 0 for 100


def test_our_configurations_are_of_known_models() -> None:
    names = {path.stem for path in CONFIGS if path.name not in WITHOUT_MODEL} - {"default"}
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
    (configs / f"{MODEL}.yaml").write_text("batchSize: 2\n")
    config = config_of()
    assert (config["batchSize"], config["maxBatchDelay"]) == (2, 1)
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
        ("", 1, 4),  # no more than 4 on one
        ("--device cuda", 2, 6),  # 3 cores for each
        ("", 8, 8),  # one at least
        ("--workers-per-gpu 5", 2, 10),
        ("--workers-per-gpu 5", 0, 6),
        ("--workers-per-gpu 5 --workers 3", 2, 3),
        ("--device-ids 1", 2, 4),
        ("--device-ids 1,2 --workers-per-gpu 2", 4, 4),
        ("--device-ids 1", 0, 6),
    ],
)
def test_workers_by_themselves(
    configs: Path, monkeypatch: pytest.MonkeyPatch, argv: str, gpus: int, workers: int
) -> None:
    monkeypatch.setattr(archives, "available_cores", lambda: 6)
    monkeypatch.setattr(archives, "usable_gpus", lambda config: gpus)
    config = model_config(MODEL, parse_package(argv.split()))
    assert (config["minWorkers"], config["maxWorkers"]) == (workers, workers)


def test_device_ids_go_over_the_file(configs: Path) -> None:
    (configs / f"{MODEL}.yaml").write_text("deviceIds: [3]\n")
    assert config_of()["deviceIds"] == [3]
    assert config_of(MODEL, "--device-ids", "1,0")["deviceIds"] == [1, 0]


@pytest.mark.parametrize("ids", [[2], [0, 2], [-1]])
def test_a_gpu_that_is_not_there(ids: list[int]) -> None:
    with pytest.raises(InvalidSettings) as refused:
        check_device_ids({"deviceIds": ids}, 2)
    assert str(refused.value) == f"deviceIds must be 0 to 1, the GPUs here, got {ids[-1]}"


@pytest.mark.parametrize(("ids", "gpus"), [([0, 1], 2), ([5], 0)], ids=["all", "on a CPU"])
def test_gpus_that_are_there(ids: list[int], gpus: int) -> None:
    check_device_ids({"deviceIds": ids}, gpus)
    check_device_ids({}, gpus)


def test_empty_files_say_nothing(configs: Path) -> None:
    (configs / "default.yaml").write_text("# nothing\nhandler:\n")
    (configs / f"{MODEL}.yaml").write_text("")
    assert config_of() == {"handler": {}, "minWorkers": 1, "maxWorkers": 1}


@pytest.mark.parametrize(
    "key", ["batchsize", "batch_size", "rateLimiter", "top_k", "3", "minWorkers", "useJobTicket"]
)
def test_unknown_key_is_refused(configs: Path, key: str) -> None:
    (configs / f"{MODEL}.yaml").write_text(f"{key}: 3\n")
    with pytest.raises(InvalidSettings) as refused:
        config_of()
    assert str(refused.value).startswith(f"{MODEL}.yaml: {key} is unknown; known: ")
    assert "batchSize" in str(refused.value)


@pytest.mark.parametrize("value", ["true", "'8'", "8.5", "[8]", "{a: 1}", "null", "eight"])
def test_key_of_the_wrong_type_is_refused(configs: Path, value: str) -> None:
    (configs / "default.yaml").write_text(f"batchSize: {value}\n")
    with pytest.raises(InvalidSettings) as refused:
        config_of()
    seen = yaml.safe_load(value)
    assert str(refused.value) == (
        f"default.yaml: batchSize must be a whole number, 1 or more, got {seen!r}"
    )


@pytest.mark.parametrize("text", ["a: [", "\tbatchSize: 8", "a: b: c", "- batchSize", "text", "3"])
def test_what_is_no_mapping_is_refused(configs: Path, text: str) -> None:
    (configs / "default.yaml").write_text(text)
    with pytest.raises(InvalidSettings, match=r"default\.yaml"):
        config_of()


@pytest.mark.parametrize("section", ["3", "[top_k]", "text"])
def test_handler_section_must_be_a_mapping(configs: Path, tmp_path: Path, section: str) -> None:
    (configs / "default.yaml").write_text(f"handler: {section}\n")
    with pytest.raises(InvalidSettings):
        package(MODEL, options(), tmp_path / "store")


# --- The digest of an archive's inputs


NO_CHOICE: dict[str, Any] = {"weights_prefix": None, "transform_input": None}


def digest(
    model: str = MODEL,
    recipe: str | None = None,
    labels: Path | None = None,
    config: dict[str, Any] | None = None,
    architecture: str = MODEL,
) -> str:
    given = Namespace(**NO_CHOICE, recipe=recipe, labels=labels, calibration=None, version="1.0")
    return archives.digest(model, given, config or {"batchSize": 8}, untrained_facts(architecture))


def test_digest_is_stable() -> None:
    assert digest() == digest()
    assert len(digest()) == 64


@pytest.mark.parametrize(
    "config",
    [
        {"batchSize": 9},
        {"handler": {"threads": 3}},
        {"handler": {"engine": "openvino"}},
        {"handler": {"precision": "bf16"}},
    ],
)
def test_digest_is_the_same_for_what_decides_no_content(config: dict[str, Any]) -> None:
    assert digest(config=config) == digest()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "alexnet"},
        {"recipe": "R2"},
        {"config": {"handler": {"engine": "torch"}}},
        {"config": {"deviceType": "gpu"}},
        {"architecture": "alexnet"},  # other weights
    ],
    ids=str,
)
def test_digest_changes_with_each_input(change: dict[str, Any]) -> None:
    assert digest(**change) != digest()


def test_digest_changes_with_the_labels_file(tmp_path: Path) -> None:
    seen = {digest()}
    for name, content in (("a.txt", "a\nb"), ("a.txt", "b\na"), ("a.json", "b\na")):
        (tmp_path / name).write_text(content)
        seen.add(digest(labels=tmp_path / name))
    assert len(seen) == 4


def test_digest_changes_with_the_weights_file(tmp_path: Path) -> None:
    seen = set()
    for name, content in (("a.pth", b"1"), ("a.pth", b"2"), ("b.pth", b"2")):
        (tmp_path / name).write_bytes(content)
        given = Namespace(**NO_CHOICE, recipe=None, labels=None, calibration=None, version="1.0")
        seen.add(archives.digest(MODEL, given, {}, file_facts(tmp_path / name)))
    assert len(seen) == 3


@pytest.mark.parametrize("choice", [{"weights_prefix": ""}, {"transform_input": "on"}], ids=str)
def test_digest_changes_with_a_choice_among_the_weights(choice: dict[str, Any]) -> None:
    given = NO_CHOICE | choice
    options = Namespace(**given, recipe=None, labels=None, calibration=None, version="1.0")
    config = {"batchSize": 8}
    assert archives.digest(MODEL, options, config, untrained_facts(MODEL)) != digest()


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_digest_changes_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = digest()
    copy = Path(shutil.copytree(HANDLER, tmp_path / "handler"))
    monkeypatch.setattr(archives, "HANDLER", copy)
    assert digest() == before
    if change == "edit":
        (copy / "answers.py").write_text((copy / "answers.py").read_text() + "# changed\n")
    elif change == "add":
        (copy / "new.py").write_text("")
    else:
        (copy / "rows.py").unlink()
    assert digest() != before


def test_digest_changes_with_what_makes_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest()
    copy = Path(shutil.copytree(archives.MAKERS, tmp_path / "makers"))
    monkeypatch.setattr(archives, "MAKERS", copy)
    (copy / "store.py").write_text("# changed\n")
    assert digest() == before
    seen = {before}
    for name in ("saturation", "weights", "checkpoints", "fitting", "labels"):
        (copy / f"{name}.py").write_text("# changed\n")
        assert digest() not in seen
        seen.add(digest())


def test_digest_changes_with_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    monkeypatch.setattr(archives, "version", lambda name: "0.0.0")
    assert digest() != before


# --- A real archive


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(MODEL, options(), tmp_path_factory.mktemp("built") / "new" / "store")


@pytest.fixture
def archive(built: Path, tmp_path: Path) -> Path:
    """A copy to do things to."""
    (tmp_path / "store").mkdir()
    return Path(shutil.copy2(built, tmp_path / "store"))


def test_the_store_holds_the_archive_and_nothing_else(built: Path) -> None:
    assert [path.name for path in built.parent.iterdir()] == [f"{MODEL}.mar"]


def test_content_of_an_archive(built: Path) -> None:
    modules = {f"handler/{path.name}" for path in HANDLER.glob("*.py")}
    assert set(zipfile.ZipFile(built).namelist()) - {"handler/", "MAR-INF/"} == modules | {
        "MAR-INF/MANIFEST.json",
        "image_classifier.py",
        "model-config.yaml",
        "model.json",
        "openvino.bin",
        "openvino.xml",
        "weights.safetensors",
    }


def test_manifest_of_an_archive(built: Path) -> None:
    model = json.loads(zipfile.ZipFile(built).read("MAR-INF/MANIFEST.json"))["model"]
    assert model["modelName"] == MODEL
    assert model["modelVersion"] == "1.0"
    assert model["handler"] == "image_classifier.py"
    assert model["serializedFile"] == "weights.safetensors"
    assert model["configFile"] == "model-config.yaml"


def test_code_of_an_archive_is_ours(built: Path) -> None:
    content = zipfile.ZipFile(built)
    for path in HANDLER.glob("*.py"):
        assert content.read(f"handler/{path.name}") == path.read_bytes()
    assert content.read("image_classifier.py") == (HANDLER / "image_classifier.py").read_bytes()


def test_configuration_of_an_archive(built: Path) -> None:
    config = yaml.safe_load(zipfile.ZipFile(built).read("model-config.yaml"))
    assert config == model_config(MODEL, options())


def test_card_of_an_archive(built: Path) -> None:
    card = ModelCard.from_json(zipfile.ZipFile(built).read("model.json"))
    assert (card.architecture, card.recipe) == (MODEL, str(RECIPE))
    assert card.labels == tuple(RECIPE.meta["categories"])
    assert card.parameters == dict.fromkeys(("total", "trainable"), RECIPE.meta["num_params"])
    assert (card.weights.name, card.weights.trained) == ("untrained", False)
    assert set(card.packaged_with) == {"torch", "torchvision", "openvino", "torch-model-archiver"}


def test_weights_of_an_archive_fit(built: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(built).extract("weights.safetensors", tmp_path)
    network = build_network(RECIPE, MODEL, 1000)
    network.load_state_dict(load_file(tmp_path / "weights.safetensors"))


def test_the_handler_answers_from_an_archive(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metrics, "start", lambda *_: None)
    zipfile.ZipFile(built).extractall(tmp_path)
    manifest = json.loads((tmp_path / "MAR-INF" / "MANIFEST.json").read_text())
    config = yaml.safe_load((tmp_path / "model-config.yaml").read_text())
    config["handler"] |= {"device": "cpu", "warmup_batches": 0}
    context = Context(MODEL, str(tmp_path), manifest, 1, None, "0.12.0", model_yaml_config=config)
    context.request_ids = {0: "id-0"}
    context.request_processor = [RequestProcessor({})]
    classifier = ImageClassifier()
    classifier.initialize(context)
    [answer] = classifier.handle([{"body": encode(noise(), "JPEG")}], context)
    assert json.loads(answer)["metadata"]["weights"] == "untrained"
    assert len(json.loads(answer)["predictions"]) == 5


def test_digest_of_an_archive_is_read_back(built: Path) -> None:
    card = ModelCard.from_json(zipfile.ZipFile(built).read("model.json"))
    assert read_digest(built) == card.inputs_sha256


# --- Made again or not


def test_the_same_inputs_make_nothing_new(archive: Path) -> None:
    before = archive.stat()
    assert package(MODEL, options(), archive.parent) == archive
    after = archive.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_changed_option_is_put_into_the_archive(archive: Path, built: Path) -> None:
    given = options("--batch-size", "3")
    assert package(MODEL, given, archive.parent) == archive
    with zipfile.ZipFile(archive) as new, zipfile.ZipFile(built) as old:
        assert new.namelist() == old.namelist()
        differ = [name for name in new.namelist() if new.read(name) != old.read(name)]
        assert yaml.safe_load(new.read("model-config.yaml")) == model_config(MODEL, given)
    assert differ == ["model-config.yaml"]
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_an_archive_that_cannot_be_written_is_an_error(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("service.archive.store.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(SetupError, match=r"mar cannot be written: no space left"):
        package(MODEL, options("--batch-size", "3"), archive.parent)


def test_a_store_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any) -> None:
        raise AssertionError("weights are read for nothing")

    monkeypatch.setattr(sys.modules["service.archive.packaging"], "read_weights", work)
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"mar has to be made, and cannot be written: .*file"):
        package(MODEL, options(), tmp_path / "file" / "store")


def test_a_damaged_archive_is_made_again(archive: Path, built: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    assert read_digest(archive) is None
    package(MODEL, options(), archive.parent)
    assert read_digest(archive) == read_digest(built)
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"no zip at all"])
def test_no_digest_of_what_is_no_archive(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.mar").write_bytes(content)
    assert read_digest(tmp_path / "x.mar") is None


@pytest.mark.parametrize("card", [None, b"", b"{}", b"\xff\xfe", b'{"inputs_sha256": "x"}'])
def test_no_digest_of_a_foreign_archive(tmp_path: Path, card: bytes | None) -> None:
    with zipfile.ZipFile(tmp_path / "x.mar", "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", "{}")
        if card is not None:
            content.writestr("model.json", card)
    assert read_digest(tmp_path / "x.mar") is None


def test_damage_by_chance_is_no_crash(tmp_path: Path) -> None:
    small = tmp_path / "small.mar"
    with zipfile.ZipFile(small, "w") as content:
        content.writestr("model.json", json.dumps({"labels": ["a"]}) * 3)
        content.writestr("weights.safetensors", bytes(100))
    whole = small.read_bytes()
    for seed in range(400):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        small.write_bytes(data)
        assert read_digest(small) is None, seed


# --- Known to be up to date, without torch


def current(archive: Path, *argv: str) -> Path | None:
    return find_current(MODEL, options(*argv), archive.parent)


def test_an_archive_is_known_again_and_left_alone(archive: Path) -> None:
    before = archive.stat()
    assert current(archive) == archive
    assert current(archive, "--batch-size", "3") == archive
    after = archive.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", str(RECIPE)],
        ["--precision", "int8"],
        ["--device", "cuda"],
        ["--labels", "missing.txt"],
        ["--weights", "missing.pth"],
        ["--weights", "pretrained"],
    ],
    ids=" ".join,
)
def test_whatever_differs_is_left_to_packaging(archive: Path, argv: list[str]) -> None:
    assert current(archive, *argv) is None


def test_a_missing_or_damaged_archive_is_left_to_packaging(archive: Path) -> None:
    assert find_current("birdnet", options(), archive.parent) is None
    archive.write_bytes(archive.read_bytes()[:-100])
    assert current(archive) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLASSIFIER_ENV", "production"),  # refuses untrained weights
        ("CLASSIFIER_PRECISION", "int8"),  # has no engine
        ("CLASSIFIER_DEVICE", "cuda"),  # there is none
    ],
)
def test_what_the_environment_alone_says_is_left_to_packaging(
    archive: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(archives, "has_gpu", lambda: False)
    monkeypatch.setenv(name, value)
    assert current(archive) is None


def test_limits_are_held_against_an_archive_that_is_up_to_date(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_MAX_RESPONSE_SIZE", "1000000")
    with pytest.raises(InvalidSettings, match="max_response_size is 1000000"):
        current(archive)


def test_untrained_weights_that_nobody_asked_for_are_left_to_packaging(archive: Path) -> None:
    given = parse_package(["--model", MODEL, "--workers", "1"])
    assert find_current(MODEL, given, archive.parent) is None


def test_own_weights_are_known_by_their_bytes(tmp_path: Path) -> None:
    given = options(*own(tmp_path, 2, ["a", "b"]))
    archive = package(MODEL, given, tmp_path / "store")
    assert find_current(MODEL, given, tmp_path / "store") == archive
    (tmp_path / "birds.txt").write_text("b\na\n")
    assert find_current(MODEL, given, tmp_path / "store") is None
    (tmp_path / "birds.txt").write_text("a\nb\n")
    (tmp_path / "birds.pth").write_bytes(b"other")
    assert find_current(MODEL, given, tmp_path / "store") is None


def test_pretrained_weights_once_packaged_are_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "cached.pth")
    monkeypatch.setattr(weights, "download", lambda *_: tmp_path / "cached.pth")
    given = parse_package(["--model", MODEL, "--workers", "1"])
    archive = package(MODEL, given, tmp_path)
    card = read_card(archive)
    assert card is not None
    assert (card.weights.name, card.weights.source) == (str(RECIPE), "torchvision")
    (tmp_path / "cached.pth").unlink()
    monkeypatch.delattr(weights, "download")
    for argv in ([], ["--weights", "pretrained"]):
        given = parse_package(["--model", MODEL, "--workers", "1", *argv])
        assert find_current(MODEL, given, tmp_path) == archive
        assert package(MODEL, given, tmp_path) == archive


def test_own_weights_are_not_taken_for_pretrained_ones(tmp_path: Path) -> None:
    package(MODEL, options(*own(tmp_path, 2, ["a", "b"])), tmp_path)
    for argv in ([], ["--weights", "pretrained"]):
        given = parse_package(["--model", MODEL, "--workers", "1", *argv])
        assert find_current(MODEL, given, tmp_path) is None


def test_an_archive_is_known_again_without_torch(archive: Path) -> None:
    """What ./scripts/serve imports and calls before Java starts."""
    code = (
        "import sys; from pathlib import Path; import service.serving as serve; "
        "from service.options import parse_package; *argv, store = sys.argv[1:]; "
        f"assert serve.find_current({MODEL!r}, parse_package(argv), Path(store)); "
        "print({'torch', 'torchvision', 'safetensors', 'numpy', 'PIL'} & {*sys.modules})"
    )
    argv = ["--model", MODEL, "--weights", "untrained", "--workers", "1", str(archive.parent)]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=HANDLER.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "set()\n", done.stderr


# --- Archives that are given


def test_a_given_archive_is_served_under_the_options_of_the_start(archive: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        own = yaml.safe_load(content.read("model-config.yaml"))
    given = parse_serve(["--archive", str(archive), "--workers", "3", "--device", "cpu"])
    config = given_config(archive, given)
    assert config == own | {
        "minWorkers": 3,
        "maxWorkers": 3,
        "deviceType": "cpu",
        "handler": own["handler"] | {"device": "cpu"},
    }


def test_workers_of_a_given_archive_are_those_of_this_machine(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "available_cores", lambda: 7)
    given = parse_serve(["--archive", str(archive), "--device", "cpu"])
    assert given_config(archive, given)["minWorkers"] == 7


def test_a_given_archive_is_held_against_the_settings(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parse_serve(["--archive", str(archive), "--batch-size", "1024"])
    with pytest.raises(InvalidSettings, match="max_response_size"):
        given_config(archive, given)
    monkeypatch.setenv("CLASSIFIER_ENV", "production")
    with pytest.raises(InvalidSettings, match=r"mar is untrained.* production"):
        given_config(archive, parse_serve(["--archive", str(archive)]))


def test_a_given_archive_of_others_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.mar", "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", "{}")
    given = parse_serve(["--archive", str(tmp_path / "other.mar")])
    with pytest.raises(InvalidModel, match=r"other\.mar is damaged, or was not made by"):
        given_config(tmp_path / "other.mar", given)


@pytest.mark.parametrize("packaged", ["now", "before", "given"])
def test_an_archive_that_is_replaced_after_the_check_is_not_served(
    archive: Path, monkeypatch: pytest.MonkeyPatch, packaged: str
) -> None:
    """As by another start, with other weights, in the same store."""
    monkeypatch.setenv("TS_MODEL_STORE", str(archive.parent))
    monkeypatch.setenv("JAVA_HOME", str(archive.parent / "java"))
    java = archive.parent / "java" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\nexit 0\n")
    java.chmod(0o755)
    if packaged == "now":
        monkeypatch.setattr(serve, "find_current", lambda *_: None)
        monkeypatch.setattr(serve, "package_apart", lambda *_: 0)
    model = ["--model", MODEL, "--weights", "untrained"]
    if packaged == "given":
        model = ["--archive", str(archive)]
    ports = [f"--{name}={port}" for name, port in free_ports().items()]
    args = parse_serve([*model, "--workers", "1", *ports])
    server = serve.prepare(args, Log("json")).server
    server.start()  # nothing has changed
    server.stop()
    server = serve.prepare(args, Log("json")).server
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    card = json.loads(contents["model.json"])
    contents["model.json"] = json.dumps(card | {"inputs_sha256": "0" * 64}).encode()
    with zipfile.ZipFile(archive.parent / "other", "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)
    (archive.parent / "other").replace(archive)
    with pytest.raises(SetupError, match=r"mar was replaced by another while this started"):
        server.start()
    server.stop()


def test_a_folder_stands_for_its_archives(archive: Path, tmp_path: Path) -> None:
    given = parse_serve(["--archive", str(archive.parent)])
    assert find_archives(given) == {archive: f"{MODEL}/1.0"}
    for other in (["--archive", str(archive)], ["--model", MODEL]):
        given = parse_serve(["--archive", str(archive.parent), *other])
        with pytest.raises(SetupError, match=f"{MODEL}/1.0, which is served already"):
            find_archives(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match=r"no \.mar file in .*empty"):
        find_archives(parse_serve(["--archive", str(tmp_path / "empty")]))


# --- Own weights and labels


def own(folder: Path, classes: int, names: list[str]) -> list[str]:
    """Options for a fine-tuned model."""
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=classes)
    torch.save({"state_dict": network.state_dict()}, folder / "birds.pth")
    (folder / "birds.txt").write_text("\n".join(names) + "\n")
    return [
        *("--weights", str(folder / "birds.pth"), "--labels", str(folder / "birds.txt")),
        *("--recipe", str(RECIPE)),
    ]


def test_own_weights_and_labels(tmp_path: Path) -> None:
    archive = package(MODEL, options(*own(tmp_path, 2, ["heron", "鷺"])), tmp_path / "store")
    card = ModelCard.from_json(zipfile.ZipFile(archive).read("model.json"))
    assert card.labels == ("heron", "鷺")
    assert (card.weights.name, card.weights.trained) == ("birds.pth", True)
    assert card.weights.source == "file"
    zipfile.ZipFile(archive).extract("weights.safetensors", tmp_path)
    given = torch.load(tmp_path / "birds.pth", weights_only=True)["state_dict"]
    packed = load_file(tmp_path / "weights.safetensors")
    assert set(packed) == set(given)
    assert all(torch.equal(packed[name], given[name]) for name in given)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--labels has 3 names, the weights have 2 classes"),
        (["--recipe", "R"], "'R' is not a recipe of squeezenet1_1"),
        (["--labels", "missing.txt"], "--labels missing.txt cannot be read as text"),
        (["--weights", "missing.pth"], "--weights missing.pth: there is no such file"),
        (["--weights", "untrained"], "--labels has 3 names, the weights have 1000 classes"),
    ],
    ids=["count", "recipe", "labels", "weights", "untrained"],
)
def test_what_does_not_go_together(tmp_path: Path, argv: list[str], message: str) -> None:
    given = options(*own(tmp_path, 2, ["a", "b", "c"]), *argv)
    with pytest.raises(InvalidModel) as refused:
        package(MODEL, given, tmp_path / "store")
    assert message in str(refused.value)
    assert not list((tmp_path / "store").glob("*"))


def test_weights_of_another_architecture_are_refused_with_their_file(tmp_path: Path) -> None:
    given = parse_package(["--model", "alexnet", *own(tmp_path, 2, ["a", "b"])[:4]])
    with pytest.raises(InvalidModel) as refused:
        package("alexnet", given, tmp_path / "store")
    assert str(refused.value).startswith(f"{tmp_path / 'birds.pth'}: does not fit alexnet: ")


def test_a_failure_leaves_the_last_archive(archive: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(InvalidModel):
        package(MODEL, options(*own(archive.parent.parent, 2, ["a"])), archive.parent)
    assert archive.read_bytes() == before


# --- Refusals before any work


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="'birdnet' is not a torchvision classifier"):
        package("birdnet", options(), tmp_path)


def test_recipe_without_classes_is_refused(tmp_path: Path) -> None:
    """Weights for feature extraction: their last layer is not trained, and has no names."""
    argv = "--model vgg16 --recipe VGG16_Weights.IMAGENET1K_FEATURES --weights untrained"
    with pytest.raises(InvalidModel):
        package("vgg16", parse_package(argv.split()), tmp_path)


def test_int8_without_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="package it with --calibration DIR"):
        package(MODEL, options("--device", "cpu", "--precision", "int8"), tmp_path)
    monkeypatch.setenv("CLASSIFIER_PRECISION", "int8")
    with pytest.raises(InvalidSettings, match="package it with --calibration DIR"):
        package(MODEL, options("--device", "cpu"), tmp_path)


def test_int8_for_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASSIFIER_ENGINE", "torch")
    with pytest.raises(InvalidSettings, match="which only runs on a CPU"):
        package(MODEL, options("--calibration", str(tmp_path)), tmp_path)


def test_too_few_calibration_images_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(noise()))
    with pytest.raises(InvalidModel, match="int8 needs 100 images or more"):
        package(MODEL, options("--calibration", str(folder)), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    for seed in range(100):
        (folder / f"{seed}.png").write_bytes(encode(noise(seed=seed)))
    return folder


@pytest.mark.precision("int8")
def test_an_int8_model_is_packaged_with_its_report_and_served(
    tmp_path: Path, calibration: Path
) -> None:
    given = options("--calibration", str(calibration), "--minimum-agreement", "0")
    archive = package(MODEL, given, tmp_path)
    content = zipfile.ZipFile(archive)
    assert {"openvino-int8.xml", "openvino-int8.bin", "openvino.xml"} <= set(content.namelist())
    card = ModelCard.from_json(content.read("model.json"))
    assert card.int8
    assert (card.int8["calibration_images"], card.int8["measured_images"]) == (50, 50)
    content.extractall(tmp_path / "unpacked")
    settings = Settings(device="cpu")
    engine = load_engine(card, tmp_path / "unpacked", settings, gpu_id=None, workers=1)
    assert engine.name == "openvino-int8"
    seeded = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=seeded)
    settings = Settings(device="cpu", precision="fp32")
    fp32 = load_engine(card, tmp_path / "unpacked", settings, gpu_id=None, workers=1)
    wanted = fp32.probabilities(images)
    torch.testing.assert_close(engine.probabilities(images), wanted, rtol=0, atol=0.02)
    assert find_current(MODEL, given, tmp_path) == archive


def test_digest_changes_with_the_calibration(calibration: Path, tmp_path: Path) -> None:
    def digest_of(folder: Path, agreement: float = 0.97) -> str:
        given = Namespace(
            **NO_CHOICE,
            recipe=None,
            labels=None,
            calibration=str(folder),
            minimum_agreement=agreement,
            version="1.0",
        )
        return archives.digest(MODEL, given, {}, untrained_facts(MODEL))

    shutil.copytree(calibration, tmp_path / "more")
    before = digest_of(tmp_path / "more")
    assert before == digest_of(calibration)
    assert before not in (digest(), digest_of(calibration, agreement=0.9))
    (tmp_path / "more" / "0.png").write_bytes(encode(plain()))
    assert digest_of(tmp_path / "more") != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="torch sees no GPU here"):
        package(MODEL, options("--device", "cuda"), tmp_path)


def test_settings_of_the_environment_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_TOP_K", "0")
    with pytest.raises(InvalidSettings, match="top_k must be 1 to 1000, got 0"):
        package(MODEL, options(), tmp_path)


def test_production_packages_no_untrained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_ENV", "production")
    with pytest.raises(InvalidSettings) as refused:
        package(MODEL, options(), tmp_path)
    assert "squeezenet1_1 would be untrained" in str(refused.value)
    assert "CLASSIFIER_ENV is production" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


# --- No network


@pytest.fixture
def offline(tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.usefixtures("offline")
def test_without_a_network_untrained_weights_are_taken_loudly(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = parse_package(["--model", MODEL, "--workers", "1"])
    archive = package(MODEL, given, tmp_path / "store")
    assert read_digest(archive) == read_digest(built)
    warnings = capsys.readouterr().err
    assert f"warning: {RECIPE.url} cannot be downloaded: " in warnings
    assert "is served UNTRAINED: it answers, but its answers mean nothing" in warnings


@pytest.mark.usefixtures("offline")
def test_pretrained_weights_asked_for_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed):
        package(MODEL, options("--weights", "pretrained"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


# --- The command


def test_command(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", str(archive.parent))
    assert main(["--model", MODEL, "--weights", "untrained", "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{archive}  {archive.stat().st_size / 2**20:.1f} MiB\n"


def test_command_that_fails_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path))
    assert main(["--model", "birdnet", "--weights", "untrained"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: 'birdnet' is not a torchvision classifier")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("key", ["maxBatchDelay", "batchSize", "responseTimeout"])
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_that_torchserve_would_ignore_are_refused(
    configs: Path, key: str, value: int
) -> None:
    (configs / "default.yaml").write_text(f"{key}: {value}\n")
    with pytest.raises(InvalidSettings, match=f"{key} must be a whole number, 1 or more"):
        config_of()


def test_handler_sections_are_merged(configs: Path) -> None:
    (configs / "default.yaml").write_text("handler: {top_k: 3, max_images: 4}\n")
    (configs / f"{MODEL}.yaml").write_text("handler: {max_images: 2}\n")
    assert config_of()["handler"] == {"top_k": 3, "max_images": 2}


def test_an_option_that_the_environment_contradicts_is_refused(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_PRECISION", "fp32")
    with pytest.raises(InvalidSettings, match="--precision bf16 and CLASSIFIER_PRECISION=fp32"):
        config_of(MODEL, "--precision", "bf16")


@pytest.mark.parametrize(
    ("batch", "server", "words"),
    [
        (1024, {}, "max_response_size"),
        (8, {"max_response_size": "1000000"}, "max_response_size"),
        (8, {"max_request_size": "10000"}, "max_request_size"),
    ],
)
def test_limits_that_torchserve_would_not_hold_are_refused(
    batch: int, server: dict[str, str], words: str
) -> None:
    limits = {"max_response_size": "67108864", "max_request_size": "16777216"} | server
    with pytest.raises(InvalidSettings, match=words):
        check_limits(Settings(), {"batchSize": batch}, ["tench"] * 1000, limits)


def test_untrained_weights_that_nobody_asked_for_lose_no_trained_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "own.pth")
    own = ["--model", MODEL, "--weights", str(tmp_path / "own.pth")]
    archive = package(MODEL, parse_package(own), tmp_path / "store")
    before = archive.read_bytes()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert package(MODEL, parse_package(["--model", MODEL]), tmp_path / "store") == archive
    aside = tmp_path / "store" / f"{MODEL}.mar.trained"
    assert aside.read_bytes() == before
    assert f"own.pth is kept as {aside}" in capsys.readouterr().err
    with zipfile.ZipFile(archive) as content:
        assert not ModelCard.from_json(content.read("model.json")).weights.trained


def test_an_archive_damaged_in_the_middle_is_made_again(tmp_path: Path) -> None:
    options = parse_package(["--model", MODEL, "--weights", "untrained"])
    archive = package(MODEL, options, tmp_path)
    whole = archive.read_bytes()
    middle = len(whole) // 2
    archive.write_bytes(whole[:middle] + bytes(4096) + whole[middle + 4096 :])
    package(MODEL, options, tmp_path)
    assert read_digest(archive) is not None

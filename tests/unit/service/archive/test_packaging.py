"""Archives: what they hold, when they are made again, and what is refused before any work."""

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from ts.context import Context, RequestProcessor

from handler.collector import Metrics
from handler.engines import load_engine
from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.golden import Golden
from handler.image_classifier import ImageClassifier
from handler.model_card import ModelCard
from handler.networks import get_recipe
from handler.settings import Settings
from scripts.package import main
from service.archive.digest import is_current
from service.archive.mar import read_card, read_config
from service.archive.packaging import HANDLER, package
from service.archive.weights import DownloadFailed
from tests.drawing import encode, noise
from tests.unit.service.planning import MODEL, own_weights, planned

RECIPE = get_recipe(MODEL)


# --- What is in an archive


def test_content_of_an_archive(built: Path) -> None:
    assert [path.name for path in built.parent.iterdir()] == [f"{MODEL}.mar"]
    modules = {f"handler/{path.name}" for path in HANDLER.glob("*.py")}
    assert set(zipfile.ZipFile(built).namelist()) - {"handler/", "MAR-INF/"} == modules | {
        "MAR-INF/MANIFEST.json",
        "golden.safetensors",
        "image_classifier.py",
        "model-config.yaml",
        "model.json",
        "openvino.bin",
        "openvino.xml",
        "weights.safetensors",
    }


def test_golden_answers_of_an_archive_are_those_of_its_engine(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built) as content:
        content.extractall(tmp_path)
    settings = Settings(device="cpu", precision="fp32")
    engine = load_engine(ModelCard.read(tmp_path), tmp_path, settings, gpu_id=None, workers=1)
    assert engine.sameness
    assert engine.sameness.error < 1e-4


def test_manifest_of_an_archive(built: Path) -> None:
    model = json.loads(zipfile.ZipFile(built).read("MAR-INF/MANIFEST.json"))["model"]
    expected = {
        "modelName": MODEL,
        "modelVersion": "1.0",
        "handler": "image_classifier.py",
        "serializedFile": "weights.safetensors",
        "configFile": "model-config.yaml",
    }
    assert model == model | expected


def test_code_of_an_archive_is_ours(built: Path) -> None:
    content = zipfile.ZipFile(built)
    for path in HANDLER.glob("*.py"):
        assert content.read(f"handler/{path.name}") == path.read_bytes()
    assert content.read("image_classifier.py") == (HANDLER / "image_classifier.py").read_bytes()


def test_card_of_an_archive(built: Path) -> None:
    card = ModelCard.from_json(zipfile.ZipFile(built).read("model.json"))
    assert (card.architecture, card.recipe) == (MODEL, str(RECIPE))
    assert card.labels == tuple(RECIPE.meta["categories"])
    assert card.parameters == dict.fromkeys(("total", "trainable"), RECIPE.meta["num_params"])
    assert (card.weights.name, card.weights.trained) == ("untrained", False)
    assert set(card.packaged_with) == {"torch", "torchvision", "openvino", "torch-model-archiver"}


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


# --- Made again or not


def test_the_same_inputs_make_nothing_new(archive: Path) -> None:
    before = archive.stat()
    assert package(planned(archive.parent)) == archive
    after = archive.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_changed_option_is_put_into_the_archive(archive: Path) -> None:
    assert read_config(archive) == planned(archive.parent).config
    plan = planned(archive.parent, "--batch-size", "3")
    assert package(plan) == archive
    assert read_config(archive) == plan.config
    assert read_card(archive) == plan.card


def test_a_store_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: object) -> None:
        raise AssertionError("weights are read for nothing")

    monkeypatch.setattr(sys.modules["service.archive.packaging"], "read_weights", work)
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"mar has to be made, and cannot be written: .*file"):
        package(planned(tmp_path / "file" / "store"))


# --- Own weights and labels


def test_own_weights_and_labels(tmp_path: Path) -> None:
    archive = package(planned(tmp_path / "store", *own_weights(tmp_path, 2, ["heron", "鷺"])))
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
    plan = planned(tmp_path / "store", *own_weights(tmp_path, 2, ["a", "b", "c"]), *argv)
    with pytest.raises(InvalidModel) as refused:
        package(plan)
    assert message in str(refused.value)
    assert not list((tmp_path / "store").glob("*"))


def test_weights_of_another_architecture_are_refused_with_their_file(tmp_path: Path) -> None:
    plan = planned(tmp_path, *own_weights(tmp_path, 2, ["a", "b"])[:4], model="alexnet")
    with pytest.raises(InvalidModel) as refused:
        package(plan)
    assert str(refused.value).startswith(f"{tmp_path / 'birds.pth'}: does not fit alexnet: ")


def test_a_failure_leaves_the_last_archive(archive: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(InvalidModel):
        package(planned(archive.parent, *own_weights(archive.parent.parent, 2, ["a"])))
    assert archive.read_bytes() == before


# --- Golden images of the trainer's


def test_the_card_has_what_the_trainer_gave(built: Path, tmp_path: Path) -> None:
    """A drawn image, and the logits that the same weights give for it in another archive."""
    zipfile.ZipFile(built).extract("golden.safetensors", tmp_path)
    golden = Golden.read(tmp_path)
    assert golden
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "small.png").write_bytes(golden.files["drawn/small.png"])
    np.save(tmp_path / "logits.npy", golden.only(["drawn/small.png"]).logits.numpy())
    given = ["--golden", str(tmp_path / "golden"), "--golden-logits", str(tmp_path / "logits.npy")]
    card, other = read_card(package(planned(tmp_path / "store", *given))), read_card(built)
    assert card
    assert other
    assert (card.golden_images, card.golden_logits) == (1, True)
    assert (other.golden_images, other.golden_logits) == (0, False)


def test_a_golden_image_with_which_no_worker_would_start_is_refused(tmp_path: Path) -> None:
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "a.tif").write_bytes(encode(noise(), "TIFF"))
    with pytest.raises(InvalidModel, match=r"golden image a\.tif: TIFF is not served"):
        package(planned(tmp_path / "store", "--golden", str(tmp_path / "golden")))
    assert not list((tmp_path / "store").glob("*"))


# --- Refusals before any work


def test_recipe_without_classes_is_refused(tmp_path: Path) -> None:
    """Weights for feature extraction: their last layer is not trained, and has no names."""
    plan = planned(tmp_path, "--recipe", "VGG16_Weights.IMAGENET1K_FEATURES", model="vgg16")
    with pytest.raises(InvalidModel):
        package(plan)


def test_int8_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="package it with --calibration DIR"):
        package(planned(tmp_path, "--device", "cpu", "--precision", "int8"))
    monkeypatch.setenv("CLASSIFIER_ENGINE", "torch")
    with pytest.raises(InvalidSettings, match="which only runs on a CPU"):
        package(planned(tmp_path, "--calibration", str(tmp_path)))


def test_too_few_calibration_images_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(noise()))
    with pytest.raises(InvalidModel, match="int8 needs 100 images or more"):
        package(planned(tmp_path / "store", "--calibration", str(folder)))
    assert not (tmp_path / "store").exists()


@pytest.mark.precision("int8")
def test_an_int8_model_is_packaged_with_its_report_and_served(tmp_path: Path) -> None:
    calibration = tmp_path / "images"
    calibration.mkdir()
    for seed in range(100):
        (calibration / f"{seed}.png").write_bytes(encode(noise(seed=seed)))
    given = ["--calibration", str(calibration), "--minimum-agreement", "0"]
    archive = package(planned(tmp_path, *given))
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
    expected = fp32.probabilities(images)
    torch.testing.assert_close(engine.probabilities(images), expected, rtol=0, atol=0.02)
    assert is_current(planned(tmp_path, *given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="torch sees no GPU here"):
        package(planned(tmp_path, "--device", "cuda"))


def test_production_packages_no_untrained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_ENV", "production")
    with pytest.raises(InvalidSettings) as refused:
        package(planned(tmp_path))
    assert "squeezenet1_1 would be untrained" in str(refused.value)
    assert "CLASSIFIER_ENV is production" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


# --- No network


@pytest.fixture
def offline(tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.usefixtures("offline")
def test_pretrained_weights_asked_for_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed):
        package(planned(tmp_path / "store", "--weights", "pretrained"))
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("offline")
def test_without_a_network_untrained_weights_are_taken_loudly_and_lose_no_trained_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    archive = package(planned(store, *own_weights(tmp_path, 2, ["a", "b"])))
    before = archive.read_bytes()
    assert package(replace(planned(store), weights=None)) == archive
    aside = store / f"{MODEL}.mar.trained"
    assert aside.read_bytes() == before
    warnings = capsys.readouterr().err
    assert f"warning: {RECIPE.url} cannot be downloaded: " in warnings
    assert "is UNTRAINED: it answers, but its answers mean nothing" in warnings
    assert f"birds.pth is kept as {aside}" in warnings
    card = read_card(archive)
    assert card is not None
    assert not card.weights.trained


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

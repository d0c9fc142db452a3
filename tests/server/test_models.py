"""Other architectures, untrained weights, and the real ones."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from tests.server.serving import ROOT, Server, serving

MODELS = ("resnet50", "mobilenet_v2", "shufflenet_v2_x0_5")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three models without a network: served, and said to be untrained."""
    options = [word for model in MODELS for word in ("--model", model)]
    with serving(tmp_path_factory.mktemp("offline"), *options, "--workers", "1") as server:
        yield server


def reference(network: torch.nn.Module, recipe: Any, image: Image.Image) -> torch.Tensor:
    """Probabilities [C] as plain torchvision gives them."""
    with torch.inference_mode():
        return network.eval()(recipe.transforms()(image)[None]).softmax(dim=1)[0]


def ask(server: Server, model: str, body: bytes, top_k: int = 5) -> dict[str, Any]:
    response = requests.post(
        f"{server.url}/predictions/{model}",
        data=body,
        headers={"X-Top-K": str(top_k)},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("model", ["resnet50", "shufflenet_v2_x0_5"])
def test_untrained_model_equals_plain_torchvision(offline: Server, model: str) -> None:
    body = (ROOT / "examples" / "clock.jpg").read_bytes()
    answer = ask(offline, model, body, top_k=1000)
    recipe = torchvision.models.get_model_weights(model).DEFAULT
    torch.manual_seed(0)
    network = torchvision.models.get_model(model, weights=None)
    expected = reference(network, recipe, Image.open(io.BytesIO(body)))
    served = torch.zeros(1000)
    for prediction in answer["predictions"]:
        served[prediction["class_id"]] = prediction["confidence"]
    assert (served - expected).abs().max() < 1e-4  # resizing rounds some pixels otherwise
    assert expected.max() > 1.00001 * expected.min(), "all alike: this would compare nothing"
    labels = recipe.meta["categories"]
    best = answer["predictions"][0]
    assert best["class"] == labels[best["class_id"]]


@pytest.mark.parametrize("model", MODELS)
def test_untrained_is_said_everywhere(offline: Server, model: str) -> None:
    body = (ROOT / "examples" / "clock.jpg").read_bytes()
    assert ask(offline, model, body)["metadata"]["weights"] == "untrained"
    info = offline.info(model)
    assert info["weights"] == info["weights"] | {"name": "untrained", "trained": False}
    ready = [line for line in offline.log("model_ready") if line["model"] == model]
    assert [(line["weights"], line["level"]) for line in ready] == [("untrained", "WARNING")]
    assert f"{model} is served UNTRAINED" in offline.text()


def test_another_input_size_from_safetensors(tmp_path: Path) -> None:
    """EfficientNet-B1 takes 240x240; batch norms that have seen a picture make answers differ."""
    torch.manual_seed(1)
    recipe = torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V2
    network = torchvision.models.efficientnet_b1().train()
    body = (ROOT / "examples" / "clock.jpg").read_bytes()
    image = Image.open(io.BytesIO(body))
    with torch.inference_mode():
        for _ in range(20):
            network(torch.stack([recipe.transforms()(image), torch.randn(3, 240, 240)]))
    save_file(network.state_dict(), tmp_path / "b1.safetensors")
    options = ("--model", "efficientnet_b1", "--weights", str(tmp_path / "b1.safetensors"))
    with serving(tmp_path, *options, "--workers", "1", model="efficientnet_b1") as server:
        answer = ask(server, "efficientnet_b1", body)
        assert server.info()["input_size"] == [3, 240, 240]
        assert server.info()["weights"]["name"] == "b1.safetensors"
    expected = reference(network, recipe, image)
    assert expected.max() > 1.2 * expected.median(), "all alike: this would compare nothing"
    for prediction in answer["predictions"]:
        served = prediction["confidence"]
        assert served == pytest.approx(expected[prediction["class_id"]].item(), abs=1e-3)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Server]:
    options = ("--weights", str(shared / "weights" / "mobilenet_v2-imagenet.pth"))
    options += ("--recipe", "MobileNet_V2_Weights.IMAGENET1K_V1")
    with serving(tmp_path_factory.mktemp("imagenet"), *options) as server:
        yield server


def test_real_weights_are_as_accurate_as_plain_torchvision(imagenet: Server, shared: Path) -> None:
    recipe = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    network = torchvision.models.mobilenet_v2()
    path = shared / "weights" / "mobilenet_v2-imagenet.pth"
    network.load_state_dict(torch.load(path, weights_only=True))
    first = fifth = 0
    worst = 0.0
    rows = list(csv.DictReader((shared / "images" / "labels.csv").open()))
    for row in rows:
        body = (shared / "images" / row["file"]).read_bytes()
        predictions = ask(imagenet, "mobilenet_v2", body)["predictions"]
        classes = [prediction["class_id"] for prediction in predictions]
        first += classes[0] == int(row["class_id"])
        fifth += int(row["class_id"]) in classes
        expected = reference(network, recipe, Image.open(io.BytesIO(body)).convert("RGB"))
        for prediction in predictions:
            difference = abs(expected[prediction["class_id"]].item() - prediction["confidence"])
            worst = max(worst, difference)
    assert len(rows) == 200
    assert first / 200 == pytest.approx(0.785, abs=0.005)
    assert fifth / 200 == pytest.approx(0.955, abs=0.005)
    assert worst < 3e-3  # resizing rounds a level up or down in one pixel of a thousand


def test_int8_keeps_the_accuracy(tmp_path: Path, shared: Path) -> None:
    """Half of the images calibrate: the report in `info` is of the other half, this is of all."""
    options = ("--weights", str(shared / "weights" / "mobilenet_v2-imagenet.pth"))
    options += ("--recipe", "MobileNet_V2_Weights.IMAGENET1K_V1")
    options += ("--calibration", str(shared / "images"))
    # Of 100 images the agreement has a standard error of 2 points, and CPUs round differently.
    options += ("--minimum-agreement", "0.93")
    with serving(tmp_path, *options) as server:
        info = server.info()
        rows = list(csv.DictReader((shared / "images" / "labels.csv").open()))
        first = 0
        for row in rows:
            body = (shared / "images" / row["file"]).read_bytes()
            best = ask(server, "mobilenet_v2", body)["predictions"][0]
            first += best["class_id"] == int(row["class_id"])
    assert info["engine"] == "openvino-int8"
    assert info["int8"]["measured_images"] == 100
    assert info["int8"]["agreement"] >= 0.93
    assert first / 200 >= 0.785 - 0.015


def test_the_example_of_the_readme_is_a_clock(imagenet: Server) -> None:
    answer = ask(imagenet, "mobilenet_v2", (ROOT / "examples" / "clock.jpg").read_bytes())
    assert answer["predictions"][0]["class"] == "analog clock"

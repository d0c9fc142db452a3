"""Planted faults: each is refused at the start, with the stage that differs, or mended and said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from openvino import save_model
from safetensors.torch import load_file, save_file

import handler.decoders
import handler.engines
from handler.golden import GOLDEN_FILE, MAX_ERROR, Golden
from handler.images import Encoded, Picture, decode_picture
from handler.model_card import WEIGHTS_FILE, InputTransform, ModelCard, file_sha256
from handler.pixels import RawPixels
from handler.selection import Selection
from handler.torch_engine import TorchEager
from service.archive.conversion import to_openvino
from tests.drawing import encode, noise
from tests.unit.handler.worker import log, start
from tests.unit.tiny import LABELS, make_model_dir, tiny_network

pytestmark = pytest.mark.usefixtures("isolation")
Decode = Callable[[Encoded | RawPixels, InputTransform], Picture]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_dir(tmp_path)


def change_card(folder: Path, **changes: Any) -> None:
    card = ModelCard.read(folder)
    transform = {name: changes.pop(name) for name in [*changes] if hasattr(card.transform, name)}
    changed = replace(card, transform=replace(card.transform, **transform), **changes)
    (folder / "model.json").write_text(changed.to_json(), "utf-8")


def change_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({name: one.contiguous() for name, one in state.items()}, folder / WEIGHTS_FILE)
    files = ModelCard.read(folder).files | {WEIGHTS_FILE: file_sha256(folder / WEIGHTS_FILE)}
    change_card(folder, files=files)


def change_pixels(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def changed(encoded: Encoded | RawPixels, transform: InputTransform) -> Picture:
        picture = decode_picture(encoded, transform)
        return replace(picture, pixels=change(picture.pixels))

    monkeypatch.setattr(handler.decoders, "decode_picture", changed)


def refused(folder: Path, caplog: pytest.LogCaptureFixture, **settings: Any) -> str:
    """What the log says of a start that fails."""
    with pytest.raises(RuntimeError):
        start(folder, **settings)
    [line] = log(caplog, "startup_failed")
    assert line.get("cause") is None  # it is told, not a bug
    return str(line["message"])


def test_bgr_of_a_decoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_pixels(monkeypatch, lambda pixels: pixels.flip(0))
    assert refused(folder, caplog).startswith("channel order: the decoder gives BGR")


def test_bgr_of_a_network(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its first layer was trained on BGR, and is not what the reference was."""
    state = load_file(folder / WEIGHTS_FILE)
    change_weights(folder, state | {"features.0.weight": state["features.0.weight"].flip(1)})
    change_card(folder, mean=(0.406, 0.456, 0.485), std=(0.225, 0.224, 0.229))
    assert refused(folder, caplog).startswith("channel order: torch-fp32 takes BGR")


def test_wrong_mean(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_card(folder, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    message = refused(folder, caplog)
    assert message.startswith("normalisation: mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5) here, ")
    assert "mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225) in the reference" in message


@pytest.mark.parametrize(
    ("field", "here", "reference"),
    [
        ("resize_size", 232, 256),
        ("antialias", False, True),
        ("interpolation", "bicubic", "bilinear"),
    ],
)
def test_wrong_resize(
    folder: Path, caplog: pytest.LogCaptureFixture, field: str, here: Any, reference: Any
) -> None:
    change_card(folder, **{field: here})
    expected = f"resize: {field} is {here} here and {reference} in the reference; package"
    assert refused(folder, caplog).startswith(expected)


def test_shifted_labels(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_card(folder, labels=("stork", *LABELS[:-1]))
    assert refused(folder, caplog).startswith("labels: class ")


def test_labels_of_another_number_of_classes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny_network(classes=4)
    change_weights(folder, network.state_dict())
    change_card(folder, labels=("background", "heron", "crane", "crane"))
    message = refused(folder, caplog)
    assert message.startswith("labels: the reference has 3 classes, the archive 4")


def test_swapped_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    name = "features.3.squeeze.weight"
    change_weights(folder, state | {name: -state[name]})
    assert refused(folder, caplog).startswith("weights: the network is not the one that gave")


def test_another_model_for_openvino(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_model_dir(tmp_path, openvino=True)
    network = tiny_network()
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    other = to_openvino(network, ModelCard.read(folder).transform)
    save_model(other, folder / "openvino.xml", compress_to_fp16=False)
    files = ModelCard.read(folder).files
    files = files | {"openvino.xml": file_sha256(folder / "openvino.xml")}
    change_card(folder, files=files | {"openvino.bin": file_sha256(folder / "openvino.bin")})
    message = refused(folder, caplog, precision="fp32")
    assert message.startswith("engine: openvino-fp32 computes something else than the network")


def test_a_decoder_off_by_three_levels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_pixels(monkeypatch, lambda pixels: pixels.clamp(max=252) + 3)
    message = refused(folder, caplog)
    assert message.startswith("decoder: its pixels differ from the reference's by ")
    assert " by 3.00 levels of 255 on average in the golden image " in message


class _Coarse(torch.nn.Module):
    """Answers that are right in fp32 alone: what is added and taken off again is rounded."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (
            self.network(images + 4096 - 4096)
            if images.dtype == torch.bfloat16
            else (self.network(images))
        )


@pytest.mark.parametrize("precisions", [("bf16", "fp32"), ("bf16",)], ids=["auto", "asked for"])
def test_a_model_that_bf16_breaks_is_run_in_fp32(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precisions: tuple[str, ...],
) -> None:
    """Unless bf16 was asked for by name: then the log says how far off it is."""

    def load(card: ModelCard, _dir: Path, _: Selection, precision: str, *__: object) -> TorchEager:
        return TorchEager(_Coarse(tiny_network()), card.transform, precision)

    monkeypatch.setattr(handler.engines, "_load", load)
    chosen = Selection("cpu", "torch", precisions)
    monkeypatch.setattr(handler.engines, "select", lambda *_, **__: chosen)
    classifier = start(folder)
    assert classifier.engine.name == f"torch-{precisions[-1]}"
    assert classifier.certificate
    assert classifier.certificate.precision == precisions[-1]
    [line] = log(caplog, "engine_chosen")
    assert line["engine"] == f"torch-{precisions[-1]}"
    assert line["golden_errors"]["torch-bf16"] > 0.15


def test_an_image_that_is_not_served(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    golden = Golden.read(folder)
    assert golden
    name = next(iter(golden.files))
    replace(golden, files=golden.files | {name: encode(noise(), "TIFF")}).write(folder)
    files = ModelCard.read(folder).files | {GOLDEN_FILE: file_sha256(folder / GOLDEN_FILE)}
    change_card(folder, files=files)
    expected = f"decoder: it refuses the golden image {name}: TIFF is not served; send one of "
    assert refused(folder, caplog).startswith(expected)


# --- The setting `decode`


def test_fast_decoding_that_fits_is_kept(folder: Path) -> None:
    classifier = start(folder, decode="fast")
    assert classifier.certificate
    assert (classifier.certificate.decode, classifier.settings.decode) == ("fast", "fast")
    assert classifier.certificate.decode_difference > 1


@pytest.mark.parametrize("limit", [MAX_ERROR, 0])  # 0: the engine, asked for by name, is off too
def test_fast_decoding_that_changes_the_answers_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: float
) -> None:
    monkeypatch.setattr("handler.certificate.MAX_ERROR", limit)

    def changed(encoded: Encoded | RawPixels, transform: InputTransform) -> Picture:
        picture = decode_picture(encoded, transform)
        return (
            replace(picture, pixels=255 - picture.pixels) if picture.decode == "fast" else picture
        )

    monkeypatch.setattr(handler.decoders, "decode_picture", changed)
    classifier = start(folder, decode="fast")
    assert classifier.certificate
    assert (classifier.certificate.decode, classifier.settings.decode) == ("exact", "exact")
    assert classifier.certificate.decode_difference < 0.01
    [line] = log(caplog, "decoder_chosen")
    assert line["reason"].startswith("cpu, fast: the logits' error is ")

"""Conversion of a torchvision network to the OpenVINO model that goes into the archive."""

import warnings

import openvino
import torch
from torch import Tensor, nn

from handler.errors import InvalidModel
from handler.model_card import InputTransform
from handler.torch_engine import PixelsToProbabilities

MAX_DIFFERENCE = 1e-3  # of any probability; another order of float32 operations gives about 1e-6


def to_openvino(network: nn.Module, transform: InputTransform) -> openvino.Model:
    """The network from pixels to probabilities: uint8 [B, 3, H, W] to float32 [B, C].

    Raises InvalidModel if OpenVINO cannot express the network, or computes something else.
    """
    model, images, expected = _try_out(network, transform)
    size = transform.crop_size
    with torch.no_grad(), warnings.catch_warnings():  # inference_mode's tensors cannot be traced
        warnings.simplefilter("ignore")  # tracing is deprecated, and what OpenVINO does
        try:
            converted = openvino.convert_model(
                model, example_input=images, input=[openvino.PartialShape([-1, 3, size, size])]
            )
        except Exception as exc:  # the converter raises many types for what it does not know
            raise InvalidModel(
                "OpenVINO cannot convert it; engine: torch in handler/configs does without"
            ) from exc
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    actual = torch.from_numpy(openvino.compile_model(converted, "CPU", precise)(images.numpy())[0])
    difference = (actual - expected).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise InvalidModel(
            f"OpenVINO's probabilities differ from torch's by {difference:.4f}; "
            "engine: torch in handler/configs does without it"
        )
    return converted


def check_answers(network: nn.Module, transform: InputTransform) -> None:
    """Raise InvalidModel if a network's own probabilities are not finite."""
    _try_out(network, transform)


def _try_out(
    network: nn.Module, transform: InputTransform
) -> tuple[PixelsToProbabilities, Tensor, Tensor]:
    """The model, two images uint8 [2, 3, H, W], and its probabilities for them, float32 [2, C].

    Raises InvalidModel if these are not finite: no worker would ever start.
    """
    model = PixelsToProbabilities(network, transform, torch.float32).eval()
    size = transform.crop_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        probabilities = model(images)
    if not probabilities.isfinite().all():
        raise InvalidModel(
            "its answers are NaN, although each weight is a number: the training diverged or the "
            "file is damaged; take an earlier checkpoint"
        )
    return model, images, probabilities

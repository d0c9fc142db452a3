"""Conversion of a torchvision network to the OpenVINO model that goes into the archive."""

import warnings

import openvino
import torch
from torch import nn

from handler.engine import Sameness
from handler.errors import InvalidModel
from handler.golden import MAX_FP32_ERROR, Golden
from handler.model_card import InputTransform
from handler.torch_engine import PixelsToProbabilities
from service.archive.inference import answer, compile_for_one

WITHOUT = "engine: torch in handler/configs does without"


def to_openvino(network: nn.Module, transform: InputTransform) -> openvino.Model:
    """The network from pixels to probabilities: uint8 [B, 3, H, W] to float32 [B, C].

    Raises InvalidModel if OpenVINO cannot express the network.
    """
    model = PixelsToProbabilities(network, transform, torch.float32).eval()
    size = transform.crop_size
    with torch.no_grad(), warnings.catch_warnings():  # inference_mode's tensors cannot be traced
        warnings.simplefilter("ignore")  # tracing is deprecated, and what OpenVINO does
        try:
            return openvino.convert_model(
                model,
                example_input=torch.zeros(2, 3, size, size, dtype=torch.uint8),
                input=[openvino.PartialShape([-1, 3, size, size])],
            )
        except Exception as exc:  # the converter raises many types for what it does not know
            raise InvalidModel(f"OpenVINO cannot convert it; {WITHOUT}") from exc


def check_conversion(converted: openvino.Model, golden: Golden) -> None:
    """Raise InvalidModel if a model gives other answers to the golden images than the reference."""
    found = compare(converted, golden)
    if not found.fits(MAX_FP32_ERROR):
        raise InvalidModel(
            f"OpenVINO computes something else than torch: {found.describe()}; {WITHOUT}"
        )


def compare(converted: openvino.Model, golden: Golden) -> Sameness:
    """A model's answers to the golden images with those of the reference."""
    compiled = compile_for_one(converted, golden.pixels.shape[1:], openvino.Core())
    return golden.judge(torch.from_numpy(answer(compiled, [*golden.pixels.numpy()])))

"""Golden images: what each worker holds its engine against before it is READY.

Packaging draws a few images and computes the network's answers to them with plain torch, in fp32,
on a CPU. Whatever else computes the model later, on whatever machine, has to give those answers:
a precision too coarse for this network is then found before a client finds it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from handler.engine import Engine

GOLDEN_FILE = "golden.safetensors"
TINY = 1e-30  # a smaller probability says nothing more, and 0 has no logarithm
LEAST = 1e-3  # logits of a smaller root mean square say nothing either: all classes are alike

# The error over which `auto` takes a finer precision. With MobileNetV2's weights for ImageNet the
# golden images give 0.012 in fp16, 0.050 in int8 and 0.086 in bf16, and of 200 real images 98.0,
# 98.5 and 96.5 % keep their top-1 class (docs/engines.md).
MAX_ERROR = 0.1


@dataclass(frozen=True)
class Golden:
    """Images with the answers that the network itself gives."""

    images: Tensor  # uint8 RGB [N, 3, H, W], as the model takes them
    probabilities: Tensor  # float32 [N, C]

    @classmethod
    def read(cls, model_dir: Path) -> "Golden | None":
        """Those of an unpacked archive; None if it was made before archives had them."""
        path = model_dir / GOLDEN_FILE
        return cls(**load_file(path)) if path.exists() else None

    def tensors(self) -> dict[str, Tensor]:
        """What GOLDEN_FILE holds."""
        return {"images": self.images, "probabilities": self.probabilities}

    def error(self, engine: Engine) -> float:
        """How far an engine's answers are from the network's, as a share of what they say.

        It is the root mean square of the logits' differences over that of the logits, each with
        the mean over the classes taken off. Unlike the share of equal top-1 classes it says
        something with few images, and about images of no class. NaN if the engine gives one.
        """
        parts = torch.split(self.images, engine.max_forward)
        actual = logits(torch.cat([torch.from_numpy(engine.launch(list(x))()) for x in parts]))
        expected = logits(self.probabilities)
        return root_mean_square(actual - expected) / max(root_mean_square(expected), LEAST)


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def logits(probabilities: Tensor) -> Tensor:
    """[N, C] -> the logits that softmax had, less their mean over the classes."""
    logarithms = probabilities.clamp_min(TINY).log()
    return logarithms - logarithms.mean(dim=1, keepdim=True)

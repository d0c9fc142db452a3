"""Golden images: what each worker holds itself against before it is READY.

Packaging keeps a few encoded images with what the reference makes of them: their pixels by plain
Pillow and torchvision, and their logits by plain torch, in fp32, on a CPU. Whatever else decodes
and computes them later, on whatever machine, has to give the same (handler/certificate.py).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from handler.confidence import TINY
from handler.engine import Engine, Sameness
from handler.errors import InvalidModel

GOLDEN_FILE = "golden.safetensors"
FILE = "file:"  # before the name of an encoded image, among the tensors
AGAIN = "package the archive again"
LEAST = 1e-3  # logits of a smaller root mean square say nothing either: all classes are alike

# The largest error of the logits. fp32 differs by the order of its sums alone; the others are what
# `auto` may take instead. What such errors mean for real images is in docs/trust.md.
MAX_FP32_ERROR = 0.01
MAX_ERROR = 0.15


@dataclass(frozen=True)
class Golden:
    """Images with what the reference makes of them."""

    files: dict[str, bytes]  # encoded images by name; N of them
    pixels: Tensor  # uint8 RGB [N, 3, H, W]: decoded, resized and cropped
    logits: Tensor  # float32 [N, C]
    labels: tuple[str, ...]  # of the top-1 classes; N of them

    @classmethod
    def read(cls, model_dir: Path) -> "Golden | None":
        """Those of an unpacked archive; None if it was made before archives had them."""
        path = model_dir / GOLDEN_FILE
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if "labels" not in facts:  # pixels and probabilities alone: as they were at first
                return None
            names = json.loads(facts["names"])
            return cls(
                {name: file.get_tensor(FILE + name).numpy().tobytes() for name in names},
                file.get_tensor("pixels"),
                file.get_tensor("logits"),
                tuple(json.loads(facts["labels"])),
            )

    def write(self, folder: Path) -> None:
        """Make GOLDEN_FILE in a folder."""
        encoded = {
            FILE + name: torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            for name, data in self.files.items()
        }
        facts = {"names": json.dumps([*self.files]), "labels": json.dumps(self.labels)}
        tensors = {"pixels": self.pixels.contiguous(), "logits": self.logits.contiguous()}
        save_file(encoded | tensors, folder / GOLDEN_FILE, facts)

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raise InvalidModel if the reference's top-1 classes have other names among these."""
        if (classes := self.logits.shape[1]) != len(labels):
            raise InvalidModel(
                f"labels: the reference has {classes} classes, the archive {len(labels)}; {AGAIN}"
            )
        for best, expected in zip(self.logits.argmax(dim=1).tolist(), self.labels, strict=True):
            if labels[best] != expected:
                raise InvalidModel(
                    f"labels: class {best} is {labels[best]!r} here and {expected!r} in the "
                    f"reference; {AGAIN}"
                )

    def only(self, names: Sequence[str]) -> "Golden":
        """Some of the images."""
        places = [[*self.files].index(name) for name in names]
        files = {name: self.files[name] for name in names}
        labels = tuple(self.labels[place] for place in places)
        return Golden(files, self.pixels[places], self.logits[places], labels)

    def compare(self, engine: Engine, pixels: Tensor | None = None) -> Sameness:
        """An engine with the reference, on its pixels, or on others of the same images.

        The first image has a pass of its own, as most requests have.
        """
        started = perf_counter()
        pixels = self.pixels if pixels is None else pixels
        parts = [pixels[:1], *torch.split(pixels[1:], engine.max_forward)]
        answers = torch.cat([torch.from_numpy(engine.launch(list(x))()) for x in parts])
        return self.judge(answers)._replace(seconds=perf_counter() - started)

    def judge(self, probabilities: Tensor) -> Sameness:
        """Probabilities float32 [N, C] with those of the reference.

        The error is the root mean square of the logits' differences over that of the logits, each
        with the mean over the classes taken off. Unlike the share of equal top-1 classes it says
        something with few images, and about images of no class.
        """
        if probabilities.shape != self.logits.shape:
            return Sameness(math.inf, 0, math.inf)
        actual, expected = centred(probabilities), centred(self.logits.softmax(dim=1))
        unit = max(root_mean_square(expected), LEAST)
        best = probabilities.argmax(dim=1, keepdim=True)
        losses = expected.amax(dim=1) - expected.gather(1, best)[:, 0]
        return Sameness(
            root_mean_square(actual - expected) / unit,
            (losses == 0).double().mean().item(),
            losses.max().item() / unit,
        )


def limit_of(precision: str) -> float:
    """The largest error of an engine."""
    return MAX_FP32_ERROR if precision == "fp32" else MAX_ERROR


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def centred(probabilities: Tensor) -> Tensor:
    """[N, C] -> the logits that softmax had, less their mean over the classes."""
    logarithms = probabilities.clamp_min(TINY).log()
    return logarithms - logarithms.mean(dim=1, keepdim=True)

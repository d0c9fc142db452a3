"""What the handler needs of any inference library."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handler.inspection import Inspection, NotInspectable

# A top-1 class may be another one only if the reference's logit of it is at most so much under its
# best, in units of the logits' root mean square: then the two were nearly as likely.
MAX_LOSS = 0.5


class Sameness(NamedTuple):
    """How far answers are from the reference's."""

    error: float  # of the logits, as a share of what they say; NaN if there is one among them
    agreement: float  # share of the images with the reference's top-1 class
    loss: float  # of the reference's logits by other top-1 classes, the largest; see MAX_LOSS
    seconds: float = 0.0  # that it took to give and compare them

    def fits(self, limit: float) -> bool:
        """Whether the error is at most this, and no certain class is another. NaN never fits."""
        return self.error <= limit and self.loss <= MAX_LOSS

    def describe(self) -> str:
        return (
            f"the logits' error is {self.error:.3g}, and {self.agreement:.0%} of the top-1 classes "
            "are the reference's"
        )


class Engine(ABC):
    """A model ready to run: images as uint8 pixels in, probabilities out.

    Normalisation and softmax are the engine's business.
    """

    sameness: Sameness | None = None  # with the reference (handler/golden.py); None: not checked
    refused: Mapping[str, Sameness] = {}  # the same of engines that `auto` has not taken for it

    def __init__(self, library: str, precision: str, device: str, max_forward: int) -> None:
        self.name = f"{library}-{precision}"
        self.precision = precision
        self.device = device  # "cpu" or "cuda:0"
        self.max_forward = max_forward  # images that one forward pass takes

    @abstractmethod
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, C] on the CPU, each row summing to 1.

        B is 1 to `max_forward`.
        """

    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        """Begin a forward pass of images [3, H, W]; what is returned waits for `probabilities`.

        An engine that computes on the CPU begins when it is waited for, because until then the
        caller needs the cores itself.
        """
        return lambda: self.probabilities(torch.stack(list(images))).numpy()

    @cached_property
    def inspectable(self) -> bool:
        """Whether `inspect` can be asked; it is found out with the first question."""
        try:
            self._prepare_inspection()
        except NotInspectable:
            return False
        return True

    def _prepare_inspection(self) -> None:
        """Raise NotInspectable if the network does not end as `inspect` needs it."""
        raise NotInspectable

    def inspect(self, images: Tensor) -> Inspection:  # noqa: ARG002 for those that can
        """uint8 RGB [B, 3, H, W] -> the probabilities, with the maps that the classifier saw.

        B is 1 to `max_forward`. Raises NotInspectable.
        """
        raise NotInspectable

    def is_lost(self) -> bool:
        """Whether nothing will ever run here again, asked after a failure."""
        return False

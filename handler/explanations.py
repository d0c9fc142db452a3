"""Why this answer: how much each place of an image adds to a class.

A class activation map (Zhou et al. 2016, https://arxiv.org/abs/1512.04150): the classifier's linear
layer applied to each position of the last maps alone. The mean of a map plus the class's bias is
the logit, so the map is what the answer is made of, and no guess about it.
"""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from handler.answers import Answer
from handler.errors import MalformedRequest
from handler.fields import as_flag
from handler.inspection import Inspection

Form = Literal["image", "matrix"]
MAX_SIDE = 224  # pixels of an overlay, with one byte for each
OPACITY = 0.5  # of the colours on the image
DECIMALS = 4

# viridis, which is as bright as the value is high, for every eye (https://bids.github.io/colormap):
# RGB at equal steps from 0 to 1.
VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142),
        (31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37),
    ],
    np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Explain:
    """What a request asks to be explained, and how."""

    form: Form
    class_id: int | None = None  # None: the likeliest


class Activation(NamedTuple):
    """What each position of the last maps adds to the logit of a class."""

    class_id: int
    values: NDArray[np.float64]  # [h, w]


def read_explain(
    options: Mapping[str, Any], headers: Mapping[str, Any], classes: int
) -> Explain | None:
    """The options `explain` and `explain_class` of a request, or its headers X-Explain….

    A class alone asks for an overlay, and so does a request to /explanations, which TorchServe
    marks by a header. Raises MalformedRequest.
    """
    form, class_id = options.get("explain"), options.get("explain_class")
    form = headers.get("x-explain") if form is None else form
    class_id = headers.get("x-explain-class") if class_id is None else class_id
    if form is None:
        form = class_id is not None or headers.get("explain") == "True"
    flag = as_flag(form)
    if flag is None and form not in ("image", "matrix"):
        raise MalformedRequest("explain must be true, false, 'image' (as true) or 'matrix'")
    if isinstance(class_id, str) and re.fullmatch(r"[0-9]{1,9}", class_id):
        class_id = int(class_id)
    if class_id is not None and not (type(class_id) is int and 0 <= class_id < classes):
        raise MalformedRequest(f"explain_class must be a class_id from 0 to {classes - 1}")
    if flag is False:
        return None
    return Explain("matrix" if form == "matrix" else "image", class_id)


def explain(
    form: Form,
    found: Activation,
    pixels: Tensor,
    region: Sequence[int],
    labels: Sequence[str],
) -> Answer:
    """The explanation of one image.

    `pixels` are uint8 RGB [3, H, W], as the model took them, and `region` is where they were in the
    image as it was sent.
    """
    class_id, values = found.class_id, found.values
    answer = {"class_id": class_id, "class": labels[class_id], "method": "cam"}
    if form == "matrix":
        answer["map"] = (values.round(DECIMALS) + 0.0).tolist()  # + 0.0: no -0.0
    else:
        picture = overlay(pixels.permute(1, 2, 0).cpu().numpy(), values)
        answer["image"] = f"data:image/png;base64,{b64encode(picture).decode()}"
    return answer | {"region": list(region)}


def activation_of(asked: Explain, seen: Inspection) -> Activation:
    """That of the class that is asked for, in one image."""
    class_id = int(seen.probabilities.argmax()) if asked.class_id is None else asked.class_id
    return Activation(class_id, activation_map(seen, class_id))


def activation_map(seen: Inspection, class_id: int) -> NDArray[np.float64]:
    """What each position adds to the logit of a class, as if it were everywhere: [h, w].

    Their mean plus the class's bias is the logit.
    """
    [maps], weight = seen.maps, seen.weight[class_id]
    return torch.einsum("k,khw->hw", weight.double(), maps.double()).numpy()


def overlay(pixels: NDArray[np.uint8], activation: NDArray[np.float64]) -> bytes:
    """A PNG of the image [H, W, 3] under the colours of a map [h, w].

    From dark blue, for what adds nothing or speaks against the class, to yellow for the most.
    """
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    strength = activation.clip(0).astype(np.float32)
    strength /= strength.max() or 1
    spread = Image.fromarray(strength).resize(picture.size, Image.Resampling.BILINEAR)
    steps = np.linspace(0, 1, len(VIRIDIS))
    colours = [np.interp(np.asarray(spread), steps, channel) for channel in VIRIDIS.T]
    colour = Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8))
    file = BytesIO()
    blended = Image.blend(picture, colour, OPACITY)
    # Median cut, which is Pillow's default, takes twenty times as long for a smooth picture.
    blended.quantize(method=Image.Quantize.FASTOCTREE).save(file, "PNG")
    return file.getvalue()

"""A request of a batch, and its images, on their way from bytes to answers."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from handler.decoders import Decoding
from handler.errors import RequestError
from handler.payloads import ImageRequest


@dataclass
class Item:
    """One image: an error, or its decoding, then its probabilities, then its predictions."""

    error: RequestError | None = None
    size: tuple[int, int] = (0, 0)  # width and height of the image as people see it
    decoding: Decoding | None = None  # one for all items of a batch that hold the same bytes
    key: bytes | None = None  # of the result cache, where there is one
    cached: bool = False  # the probabilities are those of an earlier batch
    probabilities: Tensor | None = None  # float32 [C]
    predictions: list[dict[str, Any]] = field(default_factory=list)  # best first


@dataclass
class Row:
    """One request; each stage of the handler fills in its part."""

    request_id: str
    request: ImageRequest | RequestError  # an error: refused as a whole, there are no items
    items: list[Item] = field(default_factory=list)
    status: int = 0  # HTTP status of the answer
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

"""What goes back to a client: the answer in the protocol of its request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handler import protocol_v1, protocol_v2
from handler.answers import Answer, combine, encode, failure
from handler.errors import RequestError
from handler.payloads import ImageRequest, Protocol


@dataclass(frozen=True)
class Reply:
    """A status and a body."""

    status: int
    body: bytes
    json_length: int | None = None  # of a body in which binary tensors follow the JSON

    @property
    def headers(self) -> dict[str, str]:
        """Those that the body needs. ASCII: TorchServe loses step with the worker over others."""
        if self.json_length is None:
            return {"content-type": "application/json"}
        return {
            "content-type": "application/octet-stream",
            protocol_v2.JSON_LENGTH: str(self.json_length),
        }


def refuse(error: RequestError, protocol: Protocol) -> Reply:
    """The reply to a request that is refused as a whole."""
    return _refusal(failure(error), protocol)


def make_reply(
    request: ImageRequest,
    results: list[Answer],
    probabilities: Sequence[NDArray[np.float32]],
    labels: Sequence[str],
    identity: Mapping[str, str],
) -> Reply:
    """The reply to a request whose images have their results, in the form of our own protocol.

    `probabilities` are float32 [C] of each image that was classified. V1 and V2 have no place for
    an image that failed: the request fails with the highest status, and says which image it was.
    """
    if request.protocol == "own":
        if request.wants_list:
            status, answer = combine(results)
            return Reply(status, encode(answer))
        return Reply(results[0].get("code", 200), encode(results[0]))
    failed = [index for index, result in enumerate(results) if result["status"] == "error"]
    if failed:
        worst = max(failed, key=lambda index: results[index]["code"])  # the first of equal ones
        message = results[worst]["message"]
        which = f"image {worst}: " if len(results) > 1 else ""
        return _refusal(results[worst] | {"message": which + message}, request.protocol)
    if request.protocol == "v1":
        return Reply(200, encode(protocol_v1.answer(results)))
    body, json_length = protocol_v2.answer(request.wanted, results, probabilities, labels, identity)
    return Reply(200, body, json_length)


def _refusal(error: Answer, protocol: Protocol) -> Reply:
    answer = error if protocol == "own" else {"error": f"{error['type']}: {error['message']}"}
    return Reply(error["code"], encode(answer))

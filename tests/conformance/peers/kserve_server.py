"""KServe's model server with a toy model of images; run in its own environment.

The model does what the SDK's examples do. What the server leaves to each model (the outputs that a
request names, datatypes and shapes) is left as it is, since the server is what is examined.
"""

import base64
import io
import sys
from typing import Any

import numpy
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.utils import generate_uuid
from PIL import Image

from tests.conformance.peers.toy import INPUTS, OUTPUTS, colours


class Toy(Model):
    """Says which of red, green and blue an image has most of."""

    def __init__(self) -> None:
        super().__init__("toy")
        self.ready = True

    async def get_input_types(self) -> list[Any]:
        return INPUTS

    async def get_output_types(self) -> list[Any]:
        return OUTPUTS

    def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> Any:
        if not isinstance(payload, InferRequest):
            images = [base64.b64decode(each["b64"]) for each in payload["instances"]]
            tensors = colours([means(image) for image in images])
            rows = zip(tensors["label"], tensors["class_id"], tensors["confidence"], strict=True)
            return {"predictions": [list(row) for row in rows]}
        (tensor,) = payload.inputs
        values = [content(each) for each in tensor.as_numpy().reshape(-1).tolist()]
        tensors = colours([means(value) for value in values])
        outputs = []
        for described in OUTPUTS:
            name, datatype = described["name"], described["datatype"]
            kind: Any = {"BYTES": object, "INT64": "i8", "FP32": "f4"}[datatype]
            texts = [each.encode() if isinstance(each, str) else each for each in tensors[name]]
            data = numpy.array(texts, dtype=kind).reshape(len(values), -1)
            output = InferOutput(name, list(data.shape), datatype)
            output.set_data_from_numpy(data, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(
            response_id=payload.id or generate_uuid(),
            model_name=self.name,
            infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


def content(value: Any) -> bytes:
    """An element is the image, or its base64 in JSON."""
    data = value.encode() if isinstance(value, str) else value
    return data if data[:1] in b"\x89\xff" else base64.b64decode(data)


def means(data: bytes) -> list[float]:
    return numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1)).tolist()


if __name__ == "__main__":
    http_port, grpc_port = map(int, sys.argv[1:])
    ModelServer(http_port=http_port, grpc_port=grpc_port, workers=1).start([Toy()])

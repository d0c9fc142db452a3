"""MLServer's custom runtime, with the toy model of images; loaded in its own environment.

It returns every output, as the examples of custom runtimes do: what the server leaves to each
runtime is left as it is.
"""

import base64
import io
from typing import Any

import numpy
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor
from PIL import Image

from tests.conformance.peers.toy import INPUTS, OUTPUTS, colours


class Toy(MLModel):
    """Says which of red, green and blue an image has most of."""

    async def load(self) -> bool:
        self.inputs = [MetadataTensor(**tensor) for tensor in INPUTS]
        self.outputs = [MetadataTensor(**tensor) for tensor in OUTPUTS]
        self._model_platform = "toy"
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (tensor,) = payload.inputs
        values = [content(each) for each in tensor.data.root]
        tensors = colours([means(value) for value in values])
        outputs = []
        for described in OUTPUTS:
            name, rows = described["name"], tensors[described["name"]]
            if described["datatype"] == "BYTES":
                outputs.append(StringCodec.encode_output(name, rows))
            else:
                kind = {"INT64": "i8", "FP32": "f4"}[described["datatype"]]
                data = numpy.array(rows, dtype=kind).reshape(len(values), -1)
                outputs.append(NumpyCodec.encode_output(name, data))
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)


def content(value: Any) -> bytes:
    """An element is the image, or its base64 in JSON."""
    data = value.encode() if isinstance(value, str) else value
    return data if data[:1] in b"\x89\xff" else base64.b64decode(data)


def means(data: bytes) -> list[float]:
    return numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1)).tolist()

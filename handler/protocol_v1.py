"""KServe's V1 protocol: instances in, one list of predictions for each back.

The form is that of https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol
and, for base64 in an instance, of TensorFlow Serving: {"b64": "…"}
(https://www.tensorflow.org/tfx/serving/api_rest#encoding_binary_values). Neither says what fields a
server does not know; clients send some (`signature_name`), and they are ignored.
"""

from collections.abc import Mapping
from typing import Any

from handler.answers import Answer
from handler.errors import MalformedRequest, NoImage, RequestError
from handler.fields import check_count, decode_text
from handler.pixels import RawPixels
from handler.settings import Settings


def read(document: Mapping[str, Any], settings: Settings) -> list[bytes | RawPixels | RequestError]:
    """The image of each instance, or what is wrong with it.

    Raises MalformedRequest, NoImage or TooManyImages.
    """
    instances = document.get("instances")
    if not isinstance(instances, list):
        raise MalformedRequest("a V1 request needs 'instances', a list of base64 images")
    if not instances:
        raise NoImage("'instances' is empty")
    check_count(len(instances), settings)
    return [_read_instance(instance, settings) for instance in instances]


def _read_instance(instance: Any, settings: Settings) -> bytes | RequestError:
    """Base64 as text, in "b64", or either of these in "image" or "image_bytes"."""
    text = instance
    for names in ({"image", "image_bytes"}, {"b64"}):
        if isinstance(text, dict) and len(text) == 1 and text.keys() <= names:
            [text] = text.values()
    if not isinstance(text, str):
        return MalformedRequest(
            'an instance must be base64 text, or {"b64": TEXT}, alone or as the value of '
            "'image' or 'image_bytes'"
        )
    return decode_text(text, settings)


def answer(results: list[Answer]) -> Answer:
    """The results of images that were all classified, in the form of V1."""
    document: Answer = {"predictions": [result["predictions"] for result in results]}
    for name in ("set", "unknown"):  # beside them: a prediction itself has no place for more
        if name in results[0]:
            document[name] = [result[name] for result in results]
    if "explanation" in results[0]:
        document["explanations"] = [result["explanation"] for result in results]
    return document

"""Triton's HTTP client: V2 over REST, with binary data unless it is told otherwise."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy
from tritonclient import http
from tritonclient.utils import InferenceServerException

from tests.conformance.checks import (
    BINARY,
    CLASSIFICATION,
    READINESS,
    REST,
    Checks,
    Json,
    NotOffered,
    Subject,
    Wrong,
    expect,
)
from tests.conformance.tensors import elements, shape_of

checks = Checks(f"tritonclient.http {version('tritonclient')}")
check = checks.check
NEW = "V2 REST"
DTYPES: dict[str, Any] = {
    "BYTES": object,
    "BOOL": bool,
    "FP16": "f2",
    "FP32": "f4",
    "FP64": "f8",
} | {
    f"{kind}{bits}": f"{kind[0].lower()}{bits // 8}"
    for kind in ("INT", "UINT")
    for bits in (8, 16, 32, 64)
}


def connect(subject: Subject) -> Any:
    """A client; it takes the address without its scheme."""
    scheme, _, address = subject.url.partition("://")
    return http.InferenceServerClient(address, ssl=scheme == "https")


def array(subject: Subject, tensor: Json, image: int = 0) -> Any:
    values = numpy.array(elements(subject, tensor, image), dtype=DTYPES[tensor["datatype"]])
    return values.reshape(shape_of(tensor))


def inputs(subject: Subject, image: int = 0, *, binary: bool = True) -> list[Any]:
    made = []
    for tensor in subject.needs_inputs():
        made.append(http.InferInput(tensor["name"], shape_of(tensor), tensor["datatype"]))
        values = array(subject, tensor, image)
        if subject.images and not binary:  # encoded images are base64 in JSON
            values = numpy.array([subject.images[image]], dtype=object).reshape(values.shape)
        made[-1].set_data_from_numpy(values, binary_data=binary)
    return made


def asked(names: Sequence[str], *, binary: bool = True) -> list[Any]:
    return [http.InferRequestedOutput(name, binary_data=binary) for name in names]


def outputs_of(result: Any) -> dict[str, Json]:
    """The outputs of an answer by name, their data flat; BYTES as text."""
    found = {}
    for tensor in result.get_response()["outputs"]:
        values = result.as_numpy(tensor["name"])
        expect(values is not None, f"{tensor['name']} has no data")
        expect(list(values.shape) == tensor["shape"], f"{tensor['name']}: {values.shape}")
        data = values.reshape(-1).tolist()
        found[tensor["name"]] = {
            "datatype": tensor["datatype"],
            "shape": tensor["shape"],
            "data": [each.decode() if isinstance(each, bytes) else each for each in data],
        }
    expect(found, "no outputs")
    return found


def refused(client: Any, model: str, sent: list[Any], **more: Any) -> None:
    """The server must refuse, in a form that this client reads."""
    try:
        client.infer(model, sent, **more)
    except InferenceServerException as exc:
        status = exc.status() or ""
        expect(status.startswith("4"), f"status {status}: {exc.message()[:150]}")
    else:
        raise Wrong("it was answered")


@check(NEW, "server live", "GET /v2/health/live is 200 if the server can answer.", REST)
def live(subject: Subject) -> None:
    expect(connect(subject).is_server_live(), "not live")


@check(NEW, "server ready", "GET /v2/health/ready is 200 if all models are ready.", REST)
def ready(subject: Subject) -> None:
    expect(connect(subject).is_server_ready(), "not ready")


@check(NEW, "model ready", "GET /v2/models/M/ready is 200 if that model is ready.", REST)
def model_ready(subject: Subject) -> None:
    client = connect(subject)
    expect(client.is_model_ready(subject.model), "not ready")
    expect(not client.is_model_ready("no-such-model"), "a model that is not there is ready")


@check(NEW, "version ready", "The version may be in the path.", REST)
def version_ready(subject: Subject) -> None:
    number = subject.needs_version()
    client = connect(subject)
    expect(client.is_model_ready(subject.model, number), f"version {number} is not ready")
    expect(not client.is_model_ready(subject.model, "987654"), "version 987654 is ready")


@check(NEW, "server metadata", "GET /v2 gives `name`, `version` and `extensions`.", REST)
def server_metadata(subject: Subject) -> None:
    found = connect(subject).get_server_metadata()
    for field, kind in {"name": str, "version": str, "extensions": list}.items():
        expect(isinstance(found.get(field), kind), f"{field}: {found.get(field)!r}")


def check_metadata(found: Json, subject: Subject) -> None:
    expect(found.get("name") == subject.model, f"name: {found.get('name')!r}")
    expect(isinstance(found.get("platform"), str), f"platform: {found.get('platform')!r}")
    for side in ("inputs", "outputs"):
        tensors = found.get(side) or []
        expect(isinstance(tensors, list) and tensors, f"{side}: {tensors!r}")
        for tensor in tensors:
            expect(tensor["datatype"] in DTYPES, f"{side}: {tensor}")
            sizes = tensor["shape"]
            expect(all(isinstance(size, int) and size >= -1 for size in sizes), f"{side}: {tensor}")


@check(NEW, "model metadata", "It has name, platform, inputs and outputs.", REST)
def model_metadata(subject: Subject) -> None:
    check_metadata(connect(subject).get_model_metadata(subject.model), subject)


@check(NEW, "version metadata", "The version may be in the path.", REST)
def version_metadata(subject: Subject) -> None:
    number = subject.needs_version()
    check_metadata(connect(subject).get_model_metadata(subject.model, number), subject)


@check(NEW, "infer: JSON in, JSON out", "Tensors may be JSON.", REST)
def json_both(subject: Subject) -> None:
    client = connect(subject)
    collect(subject, "V2 REST JSON, tritonclient", client, binary=False)


@check(NEW, "infer: binary in, binary out", "Tensors follow the JSON, in its order.", BINARY)
def binary_both(subject: Subject) -> None:
    subject.needs_binary()
    collect(subject, "V2 REST binary", connect(subject), binary=True)


def collect(subject: Subject, way: str, client: Any, *, binary: bool) -> None:
    """Send each image; this client asks for binary outputs only if an output or none is named."""
    answers = []
    for image in range(max(1, len(subject.images))):
        sent = inputs(subject, image, binary=binary)
        wanted = None if binary else asked_json(subject)
        answers.append(outputs_of(client.infer(subject.model, sent, outputs=wanted)))
    checks.answers[way] = answers


@check(NEW, "infer: binary in, JSON out", "Each output has its own binary_data.", BINARY)
def binary_in(subject: Subject) -> None:
    subject.needs_binary()
    names = [output["name"] for output in subject.outputs]
    result = connect(subject).infer(
        subject.model, inputs(subject), outputs=asked(names, binary=False)
    )
    expect(all("data" in each for each in result.get_response()["outputs"]), "not JSON")
    outputs_of(result)


@check(NEW, "infer: JSON in, binary out", "Each output has its own binary_data.", BINARY)
def binary_out(subject: Subject) -> None:
    subject.needs_binary()
    names = [output["name"] for output in subject.outputs]
    result = connect(subject).infer(
        subject.model, inputs(subject, binary=False), outputs=asked(names)
    )
    expect(all("data" not in each for each in result.get_response()["outputs"]), "not binary")
    outputs_of(result)


@check(NEW, "infer: mixed outputs", "Some outputs are binary, others JSON.", BINARY)
def mixed(subject: Subject) -> None:
    subject.needs_binary()
    names = [output["name"] for output in subject.outputs]
    if len(names) < 2:
        raise NotOffered("the model has one output")
    wanted = [*asked(names[:1]), *asked(names[1:], binary=False)]
    found = outputs_of(connect(subject).infer(subject.model, inputs(subject), outputs=wanted))
    expect(list(found) == names, f"asked for {names}, got {list(found)}")


@check(NEW, "infer with a version", "The version may be in the path.", REST)
def infer_version(subject: Subject) -> None:
    number = subject.needs_version()
    sent = inputs(subject, binary=False)
    result = connect(subject).infer(
        subject.model, sent, model_version=number, outputs=asked_json(subject)
    )
    found = result.get_response().get("model_version")
    expect(found == number, f"version {number} was asked for, {found} answered")


def asked_json(subject: Subject) -> list[Any]:
    """Outputs as JSON, which every server has."""
    return asked([output["name"] for output in subject.outputs], binary=False)


@check(NEW, "id", "An id that was given is returned.", REST)
def returned_id(subject: Subject) -> None:
    result = connect(subject).infer(
        subject.model, inputs(subject, binary=False), outputs=asked_json(subject), request_id="a-1"
    )
    expect(result.get_response().get("id") == "a-1", f"{result.get_response().get('id')}")


@check(NEW, "outputs by name: order", "Outputs come in the order of the request.", REST)
def order_of_outputs(subject: Subject) -> None:
    names = [output["name"] for output in subject.outputs][::-1]
    result = connect(subject).infer(
        subject.model, inputs(subject, binary=False), outputs=asked(names, binary=False)
    )
    found = list(outputs_of(result))
    expect(found == names, f"asked for {names}, got {found}")


@check(NEW, "refusals", "Errors are read by the client, and are its own (4xx).", READINESS)
def refusals(subject: Subject) -> None:
    client, sent = connect(subject), inputs(subject, binary=False)
    plain = asked_json(subject)
    refused(client, "no-such-model", sent, outputs=plain)
    refused(client, subject.model, sent, outputs=asked(["no-such-output"], binary=False))


@check(NEW, "classification", "class_count gives VALUE:INDEX[:LABEL].", CLASSIFICATION)
def classification(subject: Subject) -> None:
    name = subject.needs_classification()
    for binary in (True, False):
        wanted = [http.InferRequestedOutput(name, binary_data=binary, class_count=2)]
        result = connect(subject).infer(subject.model, inputs(subject), outputs=wanted)
        found = outputs_of(result)[name]
        expect(found["shape"][-1] == 2, f"shape {found['shape']}")
        expect(all(":" in element for element in found["data"]), f"{found['data']}")


if __name__ == "__main__":
    sys.exit(checks.main())

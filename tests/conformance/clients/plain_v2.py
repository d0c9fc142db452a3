"""V2 over REST in plain HTTP: what no client's library can send, and what it would hide."""

import base64
import json
import sys
from collections.abc import Callable
from typing import Any

from tests.conformance.checks import (
    BINARY,
    CLASSIFICATION,
    READINESS,
    REST,
    Checks,
    Json,
    NotOffered,
    Subject,
    expect,
)
from tests.conformance.clients.http import (
    CLIENT,
    LENGTH,
    UNKNOWN,
    answered,
    get,
    infer,
    infer_binary,
    outputs_of,
    post,
    refused,
)
from tests.conformance.tensors import OTHER, binary_request, json_input, json_request

checks = Checks(CLIENT)
check = checks.check
NEW = "V2 REST"


# V2: health and metadata


@check(NEW, "server live: body", "The answer is an object with `live`.", REST)
def live_body(subject: Subject) -> None:
    content = answered(get(subject, "/v2/health/live"))
    expect(content.get("live") is True, f"live: {content.get('live')!r}")


@check(NEW, "model ready: body", "The answer is an object with `name` and `ready`.", REST)
def ready_body(subject: Subject) -> None:
    content = answered(get(subject, f"/v2/models/{subject.model}/ready"))
    expect(content.get("name") == subject.model, f"name: {content.get('name')!r}")
    expect(content.get("ready") is True, f"ready: {content.get('ready')!r}")


@check(NEW, "unknown model: ready", "A 4xx says that a model is not ready.", READINESS)
def unknown_not_ready(subject: Subject) -> None:
    answer = get(subject, f"/v2/models/{UNKNOWN}/ready")
    expect(400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:100]}")


@check(NEW, "unknown version: ready", "A 4xx says that a version is not ready.", READINESS)
def unknown_version_not_ready(subject: Subject) -> None:
    subject.needs_version()
    answer = get(subject, f"/v2/models/{subject.model}/versions/987654/ready")
    expect(400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:100]}")


@check(NEW, "unknown model: metadata", "A failed request has its text under `error`.", REST)
def unknown_metadata(subject: Subject) -> None:
    refused(get(subject, f"/v2/models/{UNKNOWN}"))


@check(NEW, "unknown version: metadata", "A failed request has its text under `error`.", REST)
def unknown_version_metadata(subject: Subject) -> None:
    subject.needs_version()
    refused(get(subject, f"/v2/models/{subject.model}/versions/987654"))


# V2: inference in JSON


@check(NEW, "infer in JSON: form", "The answer has `model_name` and `outputs`, as JSON.", REST)
def infer_in_json(subject: Subject) -> None:
    answers = []
    for image in range(max(1, len(subject.images))):
        content = answered(infer(subject, json_request(subject, image)))
        expect(content.get("model_name") == subject.model, f"model: {content.get('model_name')}")
        answers.append(outputs_of(content))
    checks.answers["V2 REST JSON"] = answers
    if subject.version is not None:
        expect(isinstance(content.get("model_version"), str), "no model_version")


@check(NEW, "nested data", "Data may be nested as its shape says, or flat.", REST)
def nested_data(subject: Subject) -> None:
    tensors = subject.needs_inputs()
    nested = json_input(subject, tensors[0])
    if len(nested["shape"]) < 2:
        raise NotOffered("the model's first input has one dimension")
    for size in reversed(nested["shape"][1:]):
        data = nested["data"]
        nested["data"] = [data[i : i + size] for i in range(0, len(data), size)]
    others = [json_input(subject, tensor) for tensor in tensors[1:]]
    outputs_of(answered(infer(subject, {"inputs": [nested, *others]})))


@check(NEW, "id of an answer", "An id that was given is returned.", REST)
def returned_id(subject: Subject) -> None:
    for sent in ("42", "Ωmega \u20ac"):
        found = answered(infer(subject, json_request(subject, id=sent))).get("id")
        expect(found == sent, f"{sent!r} came back as {found!r}")


@check(NEW, "all outputs have declared types", "Outputs are as the metadata has them.", REST)
def declared_outputs(subject: Subject) -> None:
    declared = {tensor["name"]: tensor for tensor in subject.outputs}
    expect(declared, "the metadata names no outputs")
    for name, tensor in outputs_of(answered(infer(subject, json_request(subject)))).items():
        expect(name in declared, f"{name} is not in the metadata")
        expect(tensor["datatype"] == declared[name]["datatype"], f"{name}: {tensor['datatype']}")
        pairs = zip(tensor["shape"], declared[name]["shape"], strict=True)
        expect(all(size in (have, -1) for have, size in pairs), f"{name}: {tensor['shape']}")


@check(NEW, "parameters", "A request may have parameters.", REST)
def parameters(subject: Subject) -> None:
    outputs_of(answered(infer(subject, json_request(subject, parameters={}))))


def mistake(
    name: str, make: Callable[[Subject], Any], states: str = "A failed request has its text"
) -> None:
    @check(NEW, name, f"{states} under `error`, and is not the server's failure.", REST)
    def refusal(subject: Subject) -> None:
        refused(infer(subject, make(subject)))


def altered(**changes: Any) -> Callable[[Subject], Json]:
    """The first input with other values; None takes one away."""

    def make(subject: Subject) -> Json:
        request = json_request(subject)
        first = request["inputs"][0] | changes
        request["inputs"][0] = {name: value for name, value in first.items() if value is not None}
        return request

    return make


def other_datatype(subject: Subject) -> Json:
    [first, *_] = subject.needs_inputs()
    return altered(datatype=OTHER.get(first["datatype"], "BYTES"))(subject)


def other_shape(subject: Subject) -> Json:
    shape = [*json_request(subject)["inputs"][0]["shape"]]
    return altered(shape=[shape[0] + 1, *shape[1:]])(subject)


mistake("broken JSON", lambda subject: b'{"inputs": [')
mistake("no object", lambda subject: [])
mistake("missing inputs", lambda subject: {"id": "1"})
mistake("no inputs", lambda subject: {"inputs": []})
mistake("input of an unknown name", altered(name="no-such-input"))
mistake("wrong datatype", other_datatype)
mistake("unknown datatype", altered(datatype="FP3"))
mistake("shape that does not fit the data", other_shape)
mistake("negative shape", altered(shape=[-1]))
mistake("input without data", altered(data=None))
mistake("input without a shape", altered(shape=None))
mistake("input without a datatype", altered(datatype=None))


@check(NEW, "unknown model: infer", "A failed request has its text under `error`.", REST)
def unknown_infer(subject: Subject) -> None:
    refused(post(subject, f"/v2/models/{UNKNOWN}/infer", json_request(subject)))


@check(NEW, "unknown version: infer", "A failed request has its text under `error`.", REST)
def unknown_version_infer(subject: Subject) -> None:
    subject.needs_version()
    path = f"/v2/models/{subject.model}/versions/987654/infer"
    refused(post(subject, path, json_request(subject)))


@check(NEW, "unknown output", "A failed request has its text under `error`.", REST)
def unknown_output(subject: Subject) -> None:
    refused(infer(subject, json_request(subject, outputs=[{"name": "no-such-output"}])))


@check(NEW, "no outputs named", "If none are named, all outputs are returned.", REST)
def no_outputs_named(subject: Subject) -> None:
    names = sorted(tensor["name"] for tensor in subject.outputs)
    found = sorted(outputs_of(answered(infer(subject, json_request(subject)))))
    expect(found == names, f"the metadata has {names}, the answer {found}")


@check(NEW, "outputs by name: only these", "The outputs that are named are returned.", REST)
def only_named_outputs(subject: Subject) -> None:
    for output in subject.outputs:
        name = output["name"]
        request = json_request(subject, outputs=[{"name": name}])
        found = list(outputs_of(answered(infer(subject, request))))
        expect(found == [name], f"asked for {name}, got {found}")


# V2: the binary data extension


@check(NEW, "binary answer: form", f"{LENGTH} is the JSON's, Content-Length all of it.", BINARY)
def binary_answer(subject: Subject) -> None:
    subject.needs_binary()
    described, data = binary_request(subject, parameters={"binary_data_output": True})
    answer = infer_binary(subject, described, data)
    expect(answer.status_code == 200, f"{answer.status_code}: {answer.text[:150]}")
    kind = answer.headers.get("Content-Type")
    expect(kind == "application/octet-stream", f"content type {kind}")
    length = answer.headers.get(LENGTH, "")
    expect(length.isdecimal(), f"{LENGTH}: {length!r}")
    content = json.loads(answer.content[: int(length)])
    sizes = [tensor.get("parameters", {}).get("binary_data_size") for tensor in content["outputs"]]
    expect(all(isinstance(size, int) for size in sizes), f"binary_data_size: {sizes}")
    left = len(answer.content) - int(length)
    expect(sum(sizes) == left, f"binary_data_size {sizes} of {left} bytes")
    expect(all("data" not in tensor for tensor in content["outputs"]), "data, and binary data")


@check(NEW, "binary in, JSON out", "Without binary_data an output is JSON.", BINARY)
def binary_in_json_out(subject: Subject) -> None:
    subject.needs_binary()
    answer = infer_binary(subject, *binary_request(subject))
    outputs_of(answered(answer))
    expect(LENGTH not in answer.headers, f"{LENGTH} without binary data")


@check(NEW, "binary_data before binary_data_output", "An output's own parameter wins.", BINARY)
def own_parameter(subject: Subject) -> None:
    subject.needs_binary()
    outputs = [
        {"name": tensor["name"], "parameters": {"binary_data": False}} for tensor in subject.outputs
    ]
    request = json_request(subject, outputs=outputs, parameters={"binary_data_output": True})
    outputs_of(answered(infer(subject, request)))


def wrong_length(name: str, length: Callable[[int, int], str]) -> None:
    @check(NEW, f"{LENGTH}: {name}", "A length that is not true is refused.", BINARY)
    def refusal(subject: Subject) -> None:
        subject.needs_binary()
        described, data = binary_request(subject)
        size = len(json.dumps(described))
        refused(infer_binary(subject, described, data, length(size, len(data))))


wrong_length("too short", lambda head, data: str(head - 1))
wrong_length("too long", lambda head, data: str(head + data + 1))
wrong_length("no number", lambda head, data: "many")
wrong_length("negative", lambda head, data: "-1")


def wrong_size(name: str, change: int) -> None:
    @check(NEW, f"binary_data_size: {name}", "The size of the data is the tensor's.", BINARY)
    def refusal(subject: Subject) -> None:
        subject.needs_binary()
        described, data = binary_request(subject)
        described["inputs"][0]["parameters"]["binary_data_size"] += change
        refused(infer_binary(subject, described, data))


wrong_size("too small", -1)
wrong_size("too large", 1)


# V2: the classification extension


@check(NEW, "classification: form", "Elements are VALUE:INDEX, highest first.", CLASSIFICATION)
def classification(subject: Subject) -> None:
    wanted = {"name": subject.needs_classification(), "parameters": {"classification": 2}}
    [found] = outputs_of(answered(infer(subject, json_request(subject, outputs=[wanted])))).values()
    expect(found["datatype"] == "BYTES", f"datatype {found['datatype']}")
    expect(found["shape"][-1] == 2, f"shape {found['shape']}")
    pairs = [element.split(":", 2) for element in found["data"]]
    values = [float(value) for value, *_ in pairs]
    expect(values == sorted(values, reverse=True), f"{found['data']}")
    expect(all(index.isdecimal() for _, index, *_ in pairs), f"{found['data']}")


# Encoded images


@check(NEW, "image: several", "A batch has one result for each image, in order.", REST)
def several_images(subject: Subject) -> None:
    if not subject.images:
        raise NotOffered("the model takes no encoded images")
    number = 2
    together = outputs_of(answered(infer(subject, json_request(subject, batch=number))))
    for image in range(number):
        alone = outputs_of(answered(infer(subject, json_request(subject, image))))
        for name, tensor in together.items():
            rows = len(tensor["data"]) // number
            part = tensor["data"][image * rows : (image + 1) * rows]
            near = all(
                one == other or (isinstance(one, float) and abs(one - other) < 1e-4)
                for one, other in zip(part, alone[name]["data"], strict=True)
            )
            expect(near, f"{name} of image {image}: {part[:3]}, alone {alone[name]['data'][:3]}")


@check(NEW, "image: unreadable", "A failed request has its text under `error`.", REST)
def unreadable_image(subject: Subject) -> None:
    if not subject.images:
        raise NotOffered("the model takes no encoded images")
    broken = base64.b64encode(b"not an image").decode()
    refused(infer(subject, altered(data=[broken])(subject)))


if __name__ == "__main__":
    sys.exit(checks.main())

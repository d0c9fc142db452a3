"""Triton's gRPC client and its generated stub, with grpcio's own client of the health service."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient import grpc as client_of
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conformance.checks import (
    CLASSIFICATION,
    GRPC,
    HEALTH,
    STATUS,
    Checks,
    Json,
    NotOffered,
    Subject,
    Wrong,
    expect,
)
from tests.conformance.tensors import CONTENTS, OTHER, elements, raw, shape_of

checks = Checks(f"tritonclient.grpc {version('tritonclient')}")
check = checks.check
NEW = "V2 gRPC"
SECONDS = 30
SERVICE = "inference.GRPCInferenceService"
CLIENTS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE"}


def connect(subject: Subject) -> Any:
    return client_of.InferenceServerClient(subject.needs_grpc())


def channel(subject: Subject) -> Any:
    return grpc.insecure_channel(subject.needs_grpc())


def infer(subject: Subject, request: Any) -> Any:
    with channel(subject) as opened:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(opened)
        return stub.ModelInfer(request, timeout=SECONDS)


def request_of(subject: Subject, image: int = 0, *, raw_contents: bool) -> Any:
    """A request of every input, its data in raw contents or in the field of its datatype."""
    request = service_pb2.ModelInferRequest(model_name=subject.model)
    for tensor in subject.needs_inputs():
        sent = request.inputs.add(
            name=tensor["name"], datatype=tensor["datatype"], shape=shape_of(tensor)
        )
        values = elements(subject, tensor, image)
        if raw_contents:
            request.raw_input_contents.append(raw(tensor["datatype"], values))
        else:
            getattr(sent.contents, f"{CONTENTS[tensor['datatype']]}_contents").extend(values)
    return request


def outputs_of(response: Any) -> dict[str, Json]:
    """The outputs by name, flat, whether they came raw or typed; BYTES as text."""
    result = client_of.InferResult(response)
    found = {}
    for tensor in response.outputs:
        if response.raw_output_contents:
            data = result.as_numpy(tensor.name).reshape(-1).tolist()
        else:
            data = list(getattr(tensor.contents, f"{CONTENTS[tensor.datatype]}_contents"))
        found[tensor.name] = {
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "data": [each.decode() if isinstance(each, bytes) else each for each in data],
        }
    expect(found, "no outputs")
    return found


def collect(subject: Subject, way: str, *, raw_contents: bool) -> None:
    subject.needs_grpc()
    images = range(max(1, len(subject.images)))
    requests = [request_of(subject, image, raw_contents=raw_contents) for image in images]
    checks.answers[way] = [outputs_of(infer(subject, request)) for request in requests]


def refused(call: Callable[[], object], *codes: str) -> None:
    """The call must fail with one of the codes; by default those of a client's mistake."""
    try:
        call()
    except grpc.RpcError as exc:
        code = exc.code().name
        expect(code in (codes or CLIENTS_FAULT), f"{code}: {str(exc.details())[:150]}")
    except InferenceServerException as exc:
        code = str(exc.status()).removeprefix("StatusCode.")
        expect(code in (codes or CLIENTS_FAULT), f"{code}: {exc.message()[:150]}")
    else:
        raise Wrong("the status was OK")


@check(NEW, "ServerLive", "`live` is true if the server can answer.", GRPC)
def live(subject: Subject) -> None:
    expect(connect(subject).is_server_live(), "not live")


@check(NEW, "ServerReady", "`ready` is true if the server is ready for inferencing.", GRPC)
def ready(subject: Subject) -> None:
    expect(connect(subject).is_server_ready(), "not ready")


@check(NEW, "ModelReady", "`ready` is true if that model is ready.", GRPC)
def model_ready(subject: Subject) -> None:
    expect(connect(subject).is_model_ready(subject.model), "not ready")


@check(NEW, "ModelReady with a version", "The request may name a version.", GRPC)
def version_ready(subject: Subject) -> None:
    address, number = subject.needs_grpc(), subject.needs_version()
    client = client_of.InferenceServerClient(address)
    expect(client.is_model_ready(subject.model, number), f"version {number} is not ready")


@check(NEW, "ModelReady of an unknown model", "A model that is not there is not ready.", GRPC)
def unknown_ready(subject: Subject) -> None:
    client = connect(subject)
    try:
        expect(not client.is_model_ready("no-such-model"), "it is ready")
    except InferenceServerException as exc:
        expect("NOT_FOUND" in str(exc.status()), f"{exc.status()}: {exc.message()}")


@check(NEW, "ServerMetadata", "It has name, version and extensions.", GRPC)
def server_metadata(subject: Subject) -> None:
    found = connect(subject).get_server_metadata()
    expect(found.name and found.version, f"name {found.name!r}, version {found.version!r}")
    expect(
        sorted(found.extensions) == sorted(subject.extensions),
        f"extensions {list(found.extensions)}, over REST {list(subject.extensions)}",
    )


def described(found: Any, subject: Subject) -> None:
    """The metadata must be REST's."""
    expect(found.name == subject.model, f"name {found.name!r}")
    for side, expected in (("inputs", subject.inputs), ("outputs", subject.outputs)):
        tensors = [
            {"name": each.name, "datatype": each.datatype, "shape": list(each.shape)}
            for each in getattr(found, side)
        ]
        over_rest = [{name: each[name] for name in tensors[0]} for each in expected if tensors]
        expect(tensors and tensors == over_rest, f"{side} {tensors}, over REST {over_rest}")


@check(NEW, "ModelMetadata", "It has the model's inputs and outputs.", GRPC)
def model_metadata(subject: Subject) -> None:
    described(connect(subject).get_model_metadata(subject.model), subject)


@check(NEW, "ModelMetadata with a version", "The request may name a version.", GRPC)
def version_metadata(subject: Subject) -> None:
    client, number = connect(subject), subject.needs_version()
    described(client.get_model_metadata(subject.model, number), subject)


@check(NEW, "ModelInfer, raw contents", "Data may be raw, one entry for each input.", GRPC)
def raw_contents(subject: Subject) -> None:
    collect(subject, "V2 gRPC raw contents", raw_contents=True)


@check(NEW, "ModelInfer, typed contents", "Data may be in the field of its datatype.", GRPC)
def typed_contents(subject: Subject) -> None:
    collect(subject, "V2 gRPC typed contents", raw_contents=False)


@check(NEW, "ModelInfer through the library", "The answer is what the library expects.", GRPC)
def through_library(subject: Subject) -> None:
    client = connect(subject)
    request = request_of(subject, raw_contents=True)
    sent = []
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        sent.append(client_of.InferInput(tensor.name, list(tensor.shape), tensor.datatype))
        sent[-1]._raw_content = content  # as set_data_from_numpy sets it
    result = client.infer(subject.model, sent, request_id="a-1")
    names = [tensor.name for tensor in result.get_response().outputs]
    expect(names, "no outputs")
    for name in names:
        expect(result.as_numpy(name) is not None, f"{name} cannot be read")
    expect(result.get_response().id == "a-1", f"id {result.get_response().id!r}")


@check(NEW, "ModelInfer with a version", "The request may name a version.", GRPC)
def infer_version(subject: Subject) -> None:
    subject.needs_grpc()
    request = request_of(subject, raw_contents=True)
    request.model_version = subject.needs_version()
    found = infer(subject, request).model_version
    expect(found == request.model_version, f"version {found!r} answered")


@check(NEW, "ModelInfer with an id", "An id that was given is returned.", GRPC)
def returned_id(subject: Subject) -> None:
    subject.needs_grpc()
    request = request_of(subject, raw_contents=False)
    request.id = "Ωmega"
    found = infer(subject, request).id
    expect(found == request.id, f"it came back as {found!r}")


@check(NEW, "outputs by name", "Outputs that are named are returned, in that order.", GRPC)
def named_outputs(subject: Subject) -> None:
    subject.needs_grpc()
    names = [tensor["name"] for tensor in subject.outputs][::-1]
    for wanted in (names, names[:1]):
        request = request_of(subject, raw_contents=True)
        for name in wanted:
            request.outputs.add(name=name)
        found = [tensor.name for tensor in infer(subject, request).outputs]
        expect(found == wanted, f"asked for {wanted}, got {found}")


@check(NEW, "classification", "The parameter classification gives VALUE:INDEX.", CLASSIFICATION)
def classification(subject: Subject) -> None:
    subject.needs_grpc()
    request = request_of(subject, raw_contents=True)
    name = subject.needs_classification()
    request.outputs.add(name=name).parameters["classification"].int64_param = 2
    found = outputs_of(infer(subject, request))[name]
    expect(found["datatype"] == "BYTES" and found["shape"][-1] == 2, f"{found}")
    expect(all(":" in element for element in found["data"]), f"{found['data']}")


def mistake(name: str, change: Callable[[Any], object], *codes: str) -> None:
    states = f"The code is {' or '.join(codes)}." if codes else "The code is that of a mistake."

    @check(NEW, name, states, STATUS)
    def refusal(subject: Subject) -> None:
        subject.needs_grpc()
        if "version" in name:
            subject.needs_version()
        request = request_of(subject, raw_contents=True)
        change(request)
        refused(lambda: infer(subject, request), *codes)


def other_datatype(request: Any) -> None:
    first = request.inputs[0]
    first.datatype = OTHER.get(first.datatype, "BYTES")


def both_contents(request: Any) -> None:
    request.inputs[0].contents.bytes_contents.append(b"x")


def larger_shape(request: Any) -> None:
    request.inputs[0].shape[0] += 1


mistake("unknown model", lambda request: setattr(request, "model_name", "no"), "NOT_FOUND")
mistake("unknown version", lambda request: setattr(request, "model_version", "9876"), "NOT_FOUND")
mistake("unknown output", lambda request: request.outputs.add(name="no"))
mistake("unknown input", lambda request: setattr(request.inputs[0], "name", "no"))
mistake("missing inputs", lambda request: request.ClearField("inputs"))
mistake("wrong datatype", other_datatype)
mistake("unknown datatype", lambda request: setattr(request.inputs[0], "datatype", "FP3"))
mistake("shape that does not fit the data", larger_shape)
mistake("raw contents beside typed ones", both_contents)
mistake("raw contents for no input", lambda request: request.raw_input_contents.append(b"x"))
mistake("no contents", lambda request: request.ClearField("raw_input_contents"))


@check(NEW, "deadline", "It is DEADLINE_EXCEEDED, and the next call is answered.", STATUS)
def deadline(subject: Subject) -> None:
    subject.needs_grpc()
    request = request_of(subject, raw_contents=True)
    with channel(subject) as opened:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(opened)
        stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=SECONDS)
        refused(lambda: stub.ModelInfer(request, timeout=1e-6), "DEADLINE_EXCEEDED")
        outputs_of(stub.ModelInfer(request, timeout=SECONDS))


@check(NEW, "unknown method", "A method that is not there is UNIMPLEMENTED.", STATUS)
def unknown_method(subject: Subject) -> None:
    with channel(subject) as opened:
        call = opened.unary_unary(f"/{SERVICE}/NoSuchMethod")
        refused(lambda: call(b"", timeout=SECONDS), "UNIMPLEMENTED")


@check(NEW, "body that is no message", "It is refused, and the next call is answered.", STATUS)
def no_message(subject: Subject) -> None:
    with channel(subject) as opened:
        call = opened.unary_unary(f"/{SERVICE}/ModelInfer")
        refused(lambda: call(b"\xff\xff\xff", timeout=SECONDS), "INVALID_ARGUMENT", "INTERNAL")
    expect(connect(subject).is_server_live(), "not live")


def health_of(subject: Subject, service: str) -> str:
    with channel(subject) as opened:
        stub: Any = health_pb2_grpc.HealthStub(opened)  # its types lack the methods
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = stub.Check(request, timeout=SECONDS).status
        except grpc.RpcError as exc:
            if exc.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise NotOffered("there is no grpc.health.v1.Health") from exc
            raise
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


@check(NEW, "health of the server", "The empty name is the server: SERVING.", HEALTH)
def server_health(subject: Subject) -> None:
    found = health_of(subject, "")
    expect(found == "SERVING", found)


@check(NEW, "health of the service", "A service is asked for by its full name.", HEALTH)
def service_health(subject: Subject) -> None:
    found = health_of(subject, SERVICE)
    expect(found == "SERVING", found)


@check(NEW, "health of an unknown service", "It is NOT_FOUND.", HEALTH)
def unknown_health(subject: Subject) -> None:
    health_of(subject, "")
    refused(lambda: health_of(subject, "no.such.Service"), "NOT_FOUND")


if __name__ == "__main__":
    sys.exit(checks.main())

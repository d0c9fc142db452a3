"""The clients of KServe's SDK: V1 and V2 over REST, and V2 over gRPC."""

import asyncio
import logging
import sys
from collections.abc import Awaitable
from importlib.metadata import version
from typing import Any, TypeVar

import numpy
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

from tests.conformance.checks import (
    BINARY,
    GRPC,
    REST,
    V1,
    Checks,
    Json,
    NotOffered,
    Subject,
    Wrong,
    expect,
)
from tests.conformance.tensors import elements, json_input, shape_of

checks = Checks(f"kserve {version('kserve')}")
check = checks.check
OLD, NEW, RPC = "V1", "V2 REST", "V2 gRPC"
SECONDS = 30
T = TypeVar("T")


def wait(result: Awaitable[T]) -> T:
    async def waited() -> T:
        return await result

    return asyncio.run(waited())


async def over_rest(protocol: str, call: str, *arguments: Any, **named: Any) -> Any:
    async with InferenceRESTClient(RESTConfig(protocol=protocol, timeout=SECONDS)) as client:
        return await getattr(client, call)(*arguments, **named)


async def over_grpc(subject: Subject, call: str, *arguments: Any) -> Any:
    async with InferenceGRPCClient(subject.needs_grpc(), timeout=SECONDS, retries=0) as client:
        return await getattr(client, call)(*arguments)


def request_of(subject: Subject, image: int = 0, *, binary: bool) -> Any:
    made = []
    for tensor in subject.needs_inputs():
        name, datatype, shape = tensor["name"], tensor["datatype"], shape_of(tensor)
        if binary:
            made.append(InferInput(name, shape, datatype))
            kind = object if datatype == "BYTES" else None
            values = numpy.array(elements(subject, tensor, image), dtype=kind)
            made[-1].set_data_from_numpy(values.reshape(shape), binary_data=True)
        else:
            data = json_input(subject, tensor, image)["data"]
            made.append(InferInput(name, shape, datatype, data))
    return InferRequest(model_name=subject.model, infer_inputs=made, request_id="a-1")


def outputs_of(response: Any) -> dict[str, Json]:
    found = {}
    for tensor in response.outputs:
        data = tensor.as_numpy().reshape(-1).tolist()
        found[tensor.name] = {
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "data": [each.decode() if isinstance(each, bytes) else each for each in data],
        }
    expect(found, "no outputs")
    return found


def collect(subject: Subject, way: str, *, binary: bool, rpc: bool = False) -> None:
    answers = []
    for image in range(max(1, len(subject.images))):
        request = request_of(subject, image, binary=binary)
        if rpc:
            response = wait(over_grpc(subject, "infer", request))
        else:
            response = wait(over_rest("v2", "infer", subject.url, request, subject.model))
        expect(response.id == "a-1", f"id {response.id!r}")
        answers.append(outputs_of(response))
    checks.answers[way] = answers


@check(OLD, "SDK: model ready", "GET /v1/models/M gives `ready`.", V1)
def v1_ready(subject: Subject) -> None:
    needs_v1(subject)
    ready = wait(over_rest("v1", "is_model_ready", subject.url, subject.model))
    expect(ready is True, f"ready: {ready!r}")


@check(OLD, "SDK: predictions", "POST :predict gives `predictions`.", V1)
def v1_predict(subject: Subject) -> None:
    needs_v1(subject)
    if not subject.images:
        raise NotOffered("V1 has no metadata to make an instance from; images need --image")
    sent = {"instances": [{"b64": image} for image in subject.images[:2]]}
    found = wait(over_rest("v1", "infer", subject.url, sent, subject.model))
    expect(len(found["predictions"]) == len(sent["instances"]), f"{str(found)[:150]}")


def needs_v1(subject: Subject) -> None:
    try:
        wait(over_rest("v1", "is_model_ready", subject.url, subject.model))
    except Exception as exc:
        if getattr(getattr(exc, "response", None), "status_code", 0) in (404, 405, 501):
            raise NotOffered(f"there is nothing at /v1/models/{subject.model}") from exc
        raise


@check(NEW, "SDK: server live", "The answer is an object with `live`.", REST)
def live(subject: Subject) -> None:
    expect(wait(over_rest("v2", "is_server_live", subject.url)) is True, "not live")


@check(NEW, "SDK: server ready", "GET /v2/health/ready; the client reads `ready`.", REST)
def ready(subject: Subject) -> None:
    found = wait(over_rest("v2", "is_server_ready", subject.url))
    expect(found is True, f"ready: {found!r}")


@check(NEW, "SDK: model ready", "200 is ready, 4xx is not.", REST)
def model_ready(subject: Subject) -> None:
    expect(wait(over_rest("v2", "is_model_ready", subject.url, subject.model)), "not ready")
    unknown = wait(over_rest("v2", "is_model_ready", subject.url, "no-such-model"))
    expect(not unknown, "a model that is not there is ready")


@check(NEW, "SDK: infer in JSON", "Tensors may be JSON.", REST)
def infer_json(subject: Subject) -> None:
    collect(subject, "V2 REST JSON, kserve", binary=False)


@check(NEW, "SDK: infer in binary", "Tensors follow the JSON, in its order.", BINARY)
def infer_binary(subject: Subject) -> None:
    subject.needs_binary()
    collect(subject, "V2 REST binary, kserve", binary=True)


@check(RPC, "SDK: ServerLive, ServerReady, ModelReady", "Each is true.", GRPC)
def rpc_ready(subject: Subject) -> None:
    expect(wait(over_grpc(subject, "is_server_live")), "not live")
    expect(wait(over_grpc(subject, "is_server_ready")), "not ready")
    expect(wait(over_grpc(subject, "is_model_ready", subject.model)), "the model is not ready")


@check(RPC, "SDK: ModelInfer", "Raw contents, one for each input.", GRPC)
def rpc_infer(subject: Subject) -> None:
    subject.needs_grpc()
    collect(subject, "V2 gRPC, kserve", binary=True, rpc=True)


@check(RPC, "SDK: refusal", "A model that is not there is an error.", GRPC)
def rpc_refusal(subject: Subject) -> None:
    subject.needs_grpc()
    request = request_of(subject, binary=True)
    request.model_name = "no-such-model"
    try:
        wait(over_grpc(subject, "infer", request))
    except Exception as exc:
        code = getattr(exc, "code", lambda: "no code")()
        expect("NOT_FOUND" in str(code), f"{code}")
    else:
        raise Wrong("the status was OK")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # the SDK logs what it then raises
    sys.exit(checks.main())

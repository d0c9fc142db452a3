"""The Open Inference Protocol over gRPC with a plain grpcio client: messages, errors, health.

A stand-in that speaks V2 over REST is behind the gateway.
"""

import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from google.protobuf import empty_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from service.openinference import inference_pb2 as pb
from service.openinference.rest import to_rest
from tests.gateway.v2 import (
    CLASSES,
    CONFIDENCES,
    LABELS,
    SERVICE,
    TIMEOUT,
    Served,
    byte_tensor,
    call,
    image_request,
    infer,
    refused,
    serving_grpc,
)
from tests.processes import wait_for

PIXELS = bytes(range(12))  # [1, 2, 2, 3]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_grpc(tmp_path_factory.mktemp("served"), max_body_bytes="100000") as served:
        yield served


@pytest.fixture(autouse=True)
def fresh(served: Served) -> None:
    served.replica.answer, served.replica.is_ready = None, True


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with served.channel() as channel:
        yield channel


def test_raw_contents_are_answered_raw(channel: grpc.Channel, served: Served) -> None:
    answer = infer(channel, image_request(b"one", b"", id="an id"))
    assert (answer.model_name, answer.model_version, answer.id) == ("resnet50", "1.0", "an id")
    assert answer.parameters["request_id"].string_param == "r-1"
    assert [(each.name, each.datatype, list(each.shape)) for each in answer.outputs] == [
        ("label", "BYTES", [2, 2]),
        ("class_id", "INT64", [2, 2]),
        ("confidence", "FP32", [2, 2]),
    ]
    assert not any(each.HasField("contents") for each in answer.outputs)
    assert list(answer.raw_output_contents) == [
        byte_tensor(*LABELS, *LABELS),
        struct.pack("<4q", *CLASSES, *CLASSES),
        struct.pack("<4f", *CONFIDENCES, *CONFIDENCES),
    ]
    assert served.replica.path == "/predictions/resnet50"
    assert served.replica.tensors == b"\3\0\0\0one\0\0\0\0"


def test_typed_contents_are_answered_typed(channel: grpc.Channel, served: Served) -> None:
    answer = infer(channel, image_request(b"one", raw=False, model_version="1.0"))
    label, class_id, confidence = (each.contents for each in answer.outputs)
    assert list(label.bytes_contents) == LABELS
    assert list(class_id.int64_contents) == CLASSES
    assert list(confidence.fp32_contents) == CONFIDENCES
    assert not answer.raw_output_contents
    assert not answer.id
    assert served.replica.path == "/predictions/resnet50/1.0"
    assert "id" not in served.replica.document
    assert served.replica.tensors == b"\3\0\0\0one"


@pytest.mark.parametrize("raw", [True, False])
def test_pixels_and_parameters_become_v2_over_rest(
    channel: grpc.Channel, served: Served, raw: bool
) -> None:
    request = pb.ModelInferRequest(model_name="resnet50")
    request.parameters["top_k"].int64_param = 2
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 2, 2, 3])
    if raw:
        request.raw_input_contents.append(PIXELS)
    else:
        tensor.contents.uint_contents.extend(PIXELS)
    wanted = request.outputs.add(name="probabilities")
    wanted.parameters["classification"].int64_param = 3
    wanted.parameters["binary_data"].bool_param = False  # REST's own, which is ours to say
    request.outputs.add(name="label").parameters["odd"].string_param = "ü"
    infer(channel, request)
    assert served.replica.document == {
        "parameters": {"top_k": 2, "binary_data_output": True},
        "inputs": [
            {
                "name": "image",
                "datatype": "UINT8",
                "shape": [1, 2, 2, 3],
                "parameters": {"binary_data_size": 12},
            }
        ],
        "outputs": [
            {"name": "probabilities", "parameters": {"classification": 3}},
            {"name": "label", "parameters": {"odd": "ü"}},
        ],
    }
    assert served.replica.tensors == PIXELS


def test_trailers_say_which_request_and_version_it_was(channel: grpc.Channel) -> None:
    stub: Any = channel.unary_unary(
        f"/{SERVICE}/ModelInfer", pb.ModelInferRequest.SerializeToString
    )
    _, answered = stub.with_call(image_request(b"one"), timeout=TIMEOUT)
    trailers = dict(answered.trailing_metadata())
    assert trailers["x-model-version"] == "1.0"
    assert len(trailers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (400, "UnreadableImage: image 1: no image", "INVALID_ARGUMENT"),
        (404, "NotFound: there is no such version", "NOT_FOUND"),
        (405, "MethodNotAllowed: no", "INVALID_ARGUMENT"),
        (413, "TooManyPixels: 9 of 4", "INVALID_ARGUMENT"),
        (413, "RequestTooLarge: the body has more", "RESOURCE_EXHAUSTED"),
        (415, "UnsupportedFormat: a PDF", "INVALID_ARGUMENT"),
        (500, "ModelFailed: the log has the cause", "INTERNAL"),
        (504, "DeadlineExceeded: nobody waits", "DEADLINE_EXCEEDED"),
    ],
)
def test_errors_of_the_handler(
    channel: grpc.Channel, served: Served, status: int, text: str, code: str
) -> None:
    served.replica.answer = (status, f'{{"error": "{text}"}}'.encode())
    assert refused(channel, image_request(b"one")) == (code, text)


def changed(**fields: Any) -> pb.ModelInferRequest:
    """A good request with other values."""
    request = image_request(b"one", raw=fields.pop("raw", True))
    request.MergeFrom(pb.ModelInferRequest(**fields))
    return request


def overflowing() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="resnet50")
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 1, 3])
    tensor.contents.uint_contents.extend([0, 255, 256])
    return request


def misplaced() -> pb.ModelInferRequest:
    request = image_request(b"one", raw=False)
    request.inputs[0].contents.fp32_contents.append(1)
    return request


def both() -> pb.ModelInferRequest:
    request = image_request(b"one", raw=False)
    request.raw_input_contents.append(b"one")
    return request


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (
            changed(raw_input_contents=[b""]),
            "INVALID_ARGUMENT",
            "1 inputs and 2 raw_input_contents",
        ),
        (both(), "INVALID_ARGUMENT", "has contents although"),
        (overflowing(), "INVALID_ARGUMENT", "input 0 has an element that is no UINT8"),
        (misplaced(), "INVALID_ARGUMENT", "fp32_contents; that of BYTES is bytes_contents"),
        (changed(parameters={"top_k": pb.InferParameter()}), "INVALID_ARGUMENT", "has no value"),
        (changed(model_name="../../health"), "NOT_FOUND", "no model of this name"),
        (changed(model_name="resnet50\r\nX: y"), "NOT_FOUND", "no model of this name"),
        (changed(model_version="1.0/../../.."), "NOT_FOUND", "no such version"),
        (changed(outputs=[{}] * 5000), "INVALID_ARGUMENT", "too many fields"),
        (changed(id="x" * 70000), "INVALID_ARGUMENT", "too many fields, or too large"),
        (pb.ModelInferRequest(), "NOT_FOUND", "no model of this name"),
    ],
)
def test_what_the_protocol_does_not_allow_gets_no_further(
    channel: grpc.Channel, served: Served, request_: pb.ModelInferRequest, code: str, words: str
) -> None:
    before = served.replica.requests
    found, message = refused(channel, request_)
    assert (found, words in message) == (code, True), message
    assert served.replica.requests == before


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x0b"])
def test_bytes_that_are_no_message_are_the_callers_error(
    channel: grpc.Channel, data: bytes
) -> None:
    """grpcio itself would say INTERNAL or UNKNOWN."""
    stub: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    with pytest.raises(grpc.RpcError) as error:
        stub(data, timeout=TIMEOUT)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "could not be read as a ModelInferRequest" in str(error.value.details())


def test_a_method_that_there_is_not(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        call(channel, "RepositoryIndex", empty_pb2.Empty(), empty_pb2.Empty)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_split_is_of_predict_alone(tmp_path: Path) -> None:
    """Over V2 a client who names no version gets the default one."""
    with serving_grpc(tmp_path, split="2.0=100") as other, other.channel() as channel:
        infer(channel, image_request(b"one"))
        assert other.replica.path == "/predictions/resnet50"
        body = to_rest(image_request(b"one"))
        for path, asked in (
            ("/predict", "/predictions/resnet50/2.0"),
            ("/v2/models/resnet50/infer", "/predictions/resnet50"),
        ):
            requests.post(
                other.gateway.url + path,
                data=body.data,
                headers={"Inference-Header-Content-Length": str(body.json_bytes)},
                timeout=TIMEOUT,
            ).raise_for_status()
            assert other.replica.path == asked


def test_large_messages(channel: grpc.Channel, served: Served) -> None:
    """Images of up to GATEWAY_MAX_BODY_BYTES in all come through, larger ones do not."""
    infer(channel, image_request(bytes(99_000)))
    assert len(served.replica.tensors) == 99_004
    before = len(served.gateway.lines("grpc"))
    for size in (99_900, 150_000, 10_000_000):  # refused as V2 over REST, and as a call
        code, message = refused(channel, image_request(bytes(size)))
        assert (code, "100000" in message) == ("RESOURCE_EXHAUSTED", True), message
    wait_for(lambda: len(served.gateway.lines("grpc")) >= before + 2)
    time.sleep(1)  # until a second line about one of them would be there
    lines = served.gateway.lines("grpc")[before:]
    assert ["larger than GATEWAY_MAX_BODY_BYTES" in line["message"] for line in lines] == [True] * 2


def test_a_message_that_is_large_when_it_is_unpacked(channel: grpc.Channel) -> None:
    code, _ = refused(channel, image_request(bytes(50_000_000)), compression=grpc.Compression.Gzip)
    assert code == "RESOURCE_EXHAUSTED"
    infer(channel, image_request(bytes(9_000)), compression=grpc.Compression.Gzip)


def test_metadata(channel: grpc.Channel) -> None:
    server = call(channel, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    assert server.name == "image-classification-torchserve"
    assert set(server.extensions) == {"binary_tensor_data", "classification"}
    model = call(
        channel,
        "ModelMetadata",
        pb.ModelMetadataRequest(name="resnet50"),
        pb.ModelMetadataResponse,
    )
    assert (model.name, list(model.versions)) == ("resnet50", ["1.0"])
    assert model.platform == "pytorch_torchserve"
    assert [(each.name, each.datatype, list(each.shape)) for each in model.inputs] == [
        ("image", "BYTES", [-1])
    ]
    assert [(each.name, each.datatype, list(each.shape)) for each in model.outputs] == [
        ("label", "BYTES", [-1, -1]),
        ("class_id", "INT64", [-1, -1]),
        ("confidence", "FP32", [-1, -1]),
        ("probabilities", "FP32", [-1, 1000]),
    ]
    with pytest.raises(grpc.RpcError) as error:
        call(
            channel,
            "ModelMetadata",
            pb.ModelMetadataRequest(name="unknown"),
            pb.ModelMetadataResponse,
        )
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def is_ready(channel: grpc.Channel, model: str) -> bool:
    asked = pb.ModelReadyRequest(name=model)
    return bool(call(channel, "ModelReady", asked, pb.ModelReadyResponse).ready)


def test_readiness_is_true(channel: grpc.Channel, tmp_path: Path) -> None:
    live = call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
    ready = call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
    assert (live.live, ready.ready) == (True, True)
    assert is_ready(channel, "resnet50")
    assert not is_ready(channel, "unknown")
    with serving_grpc(tmp_path) as other, other.channel() as channel:
        other.replica.is_ready = False
        live = call(channel, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
        ready = call(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
        assert (live.live, ready.ready) == (True, False)
        assert not is_ready(channel, "resnet50")


def check(channel: grpc.Channel, service: str) -> int:
    stub = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    asked = health_pb2.HealthCheckRequest(service=service)
    return int(stub(asked, timeout=TIMEOUT).status)


def watch(channel: grpc.Channel, service: str) -> Any:
    stub = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    return stub(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)


def test_health_follows_readiness(tmp_path: Path) -> None:
    statuses = health_pb2.HealthCheckResponse
    with serving_grpc(tmp_path) as served, served.channel() as channel:
        assert check(channel, "") == check(channel, SERVICE) == statuses.SERVING
        with pytest.raises(grpc.RpcError) as error:
            check(channel, "unknown")
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        assert next(watch(channel, "unknown")).status == statuses.SERVICE_UNKNOWN
        watched = watch(channel, SERVICE)
        assert next(watched).status == statuses.SERVING
        served.replica.is_ready = False
        assert next(watched).status == statuses.NOT_SERVING
        assert check(channel, "") == statuses.NOT_SERVING
        served.replica.is_ready = True
        assert next(watched).status == statuses.SERVING
        assert served.gateway.stop() == 0
        with suppress(grpc.RpcError):  # the connection may end first
            assert [each.status for each in watched] == [statuses.NOT_SERVING]


def test_a_client_without_the_proto_learns_it_by_reflection(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    service = DescriptorPool(database).FindServiceByName(SERVICE)
    assert service.methods_by_name["ModelInfer"].input_type.full_name == (
        "inference.ModelInferRequest"
    )

"""A stand-in for TorchServe that speaks V2 with binary tensors, and a plain gRPC client."""

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
from google.protobuf.message import Message

from service.openinference import inference_pb2 as pb
from tests.gateway.running import Gateway, running, variables
from tests.processes import free_port

SERVICE = "inference.GRPCInferenceService"
TIMEOUT = 30
LABELS, CLASSES, CONFIDENCES = [b"tench", "Käfig".encode()], [0, 489], [0.75, 0.125]


def byte_tensor(*elements: bytes) -> bytes:
    """BYTES as the binary extension lays it out."""
    return b"".join(struct.pack("<I", len(each)) + each for each in elements)


@dataclass
class Replica:
    """What was asked, and what to answer; without an answer, two classes for each image."""

    headers: dict[str, str] = field(default_factory=dict)
    path: str = ""
    document: dict[str, Any] = field(default_factory=dict)
    tensors: bytes = b""
    requests: int = 0
    faults: list[str] = field(default_factory=list)  # requests that are no V2
    answer: tuple[int, bytes] | None = None  # an error's status and body
    is_ready: bool = True
    held: Event | None = None  # to be set before it answers

    def predict(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        if "X-Probe" in request.headers:
            return send(request, 200, b"{}")
        self.requests += 1
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        self.path = request.path
        size = int(self.headers.get("inference-header-content-length", len(body)))
        self.document, self.tensors = json.loads(body[:size]), body[size:]
        inputs = self.document["inputs"]
        if fault := self._fault(inputs):
            self.faults.append(f"{fault}: {request.path} {body[:1000]!r}")
        if len(inputs) != 1 or not inputs[0]["shape"] or not 0 <= inputs[0]["shape"][0] <= 10:
            return send(request, 400, b'{"error": "MalformedRequest: not one tensor of images"}')
        if self.held:
            self.held.wait(TIMEOUT)
        if self.answer:
            return send(request, *self.answer)
        n = inputs[0]["shape"][0]
        outputs = [
            ("label", "BYTES", byte_tensor(*LABELS) * n),
            ("class_id", "INT64", struct.pack("<2q", *CLASSES) * n),
            ("confidence", "FP32", struct.pack("<2f", *CONFIDENCES) * n),
        ]
        answer = {
            "model_name": "resnet50",
            "model_version": "1.0",
            "parameters": {"request_id": "r-1"},
            "outputs": [
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": [n, 2],
                    "parameters": {"binary_data_size": len(data)},
                }
                for name, datatype, data in outputs
            ],
        }
        if "id" in self.document:
            answer["id"] = self.document["id"]
        text = json.dumps(answer).encode()
        head = {"Inference-Header-Content-Length": str(len(text))}
        return send(request, 200, text + b"".join(data for *_, data in outputs), head)

    def _fault(self, inputs: list[dict[str, Any]]) -> str:
        """What of a request our own server should never have let through; "" if nothing."""
        if not re.fullmatch(
            r"/predictions/[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?", self.path
        ):
            return "path"
        sizes = [each["parameters"]["binary_data_size"] for each in inputs]
        return "sizes" if sum(sizes) != len(self.tensors) else ""

    def manage(self, request: BaseHTTPRequestHandler) -> None:
        status = "READY" if self.is_ready else "UNLOADING"
        described = {"model": "resnet50", "version": "1.0", "classes": 1000}
        facts: dict[str, Any] = {"modelVersion": "1.0", "workers": [{"status": status}]}
        send(request, 200, json.dumps([facts | {"customizedMetadata": described}]).encode())


def send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, head: dict[str, str] | None = None
) -> None:
    request.send_response(status)
    for name, value in {"X-Model-Version": "1.0", "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    for name, value in (head or {"Content-Type": "application/json"}).items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@contextmanager
def replica() -> Iterator[tuple[Replica, str]]:
    """It, and its address for predictions and management alike."""
    replica = Replica()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.startswith("/models/"):
                replica.manage(self)
            else:
                send(self, 200, b"{}")

        def do_POST(self) -> None:
            replica.predict(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *args: object) -> None:
            """Nothing."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A connection that is cut is no matter."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield replica, f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Served:
    """A gateway with gRPC, and what is behind it."""

    gateway: Gateway
    replica: Replica
    port: int  # of gRPC

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.enable_http_proxy", 0)])


@contextmanager
def serving_grpc(folder: Path, scheme: str = "http", **settings: str) -> Iterator[Served]:
    """./scripts/gateway with gRPC in front of a stand-in."""
    port = free_port()
    with replica() as (behind, address):
        known = {"upstreams": address, "management": address, "models": "resnet50", "rate": "0"}
        env = variables(**known | {"grpc_port": str(port)} | settings)
        with running(folder, env, scheme) as gateway:
            yield Served(gateway, behind, port)


def call(
    channel: grpc.Channel, method: str, request: Message, kind: type[Message], **options: Any
) -> Any:
    """The answer of one method of the service; raises grpc.RpcError."""
    stub = channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=kind.FromString,
    )
    return stub(request, **{"timeout": TIMEOUT} | options)


def image_request(*images: bytes, raw: bool = True, **more: Any) -> pb.ModelInferRequest:
    """Encoded images as one tensor of BYTES, as raw or as typed contents."""
    request = pb.ModelInferRequest(**{"model_name": "resnet50"} | more)
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(images)])
    if raw:
        request.raw_input_contents.append(byte_tensor(*images))
    else:
        tensor.contents.bytes_contents.extend(images)
    return request


def infer(channel: grpc.Channel, request: pb.ModelInferRequest, **options: Any) -> Any:
    return call(channel, "ModelInfer", request, pb.ModelInferResponse, **options)


def refused(
    channel: grpc.Channel, request: pb.ModelInferRequest, **options: Any
) -> tuple[str, str]:
    """The name of the error's code, and its message."""
    try:
        infer(channel, request, **options)
    except grpc.RpcError as error:
        return error.code().name, str(error.details())
    raise AssertionError("it was answered")

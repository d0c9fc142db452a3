"""The methods of GRPCInferenceService, as requests to the gateway."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import grpc

from service.gateway.settings import NAME, VERSION
from service.openinference import inference_pb2 as pb
from service.openinference.callers import Refused
from service.openinference.rest import InvalidMessage, from_rest, to_metadata, to_rest
from service.openinference.upstream import Reply, Upstream

# Metadata of a call that the gateway gets as headers. The address and the deadline are ours to say.
PASSED_ON = ("authorization", "x-api-key", "traceparent", "tracestate", "x-request-id", "x-top-k")
MAX_TIMEOUT_SECONDS = 10**9 - 1  # more digits are no X-Request-Timeout
READY_SECONDS = 1.0  # for which an answer about readiness holds


@dataclass
class Caller:
    """Who calls, with what metadata, and what to tell them in trailers."""

    address: str
    metadata: Mapping[str, str | bytes]
    time_left: Callable[[], float | None]
    told: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def of(cls, context: Any) -> "Caller":
        """Of a call that nginx has passed on, which says whose it is."""
        metadata = dict(context.invocation_metadata() or ())
        return cls(str(metadata.get("x-forwarded-for", "")), metadata, context.time_remaining)

    def headers(self) -> dict[str, str]:
        """Headers of a request to the gateway. Raises Refused."""
        found = {"X-Forwarded-For": self.address}
        for name in PASSED_ON:
            if value := str(self.metadata.get(name, "")):
                if not (value.isascii() and value.isprintable()):
                    raise Refused(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"BadRequest: the metadata {name} has characters that no header may have",
                    )
                found[name] = value
        if (left := self.time_left()) is not None:
            found["X-Request-Timeout"] = f"{min(left, MAX_TIMEOUT_SECONDS):.3f}"
        return found


class Inference:
    """One coroutine for each method; each raises Refused."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._looked, self._is_ready = -READY_SECONDS, False
        self._looking = asyncio.Lock()

    async def server_live(self, _: object, caller: Caller) -> pb.ServerLiveResponse:
        live = await self._is_so("/v2/health/live", caller.headers())
        return pb.ServerLiveResponse(live=live)

    async def server_ready(self, _: object, caller: Caller) -> pb.ServerReadyResponse:
        ready = await self._is_so("/v2/health/ready", caller.headers())
        return pb.ServerReadyResponse(ready=ready)

    async def model_ready(
        self, request: pb.ModelReadyRequest, caller: Caller
    ) -> pb.ModelReadyResponse:
        path = f"{_path(request.name, request.version)}/ready"
        return pb.ModelReadyResponse(ready=await self._is_so(path, caller.headers()))

    async def server_metadata(self, _: object, caller: Caller) -> pb.ServerMetadataResponse:
        document = await self._document("/v2", caller)
        return pb.ServerMetadataResponse(
            name=document["name"],
            version=document["version"],
            extensions=document["extensions"],
        )

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, caller: Caller
    ) -> pb.ModelMetadataResponse:
        return to_metadata(await self._document(_path(request.name, request.version), caller))

    async def model_infer(
        self, request: pb.ModelInferRequest, caller: Caller
    ) -> pb.ModelInferResponse:
        path, headers = (
            f"{_path(request.model_name, request.model_version)}/infer",
            caller.headers(),
        )
        has_raw = bool(request.raw_input_contents)
        try:
            body = to_rest(request)
        except InvalidMessage as exc:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"MalformedRequest: {exc}") from None
        del request  # while the answer is waited for, an image is in memory once
        reply = await self._upstream.infer(path, headers, body)
        caller.told = reply.told
        if reply.status != HTTPStatus.OK:
            reply.refuse()
        return from_rest(reply.body, has_raw)

    async def is_ready(self) -> bool:
        """Whether every model can answer; asked at most once a second, whoever wants to know."""
        async with self._looking:
            if time.monotonic() - self._looked >= READY_SECONDS:
                try:
                    self._is_ready = await self._is_so("/v2/health/ready", {})
                except Refused:
                    self._is_ready = False
                self._looked = time.monotonic()
            return self._is_ready

    async def _is_so(self, path: str, headers: Mapping[str, str]) -> bool:
        """What a page answers that says yes with 200, and no with 400, 404 or 503."""
        reply = await self._upstream.get(path, headers)
        if reply.status not in (200, 400, 404, 503):
            reply.refuse()
        return reply.status == HTTPStatus.OK

    async def _document(self, path: str, caller: Caller) -> Any:
        reply: Reply = await self._upstream.get(path, caller.headers())
        caller.told = reply.told
        if reply.status != HTTPStatus.OK:
            reply.refuse()
        return reply.document


def _path(model: str, version: str) -> str:
    """The page of a model, or of a version of it. Raises Refused: others' names are no paths."""
    if not NAME.fullmatch(model):
        raise Refused(grpc.StatusCode.NOT_FOUND, "NotFound: there is no model of this name")
    if version and not VERSION.fullmatch(version):
        raise Refused(grpc.StatusCode.NOT_FOUND, "NotFound: there is no such version of the model")
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")

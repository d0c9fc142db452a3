"""Calls from bytes to bytes: who calls, limits, errors, and lines in the log."""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.logs import Log
from service.openinference import inference_pb2 as pb
from service.openinference.callers import Places, Refused
from service.openinference.inference import Caller, Inference
from service.openinference.process import Config
from service.openinference.wire import has_many_fields

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
HEALTH_SECONDS = 1.0  # between two looks of a Watch

Status = health_pb2.HealthCheckResponse


class Calls:
    """The three services.

    Every method is served as one that takes a stream, whatever it is to clients, who cannot tell:
    so a message is read here, with a limit in time, and an invalid one is the client's error.
    """

    def __init__(
        self, inference: Inference, config: Config, log: Log, stopping: asyncio.Event
    ) -> None:
        self._inference = inference
        self._places = Places(config.max_concurrent)
        self._seconds = config.body_seconds
        self._log = log
        self._stopping = stopping
        self._reflection = reflection.aio.ReflectionServicer([SERVICE, HEALTH, REFLECTION])

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        inference = self._inference
        services = {
            SERVICE: {
                "ServerLive": self._unary(pb.ServerLiveRequest, inference.server_live),
                "ServerReady": self._unary(pb.ServerReadyRequest, inference.server_ready),
                "ModelReady": self._unary(pb.ModelReadyRequest, inference.model_ready),
                "ServerMetadata": self._unary(pb.ServerMetadataRequest, inference.server_metadata),
                "ModelMetadata": self._unary(pb.ModelMetadataRequest, inference.model_metadata),
                "ModelInfer": self._unary(pb.ModelInferRequest, inference.model_infer),
            },
            HEALTH: {
                "Check": self._unary(health_pb2.HealthCheckRequest, self._check),
                "Watch": self._stream(self._watch),
            },
            REFLECTION: {"ServerReflectionInfo": self._stream(self._reflect)},
        }
        return [
            grpc.method_handlers_generic_handler(name, methods)
            for name, methods in services.items()
        ]

    def _unary(
        self, kind: type[Message], answer: Callable[[Any, Caller], Awaitable[Message]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def handle(_: object, context: Any) -> bytes:
            caller = Caller.of(context)
            try:
                with self._places.take(caller.address):
                    data = await self._receive(context)
                asked = answer(parse(kind, data), caller)
                del data  # while the answer is waited for, an image is in memory once
                reply = await asked
                context.set_trailing_metadata(caller.told)
                return reply.SerializeToString()
            except Exception as exc:
                raise await self._refuse(context, caller, exc) from None

        return grpc.stream_unary_rpc_method_handler(handle)

    def _stream(
        self, answer: Callable[[Any, Caller], AsyncIterator[Message]]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        async def handle(_: object, context: Any) -> AsyncIterator[bytes]:
            caller = Caller.of(context)
            try:
                with self._places.take(caller.address):
                    async for reply in answer(context, caller):
                        yield reply.SerializeToString()
            except Exception as exc:
                raise await self._refuse(context, caller, exc) from None

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _next(self, context: Any) -> bytes | None:
        """The next message, or None if there is none. Raises Refused if it does not come."""
        try:
            data = await asyncio.wait_for(context.read(), self._seconds)
        except asyncio.TimeoutError:  # not the builtin one before Python 3.11
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED, "RequestTimeout: the message came too slowly"
            ) from None
        return None if data is grpc.aio.EOF else data

    async def _receive(self, context: Any) -> bytes:
        """The next message. Raises Refused."""
        data = await self._next(context)
        if (
            data is None
        ):  # the second: grpcio itself has answered RESOURCE_EXHAUSTED, and says no more
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BadRequest: there is no message, or it is larger than GATEWAY_MAX_BODY_BYTES",
            )
        return data

    async def _refuse(self, context: Any, caller: Caller, exc: Exception) -> Exception:
        """End a call with its error, and write the line that the gateway has not written.

        Returns what grpc wants to have raised.
        """
        if isinstance(exc, Refused):
            refused = exc
        else:
            refused = Refused(
                grpc.StatusCode.INTERNAL, "InternalError: the gateway failed; its log has the cause"
            )
        if not refused.is_logged:
            facts = {"code": refused.code.name, "address": caller.address, "message": str(refused)}
            if refused is not exc:
                facts["cause"] = "".join(traceback.format_exception(exc))
            self._log.event("ERROR" if refused is not exc else "INFO", "grpc", **facts)
        try:
            await context.abort(refused.code, str(refused), refused.metadata)
        except Exception as aborted:
            return aborted
        raise AssertionError("abort raises")

    async def _status(self, service: str) -> Any:
        if service not in ("", SERVICE):
            return Status.SERVICE_UNKNOWN
        is_ready = not self._stopping.is_set() and await self._inference.is_ready()
        return Status.SERVING if is_ready else Status.NOT_SERVING

    async def _check(self, request: health_pb2.HealthCheckRequest, _: Caller) -> Message:
        status = await self._status(request.service)
        if status == Status.SERVICE_UNKNOWN:
            raise Refused(grpc.StatusCode.NOT_FOUND, "NotFound: there is no such service")
        return Status(status=status)

    async def _watch(self, context: Any, _: Caller) -> AsyncIterator[Message]:
        """The status now, and whenever it changes."""
        request = parse(health_pb2.HealthCheckRequest, await self._receive(context))
        told, stops = None, False
        while not stops:
            stops = self._stopping.is_set()
            status = await self._status(request.service)
            if status != told:
                told = status
                yield Status(status=status)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), HEALTH_SECONDS)

    async def _reflect(self, context: Any, _: Caller) -> AsyncIterator[Message]:
        """The services' descriptions, for clients that have no .proto."""

        async def requests() -> AsyncIterator[Message]:
            while (data := await self._next(context)) is not None:
                yield parse(reflection_pb2.ServerReflectionRequest, data)

        answers: Any = self._reflection.ServerReflectionInfo
        async for reply in answers(requests(), context):
            yield reply


def parse(kind: type[Message], data: bytes) -> Any:
    """A message of this kind. Raises Refused."""
    if kind is pb.ModelInferRequest and has_many_fields(data):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            "MalformedRequest: the message has too many fields, or too large ones",
        )
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"MalformedRequest: {len(data)} bytes could not be read as a {kind.DESCRIPTOR.name}",
        ) from None

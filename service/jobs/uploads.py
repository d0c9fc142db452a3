"""Bodies of POST /jobs: forms, archives and lists of URLs, written to the disk as they come."""

import re
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import BodyPartReader, web

from service.jobs.archives import unpack
from service.jobs.outside import Outside
from service.jobs.settings import MAX_URL
from service.jobs.spool import Limits, Refused, Spool

CHUNK = 2**16
MAX_FIELD = 4096  # bytes of a field that is no image
MAX_JSON = 4 * 2**20  # bytes of a list of URLs; a URL takes 2048 characters at most
OPTIONS = {
    "top_k": re.compile(r"[1-9][0-9]{0,3}"),
    "model": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"),
    "version": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}"),
    "webhook": re.compile(rf"https?://\S{{1,{MAX_URL}}}"),
}


class Upload:
    """One body, taken in; what it has is in `options`, `count`, `bytes` and `digest`."""

    def __init__(self, spool: Spool, limits: Limits, outside: Outside) -> None:
        self._spool, self._limits, self._outside = spool, limits, outside
        self.options = dict.fromkeys(OPTIONS, "")
        self.count = 0
        self.digest = ""

    async def receive(self, request: web.Request) -> None:
        """Write the images into the spool. Raises Refused."""
        self._take_options(request.query)
        kind = request.content_type
        if kind.startswith("multipart/"):
            await self._receive_parts(request)
        elif kind == "application/json":
            self._take_urls(await _whole(request, MAX_JSON))
        else:
            await self._receive_archive(request)
        if not self.count:
            raise Refused(400, "NoImage", "the job has no images")
        if (webhook := self.options["webhook"]) and not self._outside.admits_webhook(webhook):
            raise Refused(
                403, "Forbidden", "the webhook's URL is not one of those that this service calls"
            )

    def _take_options(self, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if name not in OPTIONS:
                known = ", ".join(OPTIONS)
                raise Refused(400, "InvalidOption", f"{name[:64]} is unknown; known: {known}")
            if isinstance(value, bool) or not OPTIONS[name].fullmatch(str(value)):
                raise Refused(400, "InvalidOption", f"{name} has a value that is not allowed")
            self.options[name] = str(value)

    async def _receive_parts(self, request: web.Request) -> None:
        try:
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                if not isinstance(part, BodyPartReader):
                    raise Refused(400, "MalformedRequest", "a part has parts of its own")
                is_field = request.content_type == "multipart/form-data" and not part.filename
                if is_field and part.name in OPTIONS:
                    value = await _field(part)
                    self._take_options({part.name: value})
                    continue
                self._spool.begin(part.filename or part.name or f"image {self._spool.count + 1}")
                while chunk := await part.read_chunk(CHUNK):
                    self._spool.write(chunk)
                self._spool.end()
        except (ValueError, AssertionError, EOFError) as exc:
            raise Refused(400, "MalformedRequest", "the body is not valid multipart") from exc
        self.count, self.digest = self._spool.count, self._spool.digest

    def _take_urls(self, body: bytes) -> None:
        try:
            document = orjson.loads(body)
            urls = document.pop("urls")
            if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refused(
                400, "MalformedRequest", 'the body must be {"urls": ["https://…", …]}'
            ) from None
        self._take_options(document)
        for i, url in enumerate(urls):
            if not self._outside.admits_source(url):
                raise Refused(
                    403, "Forbidden", f"URL {i} is not one of those that this service fetches"
                )
            self._spool.add_url(url)
        self.count, self.digest = self._spool.count, self._spool.digest

    async def _receive_archive(self, request: web.Request) -> None:
        archive = self._spool.path / "archive"
        with archive.open("wb") as file:
            size = 0
            async for chunk in request.content.iter_chunked(CHUNK):
                size += len(chunk)
                if size > self._limits.bytes:
                    raise Refused(
                        413, "RequestTooLarge", f"the body has more than {self._limits.bytes} bytes"
                    )
                file.write(chunk)
        self.count, _, self.digest = await unpack(archive, self._spool, self._limits)
        archive.unlink()


async def _field(part: BodyPartReader) -> str:
    text = b""
    while chunk := await part.read_chunk(CHUNK):
        text += chunk
        if len(text) > MAX_FIELD:
            raise Refused(413, "RequestTooLarge", f"{part.name} has more than {MAX_FIELD} bytes")
    return text.decode()


async def _whole(request: web.Request, limit: int) -> bytes:
    found = bytearray()
    async for chunk in request.content.iter_chunked(CHUNK):
        found += chunk
        if len(found) > limit:
            raise Refused(413, "RequestTooLarge", f"the list has more than {limit} bytes")
    return bytes(found)

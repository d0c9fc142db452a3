"""Requests to other hosts: images by URL, and webhooks. Only to addresses that the settings admit.

Names are looked up once, by the connection itself, and what it connects to is what is judged: a
name that means something else a moment later (DNS rebinding) helps nobody.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
import time
from typing import Any

import aiohttp

from service.jobs.settings import JobsSettings, admits

CONNECT_SECONDS = 5
FETCH_SECONDS = 30  # for a whole image
CALL_SECONDS = 15  # for the answer of a webhook
CHUNK = 2**16
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class NotFetched(Exception):
    """An image that could not be had; the message is for the client."""


class Outside:
    """Connections to others; a context manager."""

    def __init__(self, settings: JobsSettings, key: bytes, max_bytes: int) -> None:
        """`key` signs webhooks; an image may have `max_bytes`."""
        self._sources = settings.prefixes("jobs_sources")
        self._webhooks = settings.prefixes("jobs_webhooks")
        self._private = settings.jobs_private_addresses
        self._key = key
        self._max_bytes = max_bytes

    async def __aenter__(self) -> "Outside":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=16, force_close=True, use_dns_cache=False, socket_factory=self._socket
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "image-classification-jobs"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """For one address that a name stands for. Raises OSError if it is not to be reached."""
        family, kind, protocol, _, address = info
        if not self._private and not is_public(address[0]):
            raise OSError("the host has an address that is not public")
        return socket.socket(family, kind, protocol)

    def admits_source(self, url: str) -> bool:
        return admits(self._sources, url)

    def admits_webhook(self, url: str) -> bool:
        return admits(self._webhooks, url)

    async def fetch(self, url: str) -> bytes:
        """The bytes at a URL. Raises NotFetched."""
        if not self.admits_source(url):  # the setting may have changed since the job was taken
            raise NotFetched("the URL is not one of those that are admitted")
        timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with self._session.get(url, timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise NotFetched(f"the host answered with status {answer.status}")
                found = bytearray()
                async for chunk in answer.content.iter_chunked(CHUNK):
                    found += chunk
                    if len(found) > self._max_bytes:
                        raise NotFetched(f"the image has more than {self._max_bytes} bytes")
                return bytes(found)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as exc:
            raise NotFetched(f"the host did not answer: {type(exc).__name__}") from exc

    async def call(self, url: str, message_id: str, body: bytes) -> str:
        """Send a webhook; "" if the host took it, or else why not."""
        if not self.admits_webhook(url):
            return "the URL is not one of those that are admitted"
        headers = {"Content-Type": "application/json"} | signed(
            self._key, message_id, int(time.time()), body
        )
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with self._session.post(
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                taken = 200 <= answer.status < 300
                return "" if taken else f"status {answer.status}"
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as exc:
            return type(exc).__name__


def signed(key: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a webhook: standardwebhooks.com, HMAC-SHA256 over id, time and body."""
    content = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def is_public(text: str) -> bool:
    """Whether an IP address is one of the public internet, however IPv6 may wrap it."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour or (address.teredo or (None,))[0]
        if wrapped:
            return is_public(str(wrapped))
        if address in NAT64:
            return False
    return address.is_global and not address.is_multicast

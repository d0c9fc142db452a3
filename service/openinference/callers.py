"""Who calls, and how many calls wait for what their callers still have to send."""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote

import grpc

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refused(Exception):
    """A call that is not answered; the message is for the client.

    `metadata` are trailers; `is_logged`: the gateway has written a line about it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        metadata: Sequence[tuple[str, str]] = (),
        is_logged: bool = False,
    ) -> None:
        super().__init__(message)
        self.code, self.metadata, self.is_logged = code, tuple(metadata), is_logged


def address_of(peer: str, forwarded: str, proxies: Sequence[Network]) -> str:
    """The client's address, as nginx finds it.

    `peer` is gRPC's (`ipv4:127.0.0.1:1234`, `ipv6:%5B::1%5D:1234`), `forwarded` an X-Forwarded-For.
    That counts only from one of the proxies: its last address that is none of them.
    """
    _, _, rest = unquote(peer).partition(":")
    address = _parse(rest.rpartition(":")[0].strip("[]"))
    for word in reversed(forwarded.split(",")):
        if address is None or not any(address in network for network in proxies):
            break
        if (found := _parse(word.strip())) is None:
            break
        address = found
    return str(address or "unknown")


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Places:
    """A limit on the calls that wait for their callers.

    If all places are taken, the address that has most loses its oldest, so that nobody locks the
    others out.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken: dict[asyncio.Task[object], str] = {}  # oldest first
        self._cut: set[asyncio.Task[object]] = set()

    @contextmanager
    def take(self, address: str) -> Iterator[None]:
        """A place for the current task. Raises Refused if there is none, or if it is lost."""
        full = Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TooManyRequests: too many open calls")
        if len(self._taken) >= self._total and not self._make_room(address):
            raise full
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for mypy: only coroutines of the server call this
        self._taken[task] = address
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            raise full from None
        finally:
            self._taken.pop(task, None)
            self._cut.discard(task)

    def _make_room(self, address: str) -> bool:
        counts = Counter(self._taken.values())
        most, count = counts.most_common(1)[0]
        if count <= counts[address] + 1:
            return False
        oldest = next(task for task, taker in self._taken.items() if taker == most)
        del self._taken[oldest]
        self._cut.add(oldest)
        oldest.cancel()
        return True

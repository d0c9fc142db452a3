"""Calls that are refused, and how many wait for what their callers still have to send."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc


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

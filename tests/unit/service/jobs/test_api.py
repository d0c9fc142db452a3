"""Places that clients share, and jobs that are kept."""

import asyncio
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from redis import ResponseError

from service.jobs import spool
from service.jobs.api import Api, place
from service.jobs.settings import JobsSettings
from service.jobs.spool import Limits, Refused, Spool


def test_places_are_shared_and_come_back() -> None:
    taken = Counter[str]()
    with ExitStack() as stack:
        for client in ("alice", "alice", "bob"):
            stack.enter_context(place(taken, client, 2, 3, "jobs"))
        for client in ("alice", "carol"):  # her own are taken, and everybody's
            with pytest.raises(Refused) as error, place(taken, client, 2, 3, "jobs"):
                pass
            assert error.value.status == 429
        assert taken == {"alice": 2, "bob": 1}
    assert not taken


def test_a_job_that_redis_has_is_taken_also_if_it_cannot_begin_yet(tmp_path: Path) -> None:
    """The keeper lets it begin; a client that is refused would send it once more."""
    store: Any = AsyncMock(**{"get.return_value": None, "open.return_value": {}})
    config: Any = SimpleNamespace(settings=JobsSettings(), folder=str(tmp_path), max_image_bytes=1)
    send = AsyncMock(side_effect=ResponseError("full"))
    api = Api(store, AsyncMock(), config, send, asyncio.Event())
    with Spool.create(tmp_path, Limits(1, 1, 1)) as new:
        asyncio.run(api._accept(new, {"id": "a" * 32, "client": "alice", "digest": ""}))
    send.assert_awaited_once_with("a" * 32)
    assert spool.jobs_in(tmp_path) == ["a" * 32]

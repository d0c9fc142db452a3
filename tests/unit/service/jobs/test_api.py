"""Places that clients share."""

from collections import Counter
from contextlib import ExitStack

import pytest

from service.jobs.api import place
from service.jobs.spool import Refused


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

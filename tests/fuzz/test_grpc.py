"""The short form: mutated messages over gRPC."""

from pathlib import Path

import pytest

from handler.errors import SetupError
from service.gateway.process import find_nginx
from tests import skip
from tests.fuzz.grpc import against_stand_in, report

CALLS = 2000


@pytest.fixture(scope="module", autouse=True)
def nginx() -> None:
    try:
        find_nginx()
    except SetupError as exc:
        skip(str(exc))


def test_no_message_gets_an_undeserved_answer(tmp_path: Path) -> None:
    found = against_stand_in(tmp_path, CALLS, seed=1)
    assert not found.wrong, report(found) + "\n".join(found.wrong)
    assert found.sent == CALLS
    assert found.codes["OK"] > CALLS / 10
    assert found.codes["INVALID_ARGUMENT"] > CALLS / 5

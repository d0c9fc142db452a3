"""TorchServe's base handler as we import it: a form keeps all its parts."""

from typing import Any

import pytest
from ts.service import Service

from handler.base import keep_every_part
from handler.payloads import read_request
from handler.settings import Settings
from tests.unit.handler.test_forms import JPEG, OTHER, TYPE


def message(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """A form as it comes from the socket."""
    return {
        "requestId": b"1",
        "headers": [{"name": b"Content-Type", "value": TYPE.encode()}],
        "parameters": [
            {"name": name, "contentType": "", "value": bytearray(value)} for name, value in parts
        ],
    }


def test_parts_of_one_name_survive_torchserves_dict() -> None:
    sent = [("file", JPEG), ("top_k", b"2"), ("file", OTHER), ("file1", JPEG), ("file", JPEG)]
    headers, rows, ids = Service.retrieve_data_for_inference([message(*sent)])
    assert ids == {0: "1"}
    names = {"content-type": headers[0].get_request_property("Content-Type")}
    answer = read_request(rows[0], names, 1000, Settings())
    assert (answer.images, answer.top_k) == ([JPEG, OTHER, JPEG, JPEG], 2)


def test_parts_called_body_survive_torchserves_dict() -> None:
    rows = Service.retrieve_data_for_inference([message(("body", JPEG), ("body", OTHER))])[1]
    answer = read_request(rows[0], {"content-type": TYPE}, 1000, Settings())
    assert answer.images == [JPEG, OTHER]


def test_no_batch_is_refused_as_before() -> None:
    with pytest.raises(ValueError, match="invalid inputs"):
        keep_every_part(None)

"""What clients of the gateway send, and what they check of its answers."""

import re
import socket
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from tests.server.colours import encoded

TIMEOUT = 60
RED = encoded("red")
SMALL = encoded("red", size=(64, 48))
NAMES = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    413: "RequestTooLarge",
    414: "UriTooLong",
    429: "TooManyRequests",
    431: "HeadersTooLarge",
    503: "Unavailable",
    504: "Timeout",
}


def check_error(answer: requests.Response, status: int, type_name: str = "") -> None:
    """It is an error in our form, and says nothing of what is behind the gateway."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == str(len(answer.content))  # not in chunks
    error = answer.json()
    assert set(error) == {"status", "code", "type", "message"}
    assert (error["status"], error["code"]) == ("error", status)
    assert error["type"] == (type_name or NAMES[status])
    assert error["message"]
    assert not re.search(r"/tmp|nginx|<|Exception", error["message"])


def best(answer: requests.Response) -> str:
    """The top-1 class."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["predictions"][0]["class"])


class From(HTTPAdapter):
    """Connections from another loopback address: another client."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self.address, 0), **options)


def client(address: str) -> requests.Session:
    """A client at this loopback address, without a proxy of the environment's."""
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", From(address))
    return session


def raw(port: int, request: bytes) -> bytes:
    """What comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer

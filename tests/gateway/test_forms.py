"""Forms at which TorchServe's own parser fails, through the gateway: it must never see them."""

from base64 import encodebytes
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import requests

from tests.gateway.conftest import Served
from tests.gateway.test_replicas import java
from tests.gateway.test_routes import best
from tests.server.colours import encoded

TIMEOUT = 60
BODY_BYTES = 6 * 10**6
REQUESTS = 200
MAX_GROWTH = 30 * 2**20  # each lost body would be 6 MB

HEADERS = {
    "base64": "Content-Transfer-Encoding: base64\r\n",
    "charset": "Content-Type: image/jpeg; charset=binary\r\n",
    "folded": "",
}


def form(kind: str) -> bytes:
    """A form of one image, as large as a photograph: what follows a JPEG's end is no part of it."""
    image = encoded("red")
    image += bytes(BODY_BYTES - len(image))
    if kind == "base64":
        image = encodebytes(image[: BODY_BYTES * 3 // 4])
    name = ';\r\n name="file"' if kind == "folded" else '; name="file"'
    head = f"--x\r\nContent-Disposition: form-data{name}\r\n{HEADERS[kind]}\r\n"
    return head.encode() + image + b"\r\n--x--\r\n"


def resident(gateway: Served) -> int:
    return java(gateway.server).memory_info().rss


def test_every_form_is_answered_and_none_is_kept_in_java(gateway: Served) -> None:
    url = f"{gateway.url}/predict"

    def send(kind: str) -> int:
        plain = kind == "raw"
        content_type = "image/jpeg" if plain else "multipart/form-data; boundary=x"
        headers = {"Content-Type": content_type}
        return requests.post(url, data=bodies[kind], headers=headers, timeout=TIMEOUT).status_code

    bodies = {kind: form(kind) for kind in HEADERS} | {"raw": encoded("red") + bytes(BODY_BYTES)}
    with ThreadPoolExecutor(4) as pool:
        # Java's heap grows with bodies of this size, until it has had enough of them.
        assert set(pool.map(send, ["raw"] * 150)) == {200}
        before = resident(gateway)
        statuses = Counter(pool.map(send, islice(cycle(HEADERS), REQUESTS)))
    assert statuses == {200: REQUESTS}
    assert resident(gateway) - before < MAX_GROWTH
    assert best(requests.post(url, data=encoded("red"), timeout=TIMEOUT)) == "red"

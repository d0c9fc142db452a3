"""Forms at which TorchServe's own parser fails, through the gateway: it must never see them."""

from base64 import encodebytes
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import requests

from tests.gateway.clients import TIMEOUT, best
from tests.gateway.conftest import serving_with_gateway
from tests.server.colours import encoded

BODY_BYTES = 6 * 10**6
WARM_UP = 120
REQUESTS = 60
MAX_GROWTH = 30 * 2**20  # each lost body would be 6 MB, each lost form 20 of them
# The whole heap is there from the start, so that only what lies outside grows; and buffers are
# given back at once, because a pool of them grows by 16 MB whenever a thread wants one more.
FIXED_HEAP = (
    "-XX:+UseSerialGC -Xms256m -Xmx256m -XX:+AlwaysPreTouch -Dio.netty.allocator.type=unpooled"
)

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


def test_every_form_is_answered_and_none_is_kept_in_java(
    tmp_path: Path, colours: list[str], store: Path
) -> None:
    bodies = {kind: form(kind) for kind in HEADERS} | {
        "raw": encoded("red") + bytes(BODY_BYTES * 3 // 2)
    }
    started = serving_with_gateway(tmp_path, colours, store, TS_VMARGS=FIXED_HEAP)
    with started as served, ThreadPoolExecutor(4) as pool:
        url, server = f"{served.url}/predict", served.server

        def send(kind: str) -> int:
            form_type = "multipart/form-data; boundary=x"
            headers = {"Content-Type": "image/jpeg" if kind == "raw" else form_type}
            body = bodies[kind]
            return requests.post(url, data=body, headers=headers, timeout=TIMEOUT).status_code

        # Larger ones first: Java has compiled what it compiles and has the memory it wants by then.
        assert set(pool.map(send, ["raw"] * WARM_UP)) == {200}
        before = server.java().memory_info().rss
        statuses = Counter(pool.map(send, islice(cycle(HEADERS), REQUESTS)))
        assert statuses == {200: REQUESTS}
        assert server.java().memory_info().rss - before < MAX_GROWTH
        assert best(requests.post(url, data=encoded("red"), timeout=TIMEOUT)) == "red"

"""The gateway's keys file: refused, or clients that cannot be nginx's syntax."""

import re

from handler.errors import InvalidSettings
from service.gateway.settings import read_keys
from tests.fuzz.target import Target, as_file, digest

DIGEST = b"0123456789abcdef" * 4


def check(data: bytes) -> None:
    path = as_file(data)
    try:
        clients = read_keys(path)
    except InvalidSettings as error:
        assert "\n" not in str(error)
        secret = re.search(rb"[A-Za-z0-9_-]{20,}", data)  # which a line may hold by mistake
        assert not secret or secret[0].decode() not in str(error)
        return
    assert len({client.sha256 for client in clients}) == len(clients)
    for client in clients:
        assert re.fullmatch("[A-Za-z0-9_.-]{1,64}", client.name)
        assert re.fullmatch("[0-9a-f]{64}", client.sha256)
    lines = [
        f"{client.name}\t{client.sha256}{' disabled' if client.disabled else ''} # {digest(data)}"
        for client in clients
    ]
    assert read_keys(as_file("\n".join(["# again", "", *lines]).encode())) == clients


def seeds() -> list[bytes]:
    other = DIGEST[::-1]
    return [
        b"# keys\n\nanna " + DIGEST + b"\nbert " + other + b" disabled # gone\n",
        b"anna\t" + DIGEST + b"\r\nbert " + DIGEST,
        b"anna sk_live_0123456789abcdefghijkl",
        b"\xff\xfe",
    ]


TARGET = Target(
    check=check, seeds=seeds, tokens=(DIGEST, b" disabled", b"#", b"\n", b"\x0b", b"\xc2\x85", b";")
)

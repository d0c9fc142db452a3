"""The frontend's messages, read in large pieces: byte for byte what TorchServe's reader gives."""

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ts.protocol import otf_message_handler

from handler.receiving import AHEAD_BYTES, Reader, read_ahead
from tests.unit.handler.worker import JPEG

Read = Callable[[socket.socket, int], bytearray]
LENGTHS = [0, 1, 4, 36, AHEAD_BYTES - 1, AHEAD_BYTES, AHEAD_BYTES + 1, 3 * AHEAD_BYTES, 300_000]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The worker's end of a connection, and the frontend's."""
    worker, frontend = socket.socketpair()
    with worker, frontend:
        for end in (worker, frontend):
            end.settimeout(30)
        yield worker, frontend


@pytest.mark.parametrize("seed", range(20))
def test_any_fields_in_any_pieces(ends: tuple[socket.socket, socket.socket], seed: int) -> None:
    worker, frontend = ends
    rng = random.Random(seed)
    fields = [rng.randbytes(rng.choice(LENGTHS)) for _ in range(60)]

    def send() -> None:
        data = memoryview(b"".join(fields))
        while data:
            piece = rng.choice([1, 3, 100, AHEAD_BYTES, 50_000, len(data)])
            frontend.sendall(data[:piece])
            data = data[piece:]

    sender = threading.Thread(target=send)
    sender.start()
    reader = Reader()
    given = [reader.read(worker, len(field)) for field in fields]
    sender.join()
    assert given == fields
    assert {type(field) for field in given} == {bytearray}


@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_of_the_next_message_are_kept(
    ends: tuple[socket.socket, socket.socket], length: int
) -> None:
    worker, frontend = ends
    first, second = random.Random(0).randbytes(length), b"next"
    sender = threading.Thread(target=frontend.sendall, args=[first + second])
    sender.start()
    reader = Reader()
    assert reader.read(worker, length) == first
    sender.join()
    frontend.close()
    assert reader.read(worker, len(second)) == second


def test_nothing_is_waited_for_that_was_not_asked_for(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A request is read as soon as its last byte is there."""
    worker, frontend = ends
    reader = Reader()
    for length in LENGTHS:
        sender = threading.Thread(target=frontend.sendall, args=[bytes(length)])
        sender.start()
        assert len(reader.read(worker, length)) == length  # or the socket's timeout
        sender.join()


@pytest.mark.parametrize("read", [Reader().read, otf_message_handler._retrieve_buffer])
@pytest.mark.parametrize(("sent", "asked"), [(0, 1), (0, 300_000), (3, 4), (5000, 300_000)])
def test_an_end_ends_the_process_as_torchserves_own_reader_does(
    ends: tuple[socket.socket, socket.socket], read: Read, sent: int, asked: int
) -> None:
    worker, frontend = ends
    frontend.sendall(bytes(sent))
    frontend.close()
    with pytest.raises(SystemExit) as ended:
        read(worker, asked)
    assert ended.value.code == 0


def field(data: bytes) -> bytes:
    return struct.pack("!i", len(data)) + data


def predict_message(*bodies: bytes) -> bytes:
    """What TorchServe 0.12's frontend sends for a batch (see otf_message_handler)."""
    end = struct.pack("!i", -1)
    message = otf_message_handler.PREDICT_MSG
    for number, body in enumerate(bodies):
        message += field(f"id-{number}".encode())
        for name, value in {"Content-Type": "image/jpeg", "X-Top-K": "3"}.items():
            message += field(name.encode()) + field(value.encode())
        message += end
        message += field(b"body") + field(b"image/jpeg") + field(body)
        message += field(b"top_k") + field(b"") + field(b"5") + end
    return message + end


def test_torchserve_reads_its_messages_through_it(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, frontend = ends
    message = predict_message(JPEG, b"", random.Random(0).randbytes(300_000))

    def retrieve(times: int) -> list[Any]:
        sender = threading.Thread(target=frontend.sendall, args=[message * times])
        sender.start()
        given = [otf_message_handler.retrieve_msg(worker) for _ in range(times)]
        sender.join()
        return given

    [expected] = retrieve(1)
    assert expected[1][0]["parameters"][0]["value"] == JPEG
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", None)  # put back in the end
    read_ahead()
    assert retrieve(3) == [expected] * 3

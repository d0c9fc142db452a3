"""What TorchServe's frontend sends to a worker, read in a few large pieces.

TorchServe's own reader asks the socket for each field by itself: thirty times for a request with
five headers, a tenth to a quarter of a millisecond.
"""

import logging
import sys
from socket import socket

from ts.protocol import otf_message_handler

AHEAD_BYTES = 2048  # the fields before a body are a few hundred


class Reader:
    """Takes the place of the function that reads so many bytes from the frontend's connection."""

    def __init__(self) -> None:
        self._ahead = memoryview(b"")  # received, and not asked for yet

    def read(self, connection: socket, length: int) -> bytearray:
        """The next bytes. Ends the process when the frontend has closed, as TorchServe's does."""
        ahead = self._ahead
        if len(ahead) >= length:
            self._ahead = ahead[length:]
            return bytearray(ahead[:length])
        data = bytearray(length)
        room = memoryview(data)
        while room:
            taken = min(len(ahead), len(room))
            room[:taken] = ahead[:taken]
            ahead, room = ahead[taken:], room[taken:]
            if len(room) >= AHEAD_BYTES:
                taken = connection.recv_into(room)
                room = room[taken:]
            elif room:
                ahead = memoryview(connection.recv(AHEAD_BYTES))
                taken = len(ahead)
            if not taken:
                logging.info("Frontend disconnected.")
                sys.exit(0)
        self._ahead = ahead
        return data


def read_ahead() -> None:
    """Read from now on so. Called between two messages."""
    otf_message_handler._retrieve_buffer = Reader().read

"""Protobuf messages before they are parsed.

The encoding: protobuf.dev/programming-guides/encoding. Parsing multiplies what little a field takes
on the wire: 16 MiB of empty inputs, two bytes each, become 670 MB of messages.
"""

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types; groups are not of proto3
MAX_FIELDS = 4096  # of a message, and of each input in it
MAX_SMALL_BYTES = 65536  # of a field that holds no tensor
INPUTS, RAW_CONTENTS = 5, 7  # fields of ModelInferRequest
CONTENTS = 5  # of InferInputTensor


def has_many_fields(message: bytes) -> bool:
    """Whether a ModelInferRequest would take far more memory parsed than it has bytes.

    A message that cannot be read has few fields: the parser says what is wrong with it.
    """
    inputs: list[tuple[int, int]] = []
    if _exceeds(message, 0, len(message), {INPUTS, RAW_CONTENTS}, inputs):
        return True
    return any(_exceeds(message, start, end, {CONTENTS}) for start, end in inputs)


def _exceeds(
    data: bytes, at: int, end: int, large: set[int], inputs: list[tuple[int, int]] | None = None
) -> bool:
    """Whether the fields of a message are too many, or one that is not among `large` too long.

    `inputs` gets where the fields of that number begin and end.
    """
    for _ in range(MAX_FIELDS):
        if at >= end:
            return False
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, at = _varint(data, at)
            continue
        if kind == LENGTH:
            size, at = _varint(data, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}.get(kind, end)
        if size > end - at:
            return False
        if size > MAX_SMALL_BYTES and number not in large:
            return True
        if number == INPUTS and inputs is not None:
            inputs.append((at, at + size))
        at += size
    return at < end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next byte is; past the end if it is cut off or too long."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return value, len(data)

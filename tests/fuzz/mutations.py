"""HTTP/1.1 requests as nobody should write them, each with a marked second one inside its body.

What is sent on one connection is called outer-N, with inner-N inside it, and tail-N behind it.
"""

import random
from dataclasses import dataclass
from typing import Literal

Ends = Literal["inside", "behind", "refused", "unknown"]
CRLF = b"\r\n"
INVALID_LENGTHS = (
    b"-1",
    b"+5",
    b"0x10",
    b"5, 5",
    b"5 5",
    b"",
    b"1e2",
    b"99999999999999999999",
    b"5\x0b",
    b"\xef\xbc\x95",
    b"5;6",
)
INVALID_CODINGS = (
    b"xchunked",
    b"chunked, identity",
    b"identity, chunked",
    b"gzip, chunked",
    b"chunked, chunked",
    b"chunked\x0b",
    b"\x0bchunked",
    b"chunked;q=1",
    b"",
    b"identity",
    b'"chunked"',
    b"chunked\x00",
    b"chu\rnked",
    b"chunked,",
)
CONTROLS = bytes(each for each in (*range(1, 32), 127, 128, 133, 160, 255) if each not in b"\r\n")
PASSED_ON = (
    b"Content-Type",
    b"traceparent",
    b"tracestate",
    b"X-Top-K",
    b"X-Request-Timeout",
    b"X-Protocol",
    b"Inference-Header-Content-Length",
)  # to TorchServe
BROKEN_NAMES = (
    b"X Y",
    b"X\0",
    b"X\x01",
    b"",
    b"Content-Length ",
    b"Transfer-Encoding\t",
    b" X",
    b"X\r",
)
IGNORED_NAMES = (
    b"Content_Length",
    b"Transfer_Encoding",
    b"X-Content-Length",
    b"Content-Length_",
    b"Te",
)
METHODS = (
    b"GET",
    b"HEAD",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"DELETE",
    b"post",
    b"GPOST",
    b"P\0ST",
    b"",
)
TARGETS = (
    b"*",
    b"predict",
    b"/predict#a",
    b"/predict%0d%0aX:%20y",
    b"//predict",
    b"/a/../predict",
    b"/predictions/a%2f..%2fb",
    b"/predictions/a%20HTTP/1.1%0d%0aX:%20y",
    b"/predictions/a%0a",
    b"/v1/models/m:predict%0d%0aX:y",
    b"/v2/models/a/versions/b%20c/infer",
    b"//v2/models/m/infer",
    b"/predict?top_k=1%0d%0aX:y",
    b"/predict?model=a%20b",
    b"http://",
    b"/predictions/m\tx",
    b"/predict HTTP/1.1 x",
    b"/\xff",
    b"/predict?" + b"a" * 5000,
)
VERSIONS = (
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.2",
    b"http/1.1",
    b"HTTP/1.1 ",
    b"HTTP/11",
    b"",
)


@dataclass(frozen=True)
class Mutated:
    """What is sent on one connection, and where by the standard the second request lies."""

    number: int
    kind: str
    data: bytes
    inner: Ends
    body: bytes | None = None  # of the first request, where it is well formed


def mutate(number: int, rng: random.Random) -> Mutated:
    """One of the kinds below; every third has random damage besides."""
    made = rng.choice(KINDS)(number, rng)
    if rng.random() < 1 / 3:
        return Mutated(number, f"{made.kind}, damaged", damaged(made.data, rng), "unknown")
    return made


def inner(number: int, rng: random.Random) -> bytes:
    """The request that must not be answered if it is inside a body."""
    eol = rng.choice((CRLF, CRLF, b"\n"))
    lines = [b"POST /predict HTTP/1.1", b"Host: x", b"X-Request-ID: inner-%06d" % number]
    return eol.join([*lines, b"Content-Length: 5", b"", b""]) + b"inner"


def tail(number: int) -> bytes:
    lines = [b"POST /predict HTTP/1.1", b"Host: x", b"X-Request-ID: tail-%06d" % number]
    return CRLF.join([*lines, b"Connection: close", b"Content-Length: 4", b"", b""]) + b"tail"


def head(number: int, *headers: bytes, first: bytes = b"POST /predict HTTP/1.1") -> bytes:
    return CRLF.join([first, b"Host: x", b"X-Request-ID: outer-%06d" % number, *headers, b"", b""])


def body_with_inner(number: int, rng: random.Random) -> bytes:
    junk = rng.choice((b"", b"0\r\n\r\n", b"x" * rng.randrange(60), b"\r\n"))
    return junk + inner(number, rng) + rng.choice((b"", b"\r\n", b"0\r\n\r\n"))


def length_of(body: bytes) -> bytes:
    return b"Content-Length: %d" % len(body)


def chunked(body: bytes, rng: random.Random) -> bytes:
    """A well-formed one: with extensions, leading zeros, upper case and trailers."""
    sent, at = b"", 0
    while at < len(body):
        size = rng.randint(1, 64)
        piece = body[at : at + size]
        digits = rng.choice((b"%x", b"%X", b"00%x")) % len(piece)
        extension = rng.choice((b"", b"", b";a=b", b';a="b"', b";" + b"a" * 100))
        sent += digits + extension + CRLF + piece + CRLF
        at += size
    trailer = rng.choice((b"", b"", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"))
    return sent + b"0" + CRLF + trailer + CRLF


def plain(number: int, rng: random.Random) -> Mutated:
    """Well formed, in its less usual forms."""
    body = body_with_inner(number, rng)
    first = rng.choice(
        (
            b"POST /predict HTTP/1.1",
            b"PUT /predict HTTP/1.1",
            b"POST http://x/predict HTTP/1.1",
            b"POST http://elsewhere:1/predict?top_k=1 HTTP/1.1",
            b"POST /predict?X-Request-ID=inner HTTP/1.1",
        )
    )
    more = rng.choice(
        (
            b"X: y",
            b"Expect: 100-continue",
            b"X:y\t",
            b"X: " + b"a" * 2000,
            b"\r\n".join([b"X: y"] * 40),
        )
    )
    if rng.random() < 0.5:
        data = head(number, length_of(body), more, first=first) + body
    else:
        data = head(number, more, b"transfer-encoding:  ChunKed ", first=first) + chunked(body, rng)
    return Mutated(number, "plain", data + tail(number), "inside", body)


def ignored_names(number: int, rng: random.Random) -> Mutated:
    """Headers that only look as if they said where the body ends."""
    body = body_with_inner(number, rng)
    value = rng.choice((b"0", b"chunked", b"5"))
    lines = [rng.choice(IGNORED_NAMES) + b": " + value, length_of(body)]
    rng.shuffle(lines)
    return Mutated(
        number, "ignored names", head(number, *lines) + body + tail(number), "inside", body
    )


def values(number: int, rng: random.Random) -> Mutated:
    """Odd bytes in headers that TorchServe gets."""
    body = body_with_inner(number, rng)
    odd = bytes(rng.choice(CONTROLS) for _ in range(rng.randint(1, 6)))
    value = rng.choice((odd, b"a" + odd, odd + b"X: y", b"image/jpeg" + odd + b"Content-Length: 0"))
    line = rng.choice(PASSED_ON) + b": " + value
    return Mutated(
        number, "values", head(number, line, length_of(body)) + body + tail(number), "inside", body
    )


def behind(number: int, rng: random.Random) -> Mutated:
    """Pipelined: the second request is one of its own."""
    start, body = rng.choice(
        (
            (head(number), b""),
            (head(number, b"Content-Length: 0"), b""),
            (head(number, b"Transfer-Encoding: chunked") + b"0\r\n\r\n", b""),
            (head(number, b"Content-Length: 7") + b"outer-1", b"outer-1"),
            (head(number, b"Transfer-Encoding: chunked") + chunked(b"outer-1", rng), b"outer-1"),
        )
    )
    return Mutated(number, "behind", start + inner(number, rng) + tail(number), "behind", body)


def conflicting(number: int, rng: random.Random) -> Mutated:
    """More than one word on where the body ends, or none that can be understood."""
    body = body_with_inner(number, rng)
    good, te = length_of(body), b"Transfer-Encoding: chunked"
    bad_length = b"Content-Length: " + rng.choice(INVALID_LENGTHS)
    bad_coding = b"Transfer-Encoding: " + rng.choice(INVALID_CODINGS)
    lines = rng.choice(
        (
            [good, te],
            [good, b"Content-Length: 0"],
            [good, good],
            [te, te],
            [bad_length],
            [good, bad_length],
            [bad_coding],
            [good, bad_coding],
            [te, bad_coding],
            [b"Transfer-Encoding:" + rng.choice((b"\r\n chunked", b"\n\tchunked")), good],
            [b"Content-Length:\r\n 5", te],
        )
    )
    rng.shuffle(lines)
    first = b"POST /predict HTTP/1.1"
    if rng.random() < 0.1:
        first, lines = b"POST /predict HTTP/1.0", [te]
    data = head(number, *lines, first=first) + rng.choice((body, chunked(body, rng)))
    return Mutated(number, "conflicting", data + tail(number), "refused")


def broken_names(number: int, rng: random.Random) -> Mutated:
    """Header names with spaces and controls, folded lines, bare CRs."""
    body = body_with_inner(number, rng)
    line = rng.choice(
        (
            rng.choice(BROKEN_NAMES) + b": 0",
            b"X: a\r\n folded: b",
            b"X: a\r\n\tContent-Length: 0",
            b"X: a\rContent-Length: 0",
            b"X: a\r\rContent-Length: 0",
            b"X: a\0b",
            b"\rX: a",
        )
    )
    data = head(number, line, length_of(body)) + body + tail(number)
    return Mutated(number, "broken names", data, "refused")


def chunks(number: int, rng: random.Random) -> Mutated:
    """Chunks whose sizes are wrong, or not numbers."""
    body = body_with_inner(number, rng)
    size = rng.choice(
        (
            b"g",
            b"-1",
            b"0x5",
            b"%x" % (len(body) - 1),
            b"f" * 17,
            b"8000000000000000",
            b"+5",
            b" 5",
            b"",
            b"\0",
        )
    )
    data = head(number, b"Transfer-Encoding: chunked") + size + CRLF + body + CRLF + b"0\r\n\r\n"
    return Mutated(number, "chunks", data + tail(number), "refused")


def loose_chunks(number: int, rng: random.Random) -> Mutated:
    """Chunks that servers disagree about."""
    body = body_with_inner(number, rng)
    good = b"%x" % len(body)
    line = (
        rng.choice(
            (
                b"%b\n",
                b"%b;\n",
                b"%b;a\n\r\n",
                b"%b \r\n",
                b"%b\t\r\n",
                b'%b;a="\r\n"\r\n',
                b"%b\r\r\n",
                b"%b;\r\r\n",
                b"%b\r",
            )
        )
        % good
    )
    end = rng.choice(
        (b"\r\n0\r\n\r\n", b"\n0\n\n", b"0\r\n\r\n", b"\r\n0\r\n", b"\r\n0;a\n\r\n", b"\r0\r\r")
    )
    data = head(number, b"Transfer-Encoding: chunked") + line + body + end
    return Mutated(number, "loose chunks", data + tail(number), "unknown")


def first_lines(number: int, rng: random.Random) -> Mutated:
    """Methods, targets and versions that are odd or wrong."""
    body = body_with_inner(number, rng)
    words = [b"POST", b"/predict", b"HTTP/1.1"]
    place = rng.randrange(3)
    words[place] = rng.choice((METHODS, TARGETS, VERSIONS)[place])
    line = rng.choice((b" ", b" ", b" ", b"\t", b"  ", b"\x0b")).join(words)
    data = rng.choice((b"", b"", b"\r\n", b"\n\n", b"\0")) + head(
        number, length_of(body), first=line
    )
    return Mutated(number, "first lines", data + body + tail(number), "unknown")


def large(number: int, rng: random.Random) -> Mutated:
    """More than the gateway takes, in one header or in many."""
    body = body_with_inner(number, rng)
    line = rng.choice(
        (b"X: " + b"a" * 9000, CRLF.join([b"X: %b" % (b"a" * 30)] * 1000), b"a" * 9000 + b": x")
    )
    data = head(number, line, length_of(body)) + body + tail(number)
    return Mutated(number, "large", data, "refused")


def line_ends(number: int, rng: random.Random) -> Mutated:
    """LF without CR, which a server may take."""
    body = body_with_inner(number, rng)
    ends = head(number, b"X: y", length_of(body)).split(CRLF)
    start = b"".join(line + rng.choice((CRLF, b"\n")) for line in ends[:-1])
    return Mutated(number, "line ends", start + body + tail(number), "inside", body)


KINDS = (
    plain,
    ignored_names,
    values,
    behind,
    conflicting,
    conflicting,
    conflicting,
    broken_names,
    chunks,
    loose_chunks,
    first_lines,
    first_lines,
    large,
    line_ends,
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in, taken out or repeated, mostly before the first body."""
    changed = bytearray(data)
    bits = (
        b"\r",
        b"\n",
        b"\r\n",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\x0b",
        b"0",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"\x85",
        b"HTTP/1.1",
    )
    for _ in range(rng.randint(1, 3)):
        most = len(changed) if rng.random() < 0.3 else min(len(changed), 200)
        at = rng.randint(0, most)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind in (1, 2):
            changed[at:at] = rng.choice(bits)
        elif kind == 3:
            del changed[at : at + rng.randint(1, 6)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
    return bytes(changed)

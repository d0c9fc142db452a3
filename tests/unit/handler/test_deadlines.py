"""What nobody waits for any more is neither decoded nor classified."""

import time
from pathlib import Path

import pytest

import handler.batch
import handler.image_classifier
from handler.decoders import CpuDecoder, Decoding
from handler.image_classifier import ImageClassifier
from handler.images import Encoded
from tests.drawing import BLUE, RED, encode, plain
from tests.unit.handler.worker import Fake, ask, start

JPEG, OTHER = encode(plain(RED), "JPEG"), encode(plain(BLUE), "JPEG")
LATE = {"X-Request-Timeout": "1", "X-Request-Start": "t=%.3f" % (time.time() - 60)}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(handler.image_classifier, "load_engine", lambda *_, **__: fake)
    return fake


@pytest.fixture
def classifier(engine: Fake, model_dir: Path) -> ImageClassifier:
    found = start(model_dir)
    engine.batches.clear()  # of the warm-up
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that somebody began to decode."""
    seen = []
    begin = CpuDecoder.start

    def spy(self: CpuDecoder, encoded: Encoded) -> Decoding:
        seen.append(encoded.data)
        return begin(self, encoded)

    monkeypatch.setattr(CpuDecoder, "start", spy)
    return seen


@pytest.fixture
def slow(decoded: list[bytes], monkeypatch: pytest.MonkeyPatch) -> float:
    """The time now; the clock jumps by 10 s whenever somebody begins to decode an image."""
    now = time.time()
    monkeypatch.setattr(handler.batch, "time", lambda: now + 10 * len(decoded))
    return now


def test_a_request_that_was_too_long_in_the_queue_is_not_decoded(
    classifier: ImageClassifier, engine: Fake, decoded: list[bytes]
) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers=LATE)
    assert reply.status == 504
    assert reply.body == {
        "status": "error",
        "code": 504,
        "type": "DeadlineExceeded",
        "message": "the time that the request had is over",
    }
    assert (decoded, engine.batches) == ([], [])


def test_a_request_in_time_is_answered(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={"X-Request-Timeout": "30"})
    assert reply.status == 200


def test_nonsense_is_refused(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={"X-Request-Timeout": "soon"})
    assert (reply.status, reply.body["type"]) == (400, "MalformedRequest")


def test_an_image_that_was_decoded_too_late_is_not_classified(
    classifier: ImageClassifier,
    engine: Fake,
    decoded: list[bytes],
    slow: float,
) -> None:
    """Of two images the first takes all the time."""
    headers = {"X-Request-Timeout": "5", "X-Request-Start": f"t={slow:.3f}"}
    [reply] = ask(classifier, {"file1": JPEG, "file2": OTHER}, headers=headers)
    assert (reply.status, reply.body["status"]) == (504, "error")
    assert [one["type"] for one in reply.body["results"]] == ["DeadlineExceeded"] * 2
    assert decoded == [JPEG]
    assert engine.batches == []


def test_an_image_that_somebody_else_waits_for_is_classified(
    classifier: ImageClassifier, slow: float
) -> None:
    impatient = {"X-Request-Timeout": "5", "X-Request-Start": f"t={slow:.3f}"}
    replies = ask(classifier, {"body": JPEG}, {"body": JPEG}, headers=[impatient, {}])
    assert [reply.status for reply in replies] == [200, 200]

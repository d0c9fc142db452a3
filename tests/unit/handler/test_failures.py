"""A model or a GPU that fails, and bugs of ours."""

import os
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import handler.batch
import handler.decoders
import handler.failures
from handler.collector import Metrics
from handler.image_classifier import ImageClassifier
from tests.drawing import GREEN, RED, encode, plain
from tests.unit.handler.worker import (
    JPEG,
    PNG,
    Fake,
    ask,
    b64,
    broken,
    log,
    not_a_number,
    one_too_few,
)

pytestmark = pytest.mark.usefixtures("isolation")


def test_an_image_without_finite_probabilities_fails_alone(classifier: ImageClassifier) -> None:
    def second_is_not_finite(images: Tensor) -> Tensor:
        probabilities = torch.full((len(images), 3), 1 / 3)
        probabilities[1, 2] = float("inf")
        return probabilities

    classifier.engine = Fake(second_is_not_finite)
    replies = ask(classifier, {"body": JPEG}, {"body": PNG}, {"body": encode(plain(GREEN))})
    assert [reply.status for reply in replies] == [200, 500, 200]


@pytest.mark.parametrize("fail", [broken, not_a_number, one_too_few])
def test_a_failing_model_is_a_500_for_the_rows_it_concerns(
    classifier: ImageClassifier, fail: Callable[[Tensor], Tensor]
) -> None:
    classifier.engine = Fake(fail)
    rows: list[dict[str, Any]] = [
        {"body": JPEG},
        {"body": b"bad"},
        {"body": {"images": [b64(JPEG), "%"]}},
    ]
    good, bad, several = ask(classifier, *rows)
    assert (good.status, good.error) == (500, "ModelFailed")
    assert (bad.status, bad.error) == (400, "UnreadableImage")
    assert (several.status, several.body["status"]) == (500, "error")
    assert {reply.content_type for reply in (good, bad, several)} == {"application/json"}


@pytest.mark.parametrize(
    ("fail", "cause"),
    [(broken, "RuntimeError: cuDNN says no at 0x7f00"), (not_a_number, "no finite probabilities")],
)
def test_the_cause_is_in_the_log_under_the_request_id(
    classifier: ImageClassifier,
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[Tensor], Tensor],
    cause: str,
) -> None:
    classifier.engine = Fake(fail)
    replies = ask(classifier, {"body": JPEG}, {"body": PNG})
    failures = log(caplog, "failure")
    assert {one for line in failures for one in line["requests"]} == {"id-0", "id-1"}
    assert all(line["level"] == "ERROR" and line["model"] == "birds" for line in failures)
    assert all(cause in line["cause"] for line in failures)
    for reply in replies:
        assert not any(word in reply.body["message"] for word in ("0x", "/", "cuDNN", "Traceback"))


def out_of_memory(_: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def illegal_access(_: Tensor) -> Tensor:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Lost(Fake):
    """On a GPU whose context is gone after the first error."""

    def is_lost(self) -> bool:
        return True


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses with which the process would have ended, without waiting."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(handler.failures, "ANSWER_SECONDS", 0.0)
    return statuses


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_out_of_memory_is_a_507_for_the_images_of_that_pass(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture, ended: list[int]
) -> None:
    def second(images: Tensor) -> Tensor:
        if len(engine.batches) == 2:
            out_of_memory(images)
        return torch.full((len(images), 3), 1 / 3)

    engine = classifier.engine = Fake(second)
    rows = [{"body": encode(plain(RED, (9, side)))} for side in range(1, 10)]
    replies = ask(classifier, *rows, {"body": b"bad"})
    assert [reply.status for reply in replies] == [200] * 4 + [507] * 4 + [200, 400]
    assert {reply.error for reply in replies[4:8]} == {"OutOfResources"}
    assert "20.00 MiB" not in replies[4].body["message"]
    [line] = log(caplog, "failure")
    assert "Tried to allocate 20.00 MiB" in line["cause"]
    assert line["requests"] == ["id-4", "id-5", "id-6", "id-7"]
    assert not classifier.failures.gpu_lost
    assert ended == []


def test_a_cuda_error_that_passes_is_a_500(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture, ended: list[int]
) -> None:
    classifier.engine = Fake(illegal_access)
    assert ask(classifier, {"body": JPEG})[0].status == 500
    assert log(caplog, "gpu_lost") == []
    assert not classifier.failures.gpu_lost


def test_a_lost_gpu_ends_the_worker_when_its_answers_are_out(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture, ended: list[int]
) -> None:
    classifier.engine = Lost(illegal_access)
    rows = [{"body": encode(plain(RED, (9, side)))} for side in range(1, 7)]  # two passes
    replies = ask(classifier, *rows, {"body": b"bad"})
    assert [reply.status for reply in replies] == [507] * 6 + [400]
    assert {reply.error for reply in replies[:6]} == {"OutOfResources"}
    [line] = log(caplog, "gpu_lost")
    assert (line["level"], line["model"]) == ("ERROR", "birds")
    assert "an illegal memory access was encountered" in line["cause"]
    wait_for(lambda: ended)
    assert ended == [1]


def test_until_a_worker_with_a_lost_gpu_has_ended_it_answers_at_once(
    classifier: ImageClassifier, monkeypatch: pytest.MonkeyPatch, ended: list[int]
) -> None:
    monkeypatch.setattr(handler.failures, "ANSWER_SECONDS", 3600.0)
    engine = classifier.engine = Lost(illegal_access)
    ask(classifier, {"body": JPEG})
    replies = ask(classifier, {"body": PNG}, {"body": b"bad"})
    assert [(reply.status, reply.error) for reply in replies] == [(507, "OutOfResources")] * 2
    assert engine.batches == [1]
    assert ended == []


def test_what_was_counted_is_handed_over_before_the_end(
    classifier: ImageClassifier, monkeypatch: pytest.MonkeyPatch, ended: list[int]
) -> None:
    emitted: dict[tuple[str, ...], float] = {}

    def emit(name: str, increment: float, labels: Sequence[str]) -> None:
        emitted[(name, *labels)] = increment

    classifier.metrics = classifier.accounts.counts = Metrics(emit, "birds", "1.0")
    classifier.engine = Lost(illegal_access)
    monkeypatch.setattr(handler.failures, "ANSWER_SECONDS", 0.2)
    ask(classifier, {"body": JPEG}, settle=False)
    wait_for(lambda: ended)
    assert emitted["classifier_requests_total", "birds", "1.0", "507"] == 1


@pytest.mark.parametrize(
    ("module", "function"),
    [(handler.batch, "open_image"), (handler.decoders, "decode_picture")],
)
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ZeroDivisionError, (500, "ModelFailed")),
        (MemoryError, (507, "OutOfResources")),  # the gateway asks another worker
    ],
)
def test_a_bug_of_ours_or_no_memory_is_one_clients_failure(
    classifier: ImageClassifier,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    function: str,
    error: type[Exception],
    expected: tuple[int, str],
) -> None:
    original = getattr(module, function)

    def fragile(image: Any, *args: Any) -> Any:
        data = image if isinstance(image, bytes) else image.data
        if data != JPEG:
            raise error
        return original(image, *args)

    monkeypatch.setattr(module, function, fragile)
    bad, good = ask(classifier, {"body": PNG}, {"body": JPEG})
    assert (bad.status, bad.error) == expected
    assert good.status == 200
    [line] = log(caplog, "failure")
    assert line["requests"] == ["id-0"]
    assert error.__name__ in line["cause"]

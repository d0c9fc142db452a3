"""What is asked again, what is not, and when a run ends early."""

import threading
from typing import Any

import pytest

from service.bulk.pace import Pace
from service.bulk.run import TRIES, Lost, classify
from service.bulk.sources import Image
from service.client import Client
from tests.unit.service.bulk.serving import Says, failure, serving, success

IMAGES = [Image(f"{number}.jpg", b"%d" % number) for number in range(20)]


def run(url: str, images: list[Image] = IMAGES, patience: float = 30) -> list[dict[str, Any]]:
    """What was answered for each image, in the order of the images; each exactly once."""
    client = Client(f"{url}/predictions/m", connections=8)
    pairs = list(
        classify(images, client.ask, Pace(8, patience), threading.Event(), lambda text: None)
    )
    answers = {image.name: answer for image, answer in pairs}
    assert len(pairs) == len(answers) == len(images)
    return [answers[image.name] for image in images]


def kinds(answers: list[dict[str, Any]]) -> set[str]:
    return {answer.get("type", answer["status"]) for answer in answers}


@pytest.mark.parametrize(
    "said",
    [
        failure(429, "TooManyRequests"),
        failure(503, "Unavailable"),
        failure(500, "InternalError"),
        failure(504, "Timeout"),
        failure(507, "OutOfResources"),
        (502, b"<html>Bad Gateway</html>", {}),
        None,
    ],
    ids=["429", "503", "500", "504", "507", "no JSON", "a broken connection"],
)
def test_what_may_be_better_next_time_is_asked_again(said: Says | None) -> None:
    with serving(lambda image, time: said if image == b"3" and time < 3 else success()) as service:
        assert kinds(run(service.url)) == {"success"}
    assert {image: len(times) for image, times in service.asked.items()} == {
        image.body: 3 if image.body == b"3" else 1 for image in IMAGES
    }


@pytest.mark.parametrize("code", [400, 413, 415, 422])
def test_what_is_said_of_the_image_is_final(code: int) -> None:
    with serving(lambda image, time: failure(code, "Bad")) as service:
        assert kinds(run(service.url)) == {"Bad"}
    assert all(len(times) == 1 for times in service.asked.values())


def test_an_image_that_breaks_the_server_is_given_up() -> None:
    def says(image: bytes, time: int) -> Says | None:
        return failure(500, "InternalError") if image == b"3" else success()

    with serving(says) as service:
        answers = run(service.url)
    assert [answer["status"] for answer in answers].count("success") == len(IMAGES) - 1
    assert answers[3]["type"] == "InternalError"
    assert len(service.asked[b"3"]) == TRIES


def test_more_refusals_than_tries_are_waited_out() -> None:
    busy = failure(503, "Unavailable", Retry_After="0")
    with serving(lambda image, time: busy if time <= 2 * TRIES else success()) as service:
        assert kinds(run(service.url, IMAGES[:1])) == {"success"}


def test_retry_after_holds_for_all_images() -> None:
    limited = failure(429, "TooManyRequests", Retry_After="1")
    with serving(lambda image, time: limited if image == b"3" and time == 1 else success()) as it:
        run(it.url)
    refused = it.asked[b"3"][0]
    after = [time for times in it.asked.values() for time in times if time > refused + 0.2]
    assert len(after) >= len(IMAGES) - 8
    assert min(after) >= refused + 0.95


@pytest.mark.parametrize(
    "said",
    [
        failure(401, "Unauthorized"),
        failure(403, "Forbidden"),
        failure(404, "ModelNotFoundException"),
        failure(400, "InvalidTopK"),
        (308, b"", {"Location": "http://127.0.0.1:9/"}),
    ],
    ids=["401", "403", "404", "top_k", "a redirect"],
)
def test_what_all_images_would_be_answered_ends_the_run(said: Says) -> None:
    with serving(lambda image, time: said) as service, pytest.raises(Lost, match=f"{said[0]}, "):
        run(service.url)
    assert len(service.asked) == 1, "it begins with one request"


def test_a_server_that_is_gone_ends_the_run_after_patience(closed_port: int) -> None:
    with pytest.raises(Lost, match="does not answer"):
        run(f"http://127.0.0.1:{closed_port}", patience=0.5)


def test_a_server_that_asks_to_wait_longer_than_patience_ends_the_run() -> None:
    busy = failure(503, "Unavailable", Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")
    with serving(lambda image, time: busy) as service, pytest.raises(Lost, match="longer wait"):
        run(service.url)


def test_a_stopped_run_sends_no_more() -> None:
    stop = threading.Event()

    def says(image: bytes, time: int) -> Says:
        if image == b"3":
            stop.set()
        return success()

    with serving(says) as service:
        client = Client(f"{service.url}/predictions/m")
        done = list(classify(IMAGES, client.ask, Pace(2, 30), stop, lambda text: None))
    assert {image.body for image, _ in done} == service.asked.keys()
    assert 4 <= len(done) <= 5

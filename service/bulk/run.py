"""Many images through one server: as many at once as it takes, what failed for a while again."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from service.bulk.pace import Pace
from service.bulk.results import is_final
from service.bulk.sources import Image
from service.client import Reply, error

TRIES = 5  # of an image with which the server fails, or breaks the connection
BUSY = (429, 503)  # the server's state, whatever the image
# A key, the model or top_k is wrong, or a redirect: the next image would get the same answer.
HOPELESS = (*range(300, 401), 401, 403, 404, 405)
LOOK_SECONDS = 0.2  # how often it is looked whether the run shall end


class Lost(Exception):
    """The run cannot go on; the message says why."""


@dataclass
class Task:
    image: Image
    sent: float = 0.0
    tries: int = 0


def classify(
    images: Iterable[Image],
    ask: Callable[[str, bytes], Reply],
    pace: Pace,
    stop: threading.Event,
    notice: Callable[[str], object],
) -> Iterator[tuple[Image, dict[str, Any]]]:
    """Each image with its last answer, in the order of the answers.

    A prediction changes nothing in the server, so any may be asked for again. After `stop` is set
    no more are sent, and those under way are waited for. `notice` gets what to tell the user.
    Raises Lost if the server is gone, or refuses all.
    """
    coming = map(Task, images)
    again: list[Task] = []
    flying: dict[Future[Reply], Task] = {}
    with ThreadPoolExecutor(pace.most) as pool:
        while True:
            while (
                len(flying) < pace.allowed
                and not pace.pause(time.monotonic())
                and not stop.is_set()
            ):
                task = again.pop() if again else next(coming, None)
                if task is None:
                    break
                if task.image.problem:
                    yield task.image, error(0, *task.image.problem)
                    continue
                task.sent = time.monotonic()
                task.tries += 1
                flying[pool.submit(ask, task.image.name, task.image.body)] = task
            if flying:
                done, _ = wait(flying, LOOK_SECONDS, FIRST_COMPLETED)
            elif (pause := pace.pause(time.monotonic())) and not stop.is_set():
                done = set()
                time.sleep(min(pause, LOOK_SECONDS))
            else:
                return
            for future in done:
                task, reply = flying.pop(future), future.result()
                if _is_answered(task, reply, pace, notice):
                    yield task.image, reply.answer
                else:
                    again.append(task)


def _is_answered(task: Task, reply: Reply, pace: Pace, notice: Callable[[str], object]) -> bool:
    """Whether that was the image's last answer. Raises Lost."""
    if is_final(reply.answer):
        pace.answered()
        return True
    said = f"{reply.answer.get('type')}: {reply.answer.get('message')}"
    if reply.status in HOPELESS:
        raise Lost(f"the server answers {reply.status}, {said}")
    now = time.monotonic()
    if pace.refused(task.sent, now, reply.retry_after) and not reply.reached:
        notice(f"{said}\nTrying again for {pace.patience:g} s")
    if pace.is_lost(now):
        raise Lost(f"no answer for {pace.patience:g} s, or a longer wait is asked for; last {said}")
    if reply.status in BUSY or not reply.reached:
        task.tries -= 1
    return task.tries >= TRIES

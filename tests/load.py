"""Clients that send one request after another, and what each of them saw."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import requests

from tests.processes import wait_for


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it."""

    status: int  # 0 without an answer
    request_id: str
    text: str
    seconds: float
    end: float  # time.time()


@dataclass
class Load:
    """Clients that ask until they are told to stop, each on a connection of its own."""

    url: str
    body: bytes  # an image; what follows its end is ignored, and makes each one new to a cache
    clients: int = 8
    pause: float = 0.0  # seconds between two requests of a client; may change while they ask
    answers: list[Answer] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self._threads = [
            threading.Thread(target=self._ask, args=(client,)) for client in range(self.clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def total(self) -> int:
        return len(self.answers)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answers)

    @property
    def failures(self) -> list[str]:
        return [answer.text for answer in self.answers if answer.status != 200]

    @property
    def answered(self) -> set[str]:
        """The ids of the requests that went well."""
        return {answer.request_id for answer in self.answers if answer.status == 200}

    def wait(self, more: int, seconds: float = 240) -> None:
        """Until so many more requests have ended, well or not."""
        expected = self.total + more
        wait_for(
            lambda: self.total >= expected, seconds, lambda: f"{self.total} of {expected} in time"
        )

    def _ask(self, client: int) -> None:
        with requests.Session() as session:
            session.trust_env = False
            for number in count():
                start = time.time()
                try:
                    answer = session.post(
                        self.url,
                        data=self.body + f"{client} {number}".encode(),
                        headers={"X-Request-Start": f"t={start:.3f}"},
                        timeout=60,
                    )
                    seen = answer.status_code, answer.headers["X-Request-ID"], answer.text[:300]
                except requests.RequestException as exc:
                    seen = 0, "", repr(exc)
                    self.ended.wait(0.05)
                end = time.time()
                self.answers.append(Answer(*seen, end - start, end))
                if self.ended.wait(self.pause):
                    return

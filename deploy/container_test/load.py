"""A stop under load: no request that was taken in goes without an answer."""

import http.client
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from container_test.commands import Failed, run
from container_test.container import EXAMPLE, NAME, PORT, STOP_SECONDS, Container

LOAD_SECONDS = 4


@dataclass
class Load:
    """Clients that ask until nobody listens any more, each second one on one connection only."""

    container: Container
    outcomes: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, keep_alive: bool) -> None:
        self.container.enter()
        body, headers = EXAMPLE.read_bytes(), {"X-API-Key": self.container.key}
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=STOP_SECONDS)
        outcome = ""
        while outcome != "refused":
            reused = connection.sock is not None
            try:
                if not reused:
                    connection.connect()
            except OSError:
                outcome = "refused"
            else:
                outcome = self.request(connection, body, headers, reused)
            if not keep_alive or outcome != "answered":
                connection.close()
            with self.lock:
                self.outcomes[outcome] += 1

    def request(
        self,
        connection: http.client.HTTPConnection,
        body: bytes,
        headers: dict[str, str],
        reused: bool,
    ) -> str:
        """What became of a request.

        A connection that both sides may close between two requests was closed before the answer
        began: HTTP clients send such a request again (RFC 9112, 9.3.1), as this one does.
        """
        try:
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            return "closed while idle" if reused else "lost"
        try:
            response.read()
        except (OSError, http.client.HTTPException):
            return "lost"
        return "answered" if response.status == 200 else f"status {response.status}"


def stop_under_load(container: Container, clients: int) -> tuple[Counter[str], float]:
    """What became of the requests, and the seconds until the container had ended."""
    load = Load(container)
    with ThreadPoolExecutor(clients) as pool:
        jobs = [pool.submit(load.client, number % 2 == 0) for number in range(clients)]
        time.sleep(LOAD_SECONDS)
        took = container.stop(remove=False)
    for job in jobs:
        job.result()  # raises what a client has raised
    lines = run("podman", "logs", NAME).splitlines()
    run("podman", "rm", NAME)
    events = [json.loads(line) for line in lines if line[:1] == "{"]
    taken = sum(event["event"] == "gateway" and event["path"] == "/predict" for event in events)
    with_answer = ("answered", "status")
    answered = sum(n for what, n in load.outcomes.items() if what.startswith(with_answer))
    # So what was closed while idle had not been taken in.
    if not taken == answered > 0:
        raise Failed(f"the gateway took in {taken} requests: {dict(load.outcomes)}")
    return load.outcomes, took

"""Scaling: decisions over sequences of samples, memory, the table, and a server of every mood."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from service.scaling import scaling as scale
from service.scaling import workers
from service.scaling.autoscaler import Autoscaler, Decision, Sample, Watcher, compare
from service.scaling.workers import (
    Counters,
    Model,
    Space,
    State,
    UnknownModel,
    Worker,
    count_fitting,
    find_spaces,
    parse_counters,
    process_memory,
)
from tests.unit.conftest import Web

JSON = "application/json"

# --- Decisions

IDLE = Sample(wanted=1, ready=1, requests=0, queue_ms=0, busy=0, pending=0, remaining=100)
SLOW = replace(IDLE, requests=50, queue_ms=80, busy=1.0, pending=3, remaining=97)
FAR = replace(SLOW, queue_ms=250)
FULL = replace(SLOW, queue_ms=20, pending=100, remaining=0)
STUCK = replace(IDLE, pending=2, remaining=98)
CALM = replace(IDLE, requests=50, queue_ms=2, busy=0.3)
LOADED = replace(CALM, queue_ms=40, busy=0.9)  # too much for fewer, too little for more


def drive(samples: list[Sample], wanted: int = 1, seconds: float = 5, **options: Any) -> list[int]:
    """The number of workers after each sample, when they start and stop at once."""
    autoscaler = Autoscaler(
        **({"minimum": 1, "maximum": 8, "queue_ms": 50, "cool_down": 20} | options)
    )
    numbers = []
    for index, sample in enumerate(samples):
        seen = replace(sample, wanted=wanted, ready=wanted)
        decision = autoscaler.decide(seen, now=index * seconds)
        if decision.workers != wanted:
            wanted = decision.workers
            autoscaler.reset()
        numbers.append(wanted)
    return numbers


@pytest.mark.parametrize(
    ("samples", "numbers"),
    [
        ([SLOW], [1]),
        ([SLOW, SLOW], [1, 2]),
        ([SLOW, LOADED, SLOW], [1, 1, 1]),  # two in a row
        ([SLOW] * 6, [1, 2, 2, 3, 3, 4]),
        ([FAR] * 6, [1, 2, 2, 4, 4, 8]),
        ([FULL] * 4, [1, 2, 2, 4]),  # those that are refused wait for nothing
        ([STUCK] * 4, [1, 2, 2, 3]),  # nothing came, and nothing was answered
        ([LOADED] * 9, [1] * 9),
    ],
)
def test_more_workers(samples: list[Sample], numbers: list[int]) -> None:
    assert drive(samples) == numbers


@pytest.mark.parametrize("sample", [SLOW, FAR, FULL])
def test_never_more_than_the_maximum(sample: Sample) -> None:
    assert max(drive([sample] * 20, maximum=3)) == 3


def test_fewer_workers_after_the_cool_down() -> None:
    """Quiet from 0 s on, then from 25 s on: each time for 20 s."""
    assert drive([CALM] * 11, wanted=3) == [3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("sample", [SLOW, LOADED, replace(CALM, pending=1)])
def test_what_is_not_quiet_starts_the_cool_down_again(sample: Sample) -> None:
    assert drive([CALM] * 4 + [sample] + [CALM] * 5, wanted=2) == [2] * 9 + [1]


@pytest.mark.parametrize(("busy", "left"), [(1.3, 2), (1.5, 3)])
def test_those_that_are_left_must_not_be_too_busy(busy: float, left: int) -> None:
    assert drive([replace(CALM, busy=busy)] * 6, wanted=3)[-1] == left


def test_never_fewer_than_the_minimum() -> None:
    assert drive([IDLE] * 50, wanted=4, minimum=2)[-1] == 2


@pytest.mark.parametrize(
    ("wanted", "workers", "reason"),
    [(1, 2, "fewer than the minimum"), (9, 4, "more than the maximum")],
)
def test_bounds_at_once(wanted: int, workers: int, reason: str) -> None:
    sample = replace(IDLE, wanted=wanted, ready=wanted)
    decision = Autoscaler(2, 4, 50, 60).decide(sample, 0)
    assert decision == Decision(workers, reason)


def test_workers_that_start_are_waited_for() -> None:
    autoscaler = Autoscaler(1, 8, 50, 20)
    starting = replace(FAR, wanted=2, ready=1)
    for now in range(10):
        assert autoscaler.decide(starting, now) == Decision(2, "workers are starting")
    there = replace(FAR, wanted=2, ready=2)
    assert [autoscaler.decide(there, now).workers for now in (10, 11)] == [2, 4]


def test_load_that_comes_and_goes_ends_where_it_began() -> None:
    numbers = drive([SLOW] * 4 + [LOADED] * 4 + [IDLE] * 30)
    assert (numbers[0], max(numbers), numbers[-1]) == (1, 3, 1)
    changes = [abs(after - before) for before, after in pairwise(numbers)]
    assert sum(changes) == 4, "no going back and forth"


STATE = State("1.0", 2, [Worker("9000", 1, "cpu", "READY", None)], pending=4, remaining=96)


def test_an_interval() -> None:
    before, after = Counters(10, 1e6, 3e6), Counters(60, 2e6, 9e6)
    assert compare(STATE, before, after, seconds=5) == Sample(
        wanted=2, ready=1, requests=50, queue_ms=20, busy=1.0, pending=4, remaining=96
    )


def test_an_interval_without_requests() -> None:
    same = Counters(10, 1e6, 3e6)
    sample = compare(STATE, same, same, seconds=5)
    assert sample is not None
    assert (sample.requests, sample.queue_ms, sample.busy) == (0, 0, 0)


def test_no_interval_spans_a_restart() -> None:
    assert compare(STATE, Counters(10, 1e6, 3e6), Counters(2, 5e6, 9e6), seconds=5) is None


PAGE = """\
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="birds",model_version="default",hostname="h",} 7.0
ts_inference_requests_total{model_name="birds",model_version="1.0",hostname="h",} 2.0
ts_inference_requests_total{model_name="birds",model_version="2.0",hostname="h",} 100.0
ts_inference_requests_total{model_name="fish",model_version="default",hostname="h",} 100.0
ts_queue_latency_microseconds{model_name="birds",model_version="default",hostname="h",} 1.5E7
ts_inference_latency_microseconds{model_name="birds",model_version="default",hostname="h",} 2.5E7
classifier_requests_total{model="birds",version="1.0",status="200",Hostname="h",} 9.0
"""


@pytest.mark.parametrize(
    ("model", "versions", "counters"),
    [
        ("birds", {"default", "1.0"}, Counters(9, 1.5e7, 2.5e7)),
        ("birds", {"2.0"}, Counters(100, 0, 0)),
        ("bird", {"default"}, Counters(0, 0, 0)),
    ],
)
def test_counters_of_the_metrics_page(model: str, versions: set[str], counters: Counters) -> None:
    assert parse_counters(PAGE, model, versions) == counters


# --- Memory


class FakeNvml:
    """GPUs with their processes, as (pid, bytes)."""

    class NVMLError(Exception):
        pass

    def __init__(
        self, *gpus: tuple[int, list[tuple[int, int | None]]], split: bool = False
    ) -> None:
        self.gpus = gpus
        self.split = split

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        if not self.split:
            raise self.NVMLError("not supported")
        return [1, 1]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=900, free=self.gpus[handle][0])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        processes = self.gpus[handle][1]
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]


def some_workers(*memory: int | None, device: str = "cpu") -> list[Worker]:
    return [
        Worker(str(9000 + index), 10 + index, device, "READY", size)
        for index, size in enumerate(memory)
    ]


def spaces(*memory: int | None, nvml: Any = None, free: int | None = 1000) -> list[Space]:
    return find_spaces(some_workers(*memory), nvml, lambda: free)


def test_a_worker_takes_what_the_largest_does() -> None:
    assert spaces(300, 400, None) == [Space("memory", 400, 1000)]


def test_what_cannot_be_told_is_not_checked() -> None:
    assert spaces(None, None) == spaces() == spaces(300, free=None) == []
    assert count_fitting([], 50) == 50


@pytest.mark.parametrize(("more", "fitting"), [(1, 1), (2, 2), (3, 2), (50, 2)])
def test_what_fits_into_memory(more: int, fitting: int) -> None:
    assert count_fitting(spaces(400), more) == fitting


def test_a_gpu_on_which_a_worker_computes() -> None:
    nvml = FakeNvml((5000, [(99, 70)]), (2000, [(10, 500), (11, 600), (99, 9000)]))
    assert spaces(None, None, nvml=nvml) == [Space("memory of GPU 1", 600, 2000)]


def test_a_gpu_that_does_not_say_what_a_process_takes() -> None:
    nvml = FakeNvml((2000, [(10, None), (11, None)]))
    assert spaces(None, None, nvml=nvml) == [Space("memory of GPU 0", 450, 2000)]


def test_the_gpus_take_turns() -> None:
    nvml = FakeNvml((2000, [(10, 500)]), (900, [(11, 300)]))
    found = spaces(1, 1, nvml=nvml, free=10**6)
    assert [count_fitting(found, more) for more in (1, 6, 7, 9)] == [1, 6, 6, 6]


def test_a_card_that_is_split_is_not_checked() -> None:
    assert spaces(None, nvml=FakeNvml((2000, [(10, 500)]), split=True)) == []


def test_a_card_that_tells_nothing_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: FakeNvml, handle: int) -> list[Any]:
        raise self.NVMLError("no permission")

    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetComputeRunningProcesses", refused)
    assert spaces(None, nvml=FakeNvml((2000, [(10, 500)]))) == []


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "cmdline").write_bytes(b"python\0/x/ts/model_service_worker.py\0--sock-type\0unix")
    (folder / "status").write_text("Name: python\nVmRSS:\t  500 kB\n")
    (folder / "smaps_rollup").write_text("Rss:  500 kB\nPss:       300 kB\nPss_Dirty: 1 kB\n")
    return tmp_path


def test_memory_of_a_worker(proc: Path) -> None:
    assert process_memory(7, proc) == 300 * 1024


def test_memory_of_another_users_worker(proc: Path) -> None:
    (proc / "7" / "smaps_rollup").unlink()
    assert process_memory(7, proc) == 500 * 1024


def test_no_memory_of_what_is_no_worker_here(proc: Path) -> None:
    assert process_memory(8, proc) is None
    (proc / "7" / "cmdline").write_bytes(b"bash\0")
    assert process_memory(7, proc) is None


# --- A server


class Server:
    """TorchServe as ./scripts/scale sees it; workers start and stop at once unless told."""

    def __init__(self, web: Web, wanted: int = 1) -> None:
        self.web = web
        self.wanted = wanted
        self.ready: int | None = None  # None: all
        self.gpu_usage = "N/A"
        self.requests = 0.0
        self.coming = 0.0  # requests between two looks
        self.queue_us = 0.0
        self.down: int | None = None  # status of every answer
        self.sizes: list[int] = []
        for number in range(1, 65):
            path = f"/models/birds?min_worker={number}&max_worker={number}"
            web.answers[path] = self._resizing(number)
        web.answers["/models/birds"] = lambda request: self._answer(self.describe())(request)
        web.answers["/metrics"] = lambda request: self._answer(self.metrics(), "text/plain")(
            request
        )
        self.model = Model(web.url, web.url, "birds")

    def _answer(self, content: Any, kind: str = JSON) -> Callable[[Any], None]:
        if self.down:
            return Web.text("starting", self.down)
        return Web.text(content if isinstance(content, str) else json.dumps(content), 200, kind)

    def _resizing(self, number: int) -> Callable[[Any], None]:
        def answer(request: Any) -> None:
            assert request.command == "PUT"
            self.sizes.append(number)
            self.wanted = number
            Web.text('{"status": "Processing worker updates..."}', 202, JSON)(request)

        return answer

    def describe(self) -> list[dict[str, Any]]:
        ready = self.wanted if self.ready is None else self.ready
        return [
            {
                "modelName": "birds",
                "modelVersion": "1.0",
                "minWorkers": self.wanted,
                "maxWorkers": self.wanted,
                "workers": [
                    {
                        "id": str(9000 + index),
                        "status": "READY" if index < ready else "UNLOADING",
                        "pid": 2**30 + index,
                        "gpu": self.gpu_usage != "N/A",
                        "gpuUsage": self.gpu_usage,
                    }
                    for index in range(self.wanted)
                ],
                "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0},
            }
        ]

    def metrics(self) -> str:
        self.requests += self.coming
        labels = '{model_name="birds",model_version="default",hostname="h",}'
        return (
            f"ts_inference_requests_total{labels} {self.requests}\n"
            f"ts_queue_latency_microseconds{labels} {self.requests * self.queue_us}\n"
            f"ts_inference_latency_microseconds{labels} {self.requests * self.queue_us}\n"
        )


@pytest.fixture
def server(web: Web, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(scale, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(scale, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(workers, "QUIET_SECONDS", (0.01, 0.02))
    return Server(web)


def run(web: Web, *argv: str) -> int:
    return scale.main(["birds", *argv, "--management", web.url, "--metrics", f"{web.url}/"])


def test_scaling_up(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.web, "3") == 0
    assert server.sizes == [3]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "worker  pid         device  memory  state",
        "9000    1073741824  cpu     -       READY",
        "note: memory is not checked: no worker of the model runs on this machine",
    ]
    assert lines[3].startswith("3 of 3 workers READY after ")
    assert [line.split()[0] for line in lines[4:]] == ["worker", "9000", "9001", "9002"]


def test_scaling_down_at_a_quiet_moment(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.wanted = 3
    assert run(server.web, "1") == 0
    assert server.sizes == [1]
    assert capsys.readouterr().err == ""


def test_scaling_down_without_a_quiet_moment(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.wanted, server.coming = 3, 1
    assert run(server.web, "1") == 0
    assert server.sizes == [1]
    done = capsys.readouterr()
    assert "note: in 0.2 s the model was never without requests" in done.out
    assert "are answered with 500" in done.err


def test_auto_is_what_serve_takes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "workers_for", lambda gpus: 5 + gpus)
    monkeypatch.setattr(scale, "usable_gpus", lambda config: 2)
    monkeypatch.setattr(scale, "open_nvml", lambda: None)
    assert run(server.web, "auto") == 0
    server.gpu_usage = "gpuId::1 utilization.gpu [%]::0 %"
    assert run(server.web, "auto") == 0
    assert server.sizes == [5, 7]


def test_devices(server: Server) -> None:
    for usage, device in (("N/A", "cpu"), ("gpuId::1 x", "cuda:1"), ("failed to obtained", "cuda")):
        server.gpu_usage = usage
        assert [worker.device for worker in server.model.describe().workers] == [device]


@pytest.mark.parametrize("force", [False, True])
def test_memory_that_does_not_suffice(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    force: bool,
) -> None:
    space = Space("memory", 400 * 2**20, 1000 * 2**20)
    monkeypatch.setattr(scale, "spaces_of", lambda state: [space])
    assert run(server.web, "4", *(["--force"] if force else [])) == (0 if force else 1)
    assert server.sizes == ([4] if force else [])
    message = "3 more do not fit, 2 do (memory: a worker takes 400 MiB, 1000 MiB free)"
    assert message in capsys.readouterr().err
    assert run(server.web, "3" if not force else "4") == 0


def test_workers_that_do_not_come(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.ready = 1
    assert run(server.web, "2", "--timeout", "1") == 1
    done = capsys.readouterr()
    assert done.err.startswith("error: 1 of 2 workers are READY after 1 s; the cause is in")
    assert "UNLOADING" in done.out


def test_an_unknown_model(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(web, "2") == 1
    assert capsys.readouterr().err == f"error: {web.url} has no model birds\n"
    assert run(web, "2", "--version", "2.0") == 1
    assert capsys.readouterr().err == f"error: {web.url} has no model birds/2.0\n"
    assert run(web, "--watch") == 1
    assert capsys.readouterr().err == f"error: {web.url} has no model birds\n"


def test_nobody_answers(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{closed_port}"
    assert scale.main(["birds", "2", "--management", address]) == 1
    assert capsys.readouterr().err == f"error: {address} does not answer: ConnectionError\n"


@pytest.mark.parametrize("answer", ["[]", "[{}]", '{"a": 1}', "3", "<html>"])
def test_somebody_else_answers(web: Web, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    web.answers["/models/birds"] = Web.text(answer)
    assert run(web, "2") == 1
    assert capsys.readouterr().err.startswith(f"error: {web.url} does not answer: ")


def test_what_the_server_says_against_it(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Web.text('{\n  "message": "no"\n}', 400, JSON)
    server.web.answers["/models/birds?min_worker=2&max_worker=2"] = refusal
    assert run(server.web, "2") == 1
    assert capsys.readouterr().err == 'error: HTTP 400 of the server: { "message": "no" }\n'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["birds", "0"], "argument N|auto: must be 1 to 1024, got '0'"),
        (["birds", "1025"], "argument N|auto: must be 1 to 1024, got '1025'"),
        (["birds", "many"], "argument N|auto: must be 1 to 1024, got 'many'"),
        (["birds"], "give either a number of workers (or auto), or --watch"),
        (["birds", "2", "--watch"], "give either a number of workers (or auto), or --watch"),
        (["birds", "--watch", "--minimum", "9"], "--minimum is 9, more than --maximum, 8"),
        (["birds", "--watch", "--interval", "0"], "--interval: must be 1 to 86400, got '0'"),
        (["birds", "2", "--management", "x"], "--management must be http://HOST:PORT, got 'x'"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scale.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


# --- The autoscaler in front of a server


class Watched:
    """A Watcher in a thread, with its log."""

    def __init__(
        self, server: Server, capsys: pytest.CaptureFixture[str], spaces: list[Space]
    ) -> None:
        self.stop = Event()
        self._capsys = capsys
        self._lines: list[dict[str, Any]] = []
        autoscaler = Autoscaler(1, 4, 50, 0.1)
        watcher = Watcher(server.model, autoscaler, lambda state: spaces, 0.03, self.stop)
        self.thread = threading.Thread(target=watcher.run)
        self.thread.start()

    def wait_for(self, wanted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not wanted():
            assert time.monotonic() < deadline, self.lines()
            self.stop.wait(0.01)

    def lines(self) -> list[dict[str, Any]]:
        self._lines += map(json.loads, self._capsys.readouterr().out.splitlines())
        return self._lines

    def reasons(self) -> list[str]:
        return [line.get("reason", line["event"]) for line in self.lines()]


@pytest.fixture
def watching(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Watched]]:
    started: list[Watched] = []

    def start(*spaces: Space) -> Watched:
        started.append(Watched(server, capsys, list(spaces)))
        return started[0]

    yield start
    for watched in started:
        watched.stop.set()
        watched.thread.join(20)
        assert not watched.thread.is_alive()


def test_workers_follow_the_load(server: Server, watching: Callable[..., Watched]) -> None:
    server.coming, server.queue_us = 10, 60_000
    watched = watching()
    watched.wait_for(lambda: server.wanted == 4)
    server.coming = 0
    watched.wait_for(lambda: server.wanted == 1)
    assert server.sizes == [2, 3, 4, 3, 2, 1]
    steps = [line for line in watched.lines() if line.get("from") != line.get("to")]
    assert [(line["from"], line["to"]) for line in steps] == [
        (1, 2), (2, 3), (3, 4), (4, 3), (3, 2), (2, 1)
    ]  # fmt: skip
    assert steps[0]["reason"] == "the queue is long"
    assert steps[0]["queue_ms"] == 60
    assert steps[0]["requests"] >= 10


def test_never_beyond_memory(server: Server, watching: Callable[..., Watched]) -> None:
    server.coming, server.queue_us = 10, 60_000
    watched = watching(Space("memory", 400, 300))
    reason = "the queue is long, and there is no memory for more workers"
    watched.wait_for(lambda: reason in watched.reasons())
    assert server.sizes == []
    (line,) = (line for line in watched.lines() if line.get("reason") == reason)
    assert line["memory"] == [{"name": "memory", "each": 400, "free": 300}]


def test_no_worker_is_stopped_with_a_request_in_hand(
    server: Server, watching: Callable[..., Watched]
) -> None:
    server.wanted, server.coming = 2, 1
    watched = watching()
    reason = "quiet, but never without a request in hand"
    watched.wait_for(lambda: reason in watched.reasons())
    assert server.sizes == []


@pytest.mark.parametrize("status", [500, 404])
def test_a_server_that_starts_again_is_waited_for(
    server: Server, watching: Callable[..., Watched], status: int
) -> None:
    server.wanted, server.requests = 3, 1000
    watched = watching()
    watched.wait_for(lambda: "quiet" in watched.reasons())
    server.down = status
    watched.wait_for(lambda: "unreachable" in watched.reasons())
    server.requests, server.wanted = 5, 9  # as it was started
    server.down = None
    watched.wait_for(lambda: server.sizes[-1:] == [4])
    assert watched.reasons().count("unreachable") == 1
    assert "more than the maximum" in watched.reasons()


def test_a_model_that_is_not_there(web: Web) -> None:
    model = Model(web.url, web.url, "birds")
    watcher = Watcher(model, Autoscaler(1, 2, 50, 1), lambda state: [], 1, Event())
    with pytest.raises(UnknownModel, match="has no model birds"):
        watcher.run()

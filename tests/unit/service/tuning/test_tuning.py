"""The search, the Pareto front, and the file between ./scripts/tune and ./scripts/serve."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from handler.errors import InvalidSettings, SetupError
from handler.machine import available_cores, cpu_model
from handler.selection import Hardware
from service import serving as serve
from service.archive.store import model_config
from service.options import parse_package
from service.tuning import tuned
from service.tuning import tuning as tune
from service.tuning.tuned import (
    Facts,
    Tuned,
    TunedHandler,
    TunedOptions,
    describe_differences,
    read_tuned,
)
from service.tuning.tuning import (
    Configuration,
    Point,
    Trial,
    find_winner,
    make_axes,
    pareto_front,
    possible_engines,
    read_reason,
    report,
    search,
)

MODEL = "squeezenet1_1"
SLO_MS = 100.0
START = Configuration(
    engine="openvino",
    precision="fp32",
    workers=4,
    threads=1,
    batch_size=8,
    max_batch_delay_ms=1,
    max_forward=4,
)
ENGINES = [("openvino", "fp32"), ("openvino", "int8"), ("torch", "fp32")]
BEST = Configuration(
    engine="openvino",
    precision="int8",
    workers=2,
    threads=2,
    batch_size=16,
    max_batch_delay_ms=2,
    max_forward=8,
)


def trial(throughput: float, p99: float | None, bad: int = 0, **changes: Any) -> Trial:
    configuration = Configuration(**vars(START) | changes)
    point = Point(concurrency=1, throughput_rps=throughput, p50_ms=p99, p99_ms=p99, bad=bad)
    return Trial(configuration, (point,))


def surface(configuration: Configuration) -> Trial:
    """100 req/s at BEST, and less for each way in which a configuration differs."""
    different = sum(value != getattr(BEST, name) for name, value in vars(configuration).items())
    size = abs(configuration.batch_size - BEST.batch_size) / 100
    return Trial(configuration, trial(100 - 10 * different - size, 50.0).points)


class Clock:
    """Time that passes by measuring alone."""

    def __init__(self, measure: Callable[[Configuration], Trial], seconds: float) -> None:
        self.now = 0.0
        self.measured: list[Configuration] = []
        self._measure = measure
        self._seconds = seconds

    def measure(self, configuration: Configuration) -> Trial:
        self.measured.append(configuration)
        self.now += self._seconds
        return self._measure(configuration)

    def search(self, budget_seconds: float = 1e9, **given: int) -> tuple[list[Trial], bool]:
        trials: list[Trial] = []
        axes = make_axes(ENGINES, 4, False, given)
        finished = search(
            START, axes, self.measure, SLO_MS, budget_seconds, trials, clock=lambda: self.now
        )
        return trials, finished


# --- The search


def test_search_finds_the_best_and_measures_nothing_twice() -> None:
    clock = Clock(surface, 30)
    trials, finished = clock.search()
    winner = find_winner(trials, SLO_MS)
    assert finished
    assert winner is not None
    assert winner[0].configuration == BEST
    assert len(set(clock.measured)) == len(clock.measured) == len(trials)
    assert clock.measured[0] == START  # what is served without tuning
    assert len(trials) < 50  # and not the hundreds of a full grid


@pytest.mark.parametrize("budget", [1, 100, 300])
def test_search_keeps_within_its_budget(budget: float) -> None:
    clock = Clock(surface, 30)
    trials, finished = clock.search(budget)
    assert not finished
    assert len(trials) == max(1, budget // 30)  # one at least


def test_search_respects_the_slo() -> None:
    """The fastest engine misses the SLO, so another one wins."""

    def measure(configuration: Configuration) -> Trial:
        fast = configuration.precision == "int8"
        return Trial(configuration, trial(200, 101).points if fast else trial(50, 99).points)

    winner = find_winner(Clock(measure, 1).search()[0], SLO_MS)
    assert winner is not None
    assert winner[0].configuration.precision == "fp32"


def test_search_goes_on_after_failures() -> None:
    def measure(configuration: Configuration) -> Trial:
        if configuration.engine == "openvino":
            return Trial(configuration, failure="no such engine")
        return surface(configuration)

    trials, finished = Clock(measure, 1).search()
    winner = find_winner(trials, SLO_MS)
    assert finished
    assert winner is not None
    assert winner[0].configuration.engine == "torch"
    assert "failed: no such engine" in report(trials, SLO_MS)


def test_search_ends_where_everything_fails() -> None:
    trials, finished = Clock(lambda one: Trial(one, failure="no"), 1).search()
    assert finished
    assert find_winner(trials, SLO_MS) is None
    assert pareto_front(trials) == []


def test_search_keeps_what_is_given() -> None:
    clock = Clock(surface, 1)
    clock.search(workers=4, batch_size=8, max_batch_delay_ms=1)
    assert {(c.workers, c.batch_size, c.max_batch_delay_ms) for c in clock.measured} == {(4, 8, 1)}
    assert len({c.engine for c in clock.measured}) == 2


def test_an_interrupted_search_leaves_what_it_found() -> None:
    def measure(configuration: Configuration) -> Trial:
        if len(trials) == 2:
            raise KeyboardInterrupt
        return surface(configuration)

    trials: list[Trial] = []
    axes = make_axes(ENGINES, 4, False, {})
    with pytest.raises(KeyboardInterrupt):
        search(START, axes, measure, SLO_MS, 1e9, trials)
    assert len(trials) == 2


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16, 96])
def test_workers_and_threads_stay_within_the_cores(cores: int) -> None:
    tried = [(c.workers, c.threads) for c in make_axes(ENGINES, cores, False, {})[1](START)]
    assert all(workers * threads <= cores for workers, threads in tried)
    assert {(1, cores), (cores, 1)} <= set(tried)
    assert len(set(tried)) == len(tried) <= 16


def test_a_delay_without_batches_is_not_tried() -> None:
    alone = Configuration(**vars(START) | {"batch_size": 1, "max_forward": 1})
    *_, forward, delay = make_axes(ENGINES, 4, False, {})
    assert forward(alone) == [alone]
    assert delay(alone) == []


def test_engines_are_those_of_the_machine() -> None:
    plain, bf16 = Hardware(), Hardware(cpu_bf16=True)
    gpu = Hardware(gpu=0, capability=(7, 5), cpu_bf16=True)
    assert possible_engines("cpu", False, plain) == [("openvino", "fp32"), ("torch", "fp32")]
    assert ("openvino", "int8") in possible_engines("cpu", True, plain)
    assert possible_engines("cpu", False, bf16)[0] == ("openvino", "bf16")
    on_gpu = [("cuda", "fp16"), ("cuda", "fp32"), ("torch", "fp32")]
    assert possible_engines("cuda", True, gpu) == on_gpu


# --- Winner and Pareto front


def test_the_winner_is_the_fastest_that_meets_the_slo() -> None:
    trials = [trial(10, 20), trial(30, 100), trial(40, 100.1), trial(50, 30, bad=1)]
    assert find_winner(trials, SLO_MS) == (trials[1], trials[1].points[0])


def test_the_closest_where_none_meets_the_slo() -> None:
    trials = [trial(30, 300), trial(10, 150), trial(5, None, bad=3)]
    assert find_winner(trials, SLO_MS) == (trials[1], trials[1].points[0])


def test_pareto_front() -> None:
    points = [(10, 20), (30, 40), (25, 45), (30, 50), (60, 90), (50, 90), (5, 10)]
    front = pareto_front([trial(*point) for point in points] + [trial(99, 1, bad=1)])
    assert [(p.throughput_rps, p.p99_ms) for _, p in front] == [
        (5, 10),
        (10, 20),
        (30, 40),
        (60, 90),
    ]


def test_the_reason_of_a_worker_that_does_not_start() -> None:
    line = json.dumps({"event": "startup_failed", "message": "precision is bf16"})
    assert read_reason(f"{{broken\n{line}\nerror: it ended\n") == "precision is bf16"
    assert read_reason("error: it ended") is None


# --- The command, with servers that are made up


def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    measure: Callable[[Configuration], Trial],
    *argv: str,
    bf16: bool = False,
) -> int:
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path))
    monkeypatch.setattr(tune, "find_hardware", lambda: Hardware(cpu_bf16=bf16))
    monkeypatch.setattr(tune.Bench, "measure", lambda self, configuration: measure(configuration))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    options = ["--model", MODEL, "--weights", "untrained", "--device", "cpu"]
    return tune.main([*options, "--slo-p99-ms", "100", *argv])


@pytest.mark.parametrize(("bf16", "precision"), [(False, "fp32"), (True, "bf16")])
def test_the_winner_is_written_and_drawn(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bf16: bool,
    precision: str,
) -> None:
    assert run(monkeypatch, tmp_path, surface, bf16=bf16) == 0
    content = read_tuned(tmp_path / f"tuned-{MODEL}.yaml", MODEL)
    assert (content.options.precision, content.facts.p99_ms) == (precision, 50)
    assert (content.facts.cpu, content.facts.cores) == (cpu_model(), available_cores())
    assert (tmp_path / f"tuned-{MODEL}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Pareto front" in printed
    assert f"./scripts/serve --model={MODEL} --weights=untrained --tuned\n" in printed
    assert json.loads(printed.splitlines()[-1])["trials"]


def test_nothing_is_written_where_none_meets_the_slo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = trial(10, 101).points
    assert run(monkeypatch, tmp_path, lambda one: Trial(one, slow)) == 1
    printed = capsys.readouterr().out
    assert "No configuration meets p99 100 ms; nothing is written. Closest: openvino" in printed
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_everything_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path, lambda one: Trial(one, failure="no")) == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_prints_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Configuration] = []

    def measure(configuration: Configuration) -> Trial:
        if done:
            raise KeyboardInterrupt
        done.append(configuration)
        return surface(configuration)

    assert run(monkeypatch, tmp_path, measure) == 130
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    assert "Best: openvino fp32" in printed
    assert list(tmp_path.iterdir()) == []


def test_it_tunes_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(monkeypatch, tmp_path, surface) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"tuned-{MODEL}.yaml"]
    assert "requirements-benchmark.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ENGINE", "PRECISION", "THREADS", "MAX_FORWARD"])
def test_a_variable_that_decides_what_is_tried_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"CLASSIFIER_{name}", "1")
    assert run(monkeypatch, tmp_path, surface) == 2
    assert f"error: CLASSIFIER_{name} is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["--slo-p99-ms", "0"], ["--seconds", "x"], ["--model", "alexnet"], ["--tuned"]],
    ids=" ".join,
)
def test_mistakes_in_options(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(["--model", MODEL, "--slo-p99-ms", "100", *argv])
    assert ended.value.code == 2


# --- The file


@pytest.fixture
def content() -> Tuned:
    return Tuned(
        model=MODEL,
        options=TunedOptions(
            device="cpu", precision="fp32", workers=3, batch_size=16, max_batch_delay_ms=5
        ),
        handler=TunedHandler(engine="torch", threads=2, max_forward=8),
        facts=Facts(
            slo_p99_ms=100.0,
            throughput_rps=61.5,
            p99_ms=88.0,
            concurrency=8,
            date="2026-11-23T05:33:12+00:00",
            cpu=cpu_model(),
            cores=available_cores(),
            versions={"torch": "2"},
        ),
    )


@pytest.fixture
def path(content: Tuned, tmp_path: Path) -> Path:
    content.write(tmp_path / "store" / "tuned.yaml")
    return tmp_path / "store" / "tuned.yaml"


def options(path: Path, *argv: str) -> Namespace:
    return parse_package(["--model", MODEL, "--tuned", str(path), *argv])


def test_round_trip(path: Path, content: Tuned) -> None:
    assert read_tuned(path, MODEL) == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_decides_the_archives_configuration(path: Path) -> None:
    config = model_config(MODEL, options(path))
    names = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "deviceType")
    assert [config[name] for name in names] == [3, 3, 16, 5, "cpu"]
    handler = {"device": "cpu", "precision": "fp32", "engine": "torch"}
    assert config["handler"] == handler | {"threads": 2, "max_forward": 8}


def test_options_go_over_the_file_and_it_is_said(path: Path) -> None:
    given = options(path, "--workers", "1", "--batch-size", "16")
    config = model_config(MODEL, given)
    assert (config["minWorkers"], config["batchSize"], config["maxBatchDelay"]) == (1, 16, 5)
    assert describe_differences(MODEL, given) == [
        f"warning: --workers 1 goes over {path}, which has 3"
    ]


def test_the_environment_goes_over_the_file_and_it_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_THREADS", "1")
    assert describe_differences(MODEL, options(path)) == [
        f"warning: CLASSIFIER_THREADS=1 goes over {path}, which has 2"
    ]


@pytest.mark.parametrize(("name", "value"), [("cpu_model", "Z80"), ("available_cores", 1000)])
def test_another_machine_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    assert describe_differences(MODEL, options(path)) == []
    monkeypatch.setattr(tuned, name, lambda: value)
    (line,) = describe_differences(MODEL, options(path))
    assert "was tuned on another machine" in line
    assert str(value) in line


def test_without_a_file_nothing_is_said() -> None:
    assert describe_differences(MODEL, parse_package(["--model", MODEL])) == []


def test_the_file_of_each_model_is_in_the_store(
    content: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path))
    content.write(tmp_path / f"tuned-{MODEL}.yaml")
    given = parse_package(["--model", MODEL, "--model", "alexnet", "--tuned"])
    assert model_config(MODEL, given)["minWorkers"] == 3
    with pytest.raises(InvalidSettings, match=r"tuned-alexnet.yaml is missing: ./scripts/tune"):
        model_config("alexnet", given)


REFUSALS = [
    ("", "x", 1, "x is unknown"),
    ("options", "x", 1, "options.x is unknown"),
    ("handler", "top_k", 1, "handler.top_k is unknown"),
    ("facts", "x", 1, "facts.x is unknown"),
    ("options", "workers", 0, "options.workers must be 1 to 1024, got 0"),
    ("options", "workers", True, "options.workers must be a whole number, got True"),
    ("options", "batch_size", "8", "options.batch_size must be a whole number, got '8'"),
    ("options", "max_batch_delay_ms", 10_001, "options.max_batch_delay_ms must be 1 to 10000"),
    ("options", "precision", "fp8", "precision must be one of"),
    ("options", "device", "tpu", "device must be one of"),
    ("handler", "engine", "onnx", "engine must be one of"),
    ("handler", "threads", -1, "threads must be 0 to 1024"),
    ("handler", "max_forward", None, "handler.max_forward must be a whole number, got None"),
    ("facts", "cores", "2", "facts.cores must be a whole number"),
    ("facts", "versions", [], "facts.versions must be a mapping"),
    ("", "options", 3, "options must be a mapping"),
    ("", "model", "alexnet", "was tuned for alexnet, and the model is squeezenet1_1"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), REFUSALS)
def test_what_is_wrong_in_a_file_is_refused_by_its_name(
    path: Path, section: str, key: str, value: object, message: str
) -> None:
    document = yaml.safe_load(path.read_text())
    (document[section] if section else document)[key] = value
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidSettings) as refused:
        read_tuned(path, MODEL)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the file must be a mapping"),
        (b"- 1", "the file must be a mapping"),
        (b"{", "is not valid YAML"),
        (b"\xff", "is not valid YAML"),
        (b"model: squeezenet1_1", "options is missing"),
    ],
)
def test_a_damaged_file_is_refused(path: Path, text: bytes, message: str) -> None:
    path.write_bytes(text)
    with pytest.raises(InvalidSettings, match=message) as refused:
        read_tuned(path, MODEL)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"x.yaml is missing: ./scripts/tune writes it"):
        read_tuned(tmp_path / "x.yaml", MODEL)
    with pytest.raises(InvalidSettings, match="cannot be read"):
        read_tuned(tmp_path, MODEL)


def test_a_file_that_cannot_be_written(content: Tuned, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        content.write(tmp_path / "file" / "tuned.yaml")


def test_the_launcher_refuses_it_before_java_starts(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path.write_text("workers: 3")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(serve, "listen", lambda *_: {})
    monkeypatch.setattr(serve, "TorchServe", lambda *_: pytest.fail("started"))
    assert serve.main(["--model", MODEL, "--tuned", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: workers is unknown; known: model, options")

"""Find the configuration that serves a model fastest on this machine within a latency limit.

Each one is served by the real ./scripts/serve and loaded with more and more clients. The search
goes along one axis after the other (engine and precision, workers and threads, batch size, delay,
images in a forward pass), each time from the best so far, until a round changes nothing or the
time is up. The winner is written to a file that ./scripts/serve --tuned takes.
"""

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from handler.engines import MAX_FORWARD, find_hardware
from handler.errors import InvalidSettings, SetupError
from handler.machine import available_cores, cpu_model, has_gpu
from handler.selection import Hardware, select
from handler.settings import PREFIX, Settings
from service.archive.store import model_config
from service.options import add_model_options, check_model_options, number, package_argv
from service.processes import on_stop
from service.torchserve.server import ROOT, read_config, read_path
from service.tuning.tuned import Facts, Tuned, TunedHandler, TunedOptions, tuned_path

INSTALL = ".venv/bin/pip install -r requirements-benchmark.txt"
try:
    from service.load.generator import Expectations, Load, Picture, load_pictures, measure
    from service.load.processes import Server, free_base_port, running
except ModuleNotFoundError as exc:
    print(f"error: {exc.name} is not installed, which loads the server: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

READY_SECONDS = 900  # packaging included, which for int8 measures accuracy
WARMUP_SECONDS = 1.0  # before each measurement
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
DELAYS_MS = (1, 2, 5, 10)
CANDIDATES = (  # engines and precisions, the likely winner first
    *(("cuda", precision) for precision in ("bf16", "fp16", "fp32")),
    *(("openvino", precision) for precision in ("bf16", "fp32", "int8")),
    ("torch", "fp32"),
)
FORWARDS = (1, 2, 4, 8, 16, 32)
BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"
# What is tried, and would be the same for every configuration if the environment said it.
TRIED = [f"{PREFIX}{name}" for name in ("DEVICE", "ENGINE", "PRECISION", "THREADS", "MAX_FORWARD")]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to serve a model."""

    engine: str
    precision: str
    workers: int
    threads: int  # of each worker
    batch_size: int
    max_batch_delay_ms: int
    max_forward: int  # images in one forward pass


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: so many clients, each with one request at a time."""

    concurrency: int
    throughput_rps: float
    p50_ms: float | None  # None where no request was answered
    p99_ms: float | None
    bad: int = 0  # requests that were refused or failed

    def meets(self, slo_ms: float) -> bool:
        return self.bad == 0 and self.p99_ms is not None and self.p99_ms <= slo_ms


@dataclass(frozen=True)
class Trial:
    """A configuration and what became of it: points, or the reason why there are none."""

    configuration: Configuration
    points: tuple[Point, ...] = ()
    failure: str | None = None

    def best(self, slo_ms: float) -> Point | None:
        """The fastest point that meets the SLO, else the closest; None where all went wrong."""
        points = [point for point in self.points if not point.bad and point.p99_ms is not None]
        return max(points, key=lambda point: _score(point, slo_ms), default=None)


def _score(point: Point, slo_ms: float) -> tuple[bool, float]:
    """For max(): what meets the SLO by throughput, over what misses it by how little."""
    if point.meets(slo_ms):
        return True, point.throughput_rps
    return False, -(point.p99_ms or 0.0)


def find_winner(trials: Sequence[Trial], slo_ms: float) -> tuple[Trial, Point] | None:
    """The best trial with its best point, which may miss the SLO; None where all failed."""
    found = [(trial, point) for trial in trials if (point := trial.best(slo_ms))]
    return max(found, key=lambda pair: _score(pair[1], slo_ms), default=None)


def pareto_front(trials: Sequence[Trial]) -> list[tuple[Trial, Point]]:
    """What nothing else exceeds in throughput at the same or a lower p99, from the lowest p99."""
    points = [(t, p) for t in trials for p in t.points if not p.bad and p.p99_ms is not None]
    points.sort(key=lambda pair: (pair[1].p99_ms, -pair[1].throughput_rps))
    front: list[tuple[Trial, Point]] = []
    for trial, point in points:
        if not front or point.throughput_rps > front[-1][1].throughput_rps:
            front.append((trial, point))
    return front


Axis = Callable[[Configuration], list[Configuration]]


def make_axes(
    engines: Sequence[tuple[str, str]], cores: int, gpu: bool, given: dict[str, int]
) -> list[Axis]:
    """What is varied, most important first. `given` is what the user has decided already."""

    def engine(best: Configuration) -> list[Configuration]:
        return [replace(best, engine=name, precision=precision) for name, precision in engines]

    def workers(best: Configuration) -> list[Configuration]:
        # Cores that nobody uses are left where half the share is tried: the frontend needs some.
        counts = {count for power in range(11) if (count := 2**power) < cores} | {cores}
        if gpu:
            counts = {1, 2, 4}  # each holds the model in the GPU's memory
        if "workers" in given:
            counts = {given["workers"]}
        shares = [
            (count, threads)
            for count in sorted(counts)
            for threads in sorted({max(1, cores // count), max(1, cores // count // 2)})
        ]
        return [replace(best, workers=count, threads=threads) for count, threads in shares]

    def batch(best: Configuration) -> list[Configuration]:
        sizes = [given["batch_size"]] if "batch_size" in given else BATCH_SIZES
        return [
            replace(best, batch_size=size, max_forward=min(best.max_forward, size))
            for size in sizes
        ]

    def delay(best: Configuration) -> list[Configuration]:
        if best.batch_size == 1 or "max_batch_delay_ms" in given:
            return []
        return [replace(best, max_batch_delay_ms=ms) for ms in DELAYS_MS]

    def forward(best: Configuration) -> list[Configuration]:
        return [replace(best, max_forward=n) for n in FORWARDS if n <= best.batch_size]

    return [engine, workers, batch, forward, delay]


def plan(
    start: Configuration, axes: Sequence[Axis], trials: Sequence[Trial], slo_ms: float
) -> Iterator[tuple[Configuration, int]]:
    """What to measure next, and about how many follow; the caller adds each trial to `trials`."""

    def untried(axis: Axis) -> list[Configuration]:
        done = {trial.configuration for trial in trials}
        return [candidate for candidate in axis(best()) if candidate not in done]

    def best() -> Configuration:
        winner = find_winner(trials, slo_ms)
        return winner[0].configuration if winner else start

    yield start, sum(len(axis(start)) - 1 for axis in axes)
    # The engine is not tried again: the others change nothing in what makes it the faster one.
    rest = axes[1:]
    while True:
        before = best()
        for index, axis in enumerate(axes):
            later = sum(len(untried(other)) for other in axes[index + 1 :])
            candidates = untried(axis)
            for count, candidate in enumerate(candidates, start=1):
                yield candidate, len(candidates) - count + later
        if best() == before:
            return
        axes = rest


def search(
    start: Configuration,
    axes: Sequence[Axis],
    measure_one: Callable[[Configuration], Trial],
    slo_ms: float,
    budget_seconds: float,
    trials: list[Trial],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Fill `trials`, as long as one more fits into the budget. Whether nothing was left to try."""
    begin = clock()
    with tqdm(unit="configuration", bar_format=BAR) as bar:
        for configuration, following in plan(start, axes, trials, slo_ms):
            left = budget_seconds - (clock() - begin)
            mean = (clock() - begin) / len(trials) if trials else 0.0
            if mean > left:
                return False
            fitting = int(left / mean) if mean else following + 1
            bar.total = len(trials) + max(1, min(following + 1, fitting))
            bar.set_description_str(describe(configuration))
            trials.append(measure_one(configuration))
            if trials[-1].failure:
                bar.write(f"{describe(configuration)}: {trials[-1].failure}", file=sys.stderr)
            if winner := find_winner(trials, slo_ms):
                bar.set_postfix_str(
                    f"best {winner[1].throughput_rps:.1f} req/s, p99 {winner[1].p99_ms:.0f} ms"
                )
            bar.update()
    return True


def describe(configuration: Configuration) -> str:
    """A configuration in a few words."""
    c = configuration
    return (
        f"{c.engine} {c.precision}, {c.workers} x {c.threads} threads, "
        f"batch {c.batch_size}, {c.max_batch_delay_ms} ms, forward {c.max_forward}"
    )


class Bench:
    """Serves one configuration after the other and measures it."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        pictures: Sequence[Picture],
        device: str,
        facts: Facts,
    ) -> None:
        """`folder` takes the archives, so that model_store stays as it is."""
        self._args = args
        self._folder = folder
        self._pictures = pictures
        self._device = device
        self.facts = facts
        tried: dict[str, Any] = {"device": "auto", "precision": "auto", "workers": "auto"}
        tried |= {
            "workers_per_gpu": None,
            "batch_size": None,
            "max_batch_delay_ms": None,
            "tuned": None,
        }
        self._model_argv = package_argv(argparse.Namespace(**vars(args) | tried), [self.model])
        self._environ = os.environ | {
            "TS_MODEL_STORE": str(folder),
            # Pictures come again and again: kept results would be measured in place of the model.
            f"{PREFIX}CACHE_BYTES": "0",
            "PYTHONPATH": str(ROOT),  # as ./scripts/serve has it
        }

    @property
    def model(self) -> str:
        return str(self._args.models[0])

    def tuned(self, configuration: Configuration, point: Point | None = None) -> Tuned:
        """What `--tuned` reads, with the figures where there are any."""
        facts = self.facts
        if point:
            facts = replace(
                facts,
                throughput_rps=round(point.throughput_rps, 1),
                p99_ms=round(point.p99_ms or 0.0, 1),
                concurrency=point.concurrency,
            )
        c = configuration
        return Tuned(
            model=self.model,
            options=TunedOptions(
                device=self._device,
                precision=c.precision,
                workers=c.workers,
                batch_size=c.batch_size,
                max_batch_delay_ms=c.max_batch_delay_ms,
            ),
            handler=TunedHandler(engine=c.engine, threads=c.threads, max_forward=c.max_forward),
            facts=facts,
        )

    def options(self, configuration: Configuration) -> list[str]:
        """What says which model it is. An int8 model takes minutes: only who serves it makes it."""
        if configuration.precision == "int8":
            return self._model_argv
        int8 = ("--calibration=", "--minimum-agreement=")
        return [word for word in self._model_argv if not word.startswith(int8)]

    def measure(self, configuration: Configuration) -> Trial:
        """Serve a configuration, load it until it misses the SLO, and end it.

        Raises SetupError where the temporary folder cannot be written.
        """
        tuned = self._folder / "candidate.yaml"
        self.tuned(configuration).write(tuned)
        base = free_base_port()
        ports = (f"--port={base}", f"--management-port={base + 1}", f"--metrics-port={base + 2}")
        serve = [sys.executable, ROOT / "scripts" / "serve.py", *self.options(configuration)]
        command = [*serve, f"--tuned={tuned}", "--host=127.0.0.1", *ports]
        points: list[Point] = []
        with running(command, self._environ, self._folder) as server:
            failure = wait_until_ready(server)
            expectations = Expectations()
            for clients in self._args.concurrency if failure is None else ():
                url = f"http://127.0.0.1:{base}/predictions/{self.model}"
                seconds = self._args.seconds
                load = Load(
                    concurrency=clients,
                    seconds=seconds,
                    warmup_seconds=min(WARMUP_SECONDS, seconds),
                )
                run = asyncio.run(measure(url, self._pictures, load, expectations=expectations))
                point = Point(
                    concurrency=clients,
                    throughput_rps=run.throughput_rps,
                    p50_ms=run.p50_ms,
                    p99_ms=run.p99_ms,
                    bad=run.refused + run.failed,
                )
                points.append(point)
                if point.bad and len(points) == 1:
                    kinds = ", ".join(run.failures) or "HTTP 503"
                    failure = f"{point.bad} of {run.requests} requests went wrong: {kinds}"
                if not point.meets(self._args.slo_p99_ms):
                    break  # more clients wait longer
        return Trial(configuration, tuple(points), failure)


def wait_until_ready(server: Server) -> str | None:
    """None when the server is ready; else why it is not."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        ended = server.has_ended()  # before what it printed is read
        text = server.log.read_text("utf-8", "replace")
        if "Ready after" in text:
            return None
        if ended:
            return read_reason(text) or server.last_lines().removeprefix("error: ")
        time.sleep(0.1)
    return f"not ready within {READY_SECONDS} s"


def read_reason(text: str) -> str | None:
    """What a worker said when it could not start, in the log of a server."""
    for line in text.splitlines():
        if line.startswith("{") and '"startup_failed"' in line:
            return str(json.loads(line)["message"])
    return None


def possible_engines(device: str, calibrated: bool, hardware: Hardware) -> list[tuple[str, str]]:
    """The engines and precisions that run here, as (engine, precision)."""
    return [
        (engine, precision)
        for engine, precision in CANDIDATES
        if _runs(Settings(device=device, engine=engine, precision=precision), calibrated, hardware)
    ]


def _runs(settings: Settings, calibrated: bool, hardware: Hardware) -> bool:
    try:
        select(settings, hardware, converted=True, int8=calibrated)
    except InvalidSettings:
        return False
    return True


def start_and_axes(
    args: argparse.Namespace, device: str
) -> tuple[Configuration, list[tuple[str, str]], list[Axis]]:
    """The configuration that is served without tuning, and what is varied from there.

    Raises InvalidSettings where nothing is left to try.
    """
    calibrated = bool(getattr(args, "calibration", None))
    engines = possible_engines(device, calibrated, find_hardware())
    if args.precision != "auto":
        engines = [pair for pair in engines if pair[1] == args.precision]
    if not engines:
        raise InvalidSettings(f"no engine runs in {args.precision} here")
    config = model_config(args.models[0], args)
    settings = Settings.load(config["handler"])
    cores, workers = available_cores(), config["minWorkers"]
    given = {
        name: getattr(args, name)
        for name in ("workers", "batch_size", "max_batch_delay_ms")
        if getattr(args, name) not in (None, "auto")
    }
    if args.workers_per_gpu:
        given["workers"] = workers
    start = Configuration(
        engine=engines[0][0],
        precision=engines[0][1],
        workers=workers,
        threads=max(1, cores // workers),
        batch_size=config["batchSize"],
        max_batch_delay_ms=config["maxBatchDelay"],
        max_forward=min(settings.max_forward or MAX_FORWARD[device], config["batchSize"]),
    )
    return start, engines, make_axes(engines, cores, device == "cuda", given)


COLUMNS = ("engine", "workers x threads", "batch", "delay ms", "forward")
FIGURES = ("clients", "req/s", "p50 ms", "p99 ms", "SLO")
WIDTHS = (14, 18, 6, 9, 8, 8, 8, 8, 8, 5)


def line_of(cells: Sequence[object]) -> str:
    first, *others = cells
    text = f"{first!s:<{WIDTHS[0]}}"
    return text + "".join(
        f"{cell!s:>{width}}" for cell, width in zip(others, WIDTHS[1:], strict=False)
    )


def line_of_trial(trial: Trial, point: Point | None, slo_ms: float) -> str:
    """A configuration with one of its points, or with its failure."""
    c = trial.configuration
    cells = [f"{c.engine} {c.precision}", f"{c.workers} x {c.threads}", c.batch_size]
    cells += [c.max_batch_delay_ms, c.max_forward]
    if point is None:
        return f"{line_of(cells)}   failed: {trial.failure}"
    figures = (point.throughput_rps, point.p50_ms or 0.0, point.p99_ms or 0.0)
    met = "met" if point.meets(slo_ms) else "-"
    return line_of([*cells, point.concurrency, *(f"{value:.1f}" for value in figures), met])


def report(trials: Sequence[Trial], slo_ms: float) -> str:
    """Every configuration at its best point, fastest first, and the Pareto front of all points."""
    shown = [(trial, trial.best(slo_ms)) for trial in trials]
    shown.sort(key=lambda pair: _score(pair[1], slo_ms) if pair[1] else (False, -float("inf")))
    heading = line_of([*COLUMNS, *FIGURES])
    return "\n".join(
        [
            "",
            f"Configurations, each with the clients that suit it best under p99 {slo_ms:g} ms:",
            heading,
            *(line_of_trial(trial, point, slo_ms) for trial, point in reversed(shown)),
            "",
            "Pareto front (no other measurement is both faster and of lower p99):",
            heading,
            *(line_of_trial(trial, point, slo_ms) for trial, point in pareto_front(trials)),
            "",
        ]
    )


def plot(trials: Sequence[Trial], slo_ms: float, title: str, path: Path) -> None:
    """Throughput against p99: every measurement, the Pareto front, the SLO and the winner.

    Raises ModuleNotFoundError without matplotlib, and OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    names = sorted({f"{t.configuration.engine} {t.configuration.precision}" for t in trials})
    for name in names:
        own = [t for t in trials if f"{t.configuration.engine} {t.configuration.precision}" == name]
        points = [p for t in own for p in t.points if not p.bad and p.p99_ms is not None]
        if points:
            axes.scatter(
                [p.p99_ms or 0.0 for p in points],
                [p.throughput_rps for p in points],
                s=18,
                label=name,
            )
    front = [point for _, point in pareto_front(trials)]
    axes.plot(
        [p.p99_ms or 0.0 for p in front],
        [p.throughput_rps for p in front],
        color="0.4",
        linewidth=1,
        drawstyle="steps-post",
        label="Pareto front",
    )
    axes.axvline(slo_ms, color="tab:red", linestyle="--", linewidth=1, label="SLO")
    winner = find_winner(trials, slo_ms)
    if winner and winner[1].meets(slo_ms):
        best = winner[1]
        axes.plot(
            best.p99_ms or 0.0, best.throughput_rps, "*", color="black", ms=13, label="winner"
        )
    axes.set(xlabel="p99, ms", ylabel="good answers a second", title=title)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./scripts/tune",
        description="Find the configuration that serves a model fastest within a latency limit. "
        "A model option that is given (--precision, --workers, …) is kept and not varied.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--slo-p99-ms",
        type=_positive,
        required=True,
        metavar="MS",
        help="99 of 100 requests must be answered within this time",
    )
    group.add_argument(
        "--budget-minutes",
        type=_positive,
        default=10.0,
        metavar="N",
        help="start no measurement that would end later (default: %(default)s)",
    )
    group.add_argument(
        "--seconds", type=_positive, default=5.0, help="of each measurement (default: %(default)s)"
    )
    cores = available_cores()
    group.add_argument(
        "--concurrency",
        type=number(1, 10_000),
        nargs="+",
        metavar="N",
        default=sorted({1, *(cores * 2**power for power in range(5))}),
        help="clients, one measurement each, until one misses the SLO "
        "(default: %(default)s, by the number of cores)",
    )
    group.add_argument(
        "--images", type=Path, metavar="DIR", help="JPEGs to send (default: drawn here)"
    )
    group.add_argument(
        "--out", metavar="FILE", default="auto", help="(default: model_store/tuned-{model}.yaml)"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="(default: beside --out, as .png)"
    )
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    if len(args.models) > 1:
        parser.error("one --model is tuned at a time")
    args.concurrency = sorted(set(args.concurrency))
    for name in ("weights", "labels", "calibration"):  # servers run in another folder
        value = getattr(args, name, None)
        if value and value not in ("pretrained", "untrained"):
            setattr(args, name, str(Path(value).resolve()))
    return args


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ending the server takes a moment
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    on_stop(_interrupt)
    model, slo = args.models[0], args.slo_p99_ms
    trials: list[Trial] = []
    interrupted = finished = False
    try:
        for name in TRIED:
            if name in os.environ:
                raise InvalidSettings(f"{name} is set, and would decide what is to be tried")
        device = "cuda" if args.device != "cpu" and has_gpu() else "cpu"
        start, engines, axes = start_and_axes(args, device)
        out = tuned_path(model, args.out)
        pictures = load_pictures(args.images)
        print(
            f"Tuning {model} on {cpu_model()}, cores: {available_cores()}, for p99 {slo:g} ms: "
            f"at most {args.budget_minutes:g} minutes, until "
            f"{time.strftime('%H:%M', time.localtime(time.time() + 60 * args.budget_minutes))}.\n"
            f"Engines here: {', '.join(' '.join(pair) for pair in engines)}.",
            flush=True,
        )
        facts = Facts(
            slo_p99_ms=slo,
            throughput_rps=None,
            p99_ms=None,
            concurrency=None,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            cpu=cpu_model(),
            cores=available_cores(),
            versions={name: version(name) for name in ("torchserve", "torch", "openvino")},
        )
        with tempfile.TemporaryDirectory(prefix="tune-") as folder:
            bench = Bench(args, Path(folder), pictures, device, facts)
            archive = read_path(read_config(), "model_store") / f"{model}.mar"
            if archive.exists():  # what is packaged needs no download
                shutil.copy(archive, folder)
            try:
                budget = 60 * args.budget_minutes
                finished = search(start, axes, bench.measure, slo, budget, trials)
            except KeyboardInterrupt:
                interrupted = True
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not trials:
        return 130
    print(report(trials, slo))
    return conclude(args, trials, bench, out, interrupted=interrupted, finished=finished)


def conclude(
    args: argparse.Namespace,
    trials: Sequence[Trial],
    bench: Bench,
    out: Path,
    *,
    interrupted: bool,
    finished: bool,
) -> int:
    """Say who has won, and write the file and the plot. Returns the exit status."""
    slo = args.slo_p99_ms
    if interrupted:
        print("Interrupted: this is what was found so far; nothing is written.")
    elif not finished:
        print("The time was up before everything was tried; --budget-minutes gives more.")
    status = 0
    winner = find_winner(trials, slo)
    if winner is None:
        print("No configuration could be measured; nothing is written.", file=sys.stderr)
        return 130 if interrupted else 1
    trial, point = winner
    figures = f"{point.throughput_rps:.1f} req/s, p99 {point.p99_ms:.1f} ms"
    said = f"{describe(trial.configuration)}: {figures} with {point.concurrency} clients"
    if not point.meets(slo):
        print(f"No configuration meets p99 {slo:g} ms; nothing is written. Closest: {said}")
        status = 1
    else:
        print(f"Best: {said}")
    if interrupted:
        return 130
    written = [out] if status == 0 else []
    png = args.plot or out.with_suffix(".png")
    try:
        if status == 0:
            bench.tuned(trial.configuration, point).write(out)
        if status == 0 or args.plot:
            plot(trials, slo, f"{bench.model} on {cpu_model()}", png)
            written.append(png)
    except ModuleNotFoundError as exc:
        print(f"warning: no plot, because {exc.name} is not installed: {INSTALL}", file=sys.stderr)
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    if status == 0:
        print(f"Written: {', '.join(map(str, written))}")
        options = [o for o in bench.options(trial.configuration) if not o.endswith("=auto")]
        file = [] if out == tuned_path(bench.model, "auto") else [str(out)]
        print("Serve it:", shlex.join(["./scripts/serve", *options, "--tuned", *file]))
    print(json.dumps({"facts": asdict(bench.facts), "trials": [asdict(one) for one in trials]}))
    return status

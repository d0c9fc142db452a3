"""Find the configuration that serves a model fastest on this machine within a latency limit.

Each one is served and loaded with more and more clients (bench.py), one after the other as the
search says (search.py), until nothing is left to try or the time is up. The winner is written to a
file that ./scripts/serve --tuned takes (tuned.py).
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from handler.errors import InvalidSettings
from handler.machine import available_cores, cpu_model, has_gpu
from handler.settings import PREFIX
from service.load.images import load_images
from service.options import ModelOptions
from service.tables import counted
from service.temporary import TemporaryFolder
from service.torchserve.config import ServerConfig
from service.tuning.bench import Bench, TuningOptions
from service.tuning.report import plot_trials, report
from service.tuning.search import Configuration, Trial, find_winner, search
from service.tuning.space import SearchSpace, find_space
from service.tuning.tuned import Facts, tuned_path

BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"
# What is tried: a variable that sets it would make all configurations the same.
TRIED = [f"{PREFIX}{name}" for name in ("DEVICE", "ENGINE", "PRECISION", "THREADS", "MAX_FORWARD")]

Ending = Literal["finished", "out of time", "interrupted"]
NOTES: dict[Ending, str] = {
    "out of time": "The time was up before everything was tried; --budget-minutes gives more.",
    "interrupted": "Interrupted: this is what was found so far; nothing is written.",
}


def tune(model: ModelOptions, options: TuningOptions) -> int:
    """Search, print a report, and write the winner's file and plot. Returns the exit status.

    Raises SetupError if nothing can be tried, OSError if a file cannot be read or written, and
    KeyboardInterrupt if it is interrupted before the first measurement has ended.
    """
    for name in TRIED:
        if name in os.environ:
            raise InvalidSettings(f"{name} is set, and would decide what is to be tried")
    name, slo = model.models[0], options.slo_p99_ms
    device = "cuda" if model.device != "cpu" and has_gpu() else "cpu"
    server = ServerConfig.load()
    space = find_space(model, device, server)
    images = load_images(options.images)
    end = time.localtime(time.time() + 60 * options.budget_minutes)
    print(
        f"Tuning {name} on {cpu_model()}, cores: {available_cores()}, for p99 {slo:g} ms: "
        f"at most {options.budget_minutes:g} minutes, until {time.strftime('%H:%M', end)}.\n"
        f"Engines here: {', '.join(' '.join(pair) for pair in space.engines)}.",
        flush=True,
    )
    trials: list[Trial] = []
    with TemporaryFolder("tune-") as folder:
        bench = Bench(
            model_options=model,
            options=options,
            facts=Facts(
                slo_p99_ms=slo,
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                cpu=cpu_model(),
                cores=available_cores(),
                versions={name: version(name) for name in ("torchserve", "torch", "openvino")},
            ),
            device=device,
            folder=folder,
            images=images,
        )
        archive = server.model_store / f"{name}.mar"
        if archive.exists():  # what is packaged needs no download
            shutil.copy(archive, folder)
        budget = 60 * options.budget_minutes
        ending = run_search(space, bench.measure, slo, budget, trials)
    out = tuned_path(name, options.out, server.model_store)
    return conclude(trials, bench, out, ending)


def run_search(
    space: SearchSpace,
    measure: Callable[[Configuration], Trial],
    slo_ms: float,
    budget_seconds: float,
    trials: list[Trial],
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    """Fill `trials`, as long as one more fits into the budget.

    Raises KeyboardInterrupt if it is interrupted before the first measurement has ended.
    """
    begin = clock()
    with tqdm(unit="configuration", bar_format=BAR) as bar:
        for configuration, following in search(space.start, space.axes, trials, slo_ms):
            left = budget_seconds - (clock() - begin)
            mean = (clock() - begin) / len(trials) if trials else 0.0
            if mean > left:
                return "out of time"
            fitting = int(left / mean) if mean else following + 1
            bar.total = len(trials) + max(1, min(following + 1, fitting))
            bar.set_description_str(str(configuration))
            try:
                trials.append(measure(configuration))
            except KeyboardInterrupt:
                if not trials:
                    raise
                return "interrupted"
            if trials[-1].failure:
                bar.write(f"{configuration}: {trials[-1].failure}", file=sys.stderr)
            if winner := find_winner(trials, slo_ms):
                bar.set_postfix_str(
                    f"best {winner[1].throughput_rps:.1f} req/s, p99 {winner[1].p99_ms:.0f} ms"
                )
            bar.update()
    return "finished"


def conclude(trials: Sequence[Trial], bench: Bench, out: Path, ending: Ending) -> int:
    """Print the report and write the winner's file and plot. Returns the exit status."""
    options, slo = bench.options, bench.options.slo_p99_ms
    print(report(trials, slo))
    if ending in NOTES:
        print(NOTES[ending])
    winner = find_winner(trials, slo)
    if winner is None:
        print("No configuration could be measured; nothing is written.", file=sys.stderr)
        return 130 if ending == "interrupted" else 1
    trial, point = winner
    figures = f"{point.throughput_rps:.1f} req/s, p99 {point.p99_ms:.1f} ms"
    found = f"{trial.configuration}: {figures} with {counted(point.concurrency, 'client')}"
    met = point.meets(slo)
    missed = f"No configuration meets p99 {slo:g} ms; nothing is written. Closest:"
    print("Best:" if met else missed, found)
    if ending == "interrupted":
        return 130
    image = options.plot or out.with_suffix(".png")
    if met:
        bench.tuned(trial.configuration, point).write(out)
    if met or options.plot:
        plot_trials(trials, slo, f"{bench.model} on {cpu_model()}", image)
    if met:
        print(f"Written: {out}, {image}")
        words = bench.model_argv(trial.configuration)
        file = [] if options.out == "auto" else [str(out)]
        print("Serve it:", shlex.join(["./scripts/serve", *words, "--tuned", *file]))
    print(json.dumps({"facts": asdict(bench.facts), "trials": [asdict(one) for one in trials]}))
    return 0 if met else 1

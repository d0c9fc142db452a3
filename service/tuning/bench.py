"""Serves one configuration after the other with the real ./scripts/serve, and measures it."""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from handler.settings import PREFIX
from service.load.answers import Expectations
from service.load.generator import measure
from service.load.images import ImageRequest
from service.load.measurement import Load
from service.load.processes import NotReady, free_base_port, running
from service.options import ModelOptions, to_argv
from service.torchserve.config import ROOT
from service.tuning.search import Configuration, Point, Trial
from service.tuning.tuned import Facts, Tuned, TunedHandler, TunedOptions

READY_SECONDS = 900  # packaging included, which for int8 measures accuracy
WARMUP_SECONDS = 1.0  # before each measurement


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """The options of ./scripts/tune, besides those of the model."""

    slo_p99_ms: float
    budget_minutes: float
    seconds: float  # of each measurement
    concurrency: tuple[int, ...]  # clients, one measurement each
    images: Path | None  # a folder; None: drawn images
    out: str  # a file; "auto": the one that --tuned looks for
    plot: Path | None  # None: beside `out`


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all configurations have in common."""

    model_options: ModelOptions
    options: TuningOptions
    facts: Facts
    device: str
    folder: Path  # takes the archives, so that model_store stays as it is
    images: Sequence[ImageRequest]

    @property
    def model(self) -> str:
        return self.model_options.models[0]

    def tuned(self, configuration: Configuration, point: Point | None = None) -> Tuned:
        """What `--tuned` reads, with the figures if there are any."""
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
                device=self.device,
                precision=c.precision,
                workers=c.workers,
                batch_size=c.batch_size,
                max_batch_delay_ms=c.max_batch_delay_ms,
            ),
            handler=TunedHandler(engine=c.engine, threads=c.threads, max_forward=c.max_forward),
            facts=facts,
        )

    def model_argv(self, configuration: Configuration) -> list[str]:
        """The options of ./scripts/serve that say which model it is."""
        kept = replace(  # without what a configuration decides
            self.model_options,
            device="auto",
            precision="auto",
            workers=None,
            workers_per_gpu=None,
            batch_size=None,
            max_batch_delay_ms=None,
        )
        if configuration.precision != "int8":  # making an int8 model takes minutes
            kept = replace(kept, calibration=None, minimum_agreement=ModelOptions.minimum_agreement)
        return to_argv(kept)

    def measure(self, configuration: Configuration) -> Trial:
        """Serve a configuration, load it with more clients until it misses the SLO, and end it.

        Raises SetupError if the temporary folder cannot be written.
        """
        tuned = self.folder / "candidate.yaml"
        self.tuned(configuration).write(tuned)
        base = free_base_port()
        ports = (f"--port={base}", f"--management-port={base + 1}", f"--metrics-port={base + 2}")
        serve = [sys.executable, ROOT / "scripts" / "serve.py", *self.model_argv(configuration)]
        command = [*serve, f"--tuned={tuned}", "--host=127.0.0.1", *ports]
        environ = os.environ | {
            "TS_MODEL_STORE": str(self.folder),
            # Each image comes again and again: the result cache would be measured, not the model.
            f"{PREFIX}CACHE_BYTES": "0",
            "PYTHONPATH": str(ROOT),  # as ./scripts/serve has it
        }
        with running(command, environ, self.folder) as server:
            try:
                server.wait_until_ready(READY_SECONDS)
            except NotReady as exc:
                return Trial(configuration, failure=str(exc))
            return self._load(configuration, f"http://127.0.0.1:{base}/predictions/{self.model}")

    def _load(self, configuration: Configuration, url: str) -> Trial:
        points: list[Point] = []
        failure = None
        expectations = Expectations()
        for clients in self.options.concurrency:
            load = Load(
                concurrency=clients,
                seconds=self.options.seconds,
                warmup_seconds=min(WARMUP_SECONDS, self.options.seconds),
            )
            run = asyncio.run(measure(url, self.images, load, expectations=expectations))
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
            if not point.meets(self.options.slo_p99_ms):
                break  # more clients wait longer
        return Trial(configuration, tuple(points), failure)

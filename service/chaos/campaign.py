"""A campaign from its begin to its verdicts."""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path

import psutil
import requests

from handler.errors import SetupError
from service.archive.mar import read_card
from service.chaos.archive import can_hang, coloured_mixture, make_archive
from service.chaos.checker import Verdict, check
from service.chaos.cluster import RESPONSE_SECONDS, Cluster
from service.chaos.colours import LABELS
from service.chaos.faults import FAULTS, NotPossible, Scene
from service.chaos.history import Attempt, Fault, History, Monitored
from service.chaos.prometheus import Prometheus, running_prometheus
from service.chaos.requests import Mixture, Picture
from service.chaos.schedule import Step
from service.chaos.traffic import Traffic
from service.load.answers import NEAR_TIE, read_predictions
from service.load.images import load_images
from service.tables import text_table
from service.temporary import TemporaryFolder
from service.torchserve.management import direct_session

REPLICAS = 2
READY_SECONDS = 180
POLL_SECONDS = 0.25
SAMPLE_SECONDS = 2.0
LEAST_PICTURES = 3  # of which an archive must be sure
SHOWN = 5  # of the cases that break a rule
SCRAPE_SECONDS = 2  # a Java that is killed does not answer for longer than that
SETTLE_SECONDS = 5  # until what is true now is scraped and evaluated


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What a campaign is to do."""

    minutes: float
    seed: int  # of the requests
    steps: Iterable[Step]
    archive: Path | None = None  # None: one of three colours is made
    history: Path | None = None
    prometheus: bool = False  # beside it, for the alerts

    def run(self) -> History:
        """What happened. Ctrl-C ends it early. Raises SetupError."""
        history = History(self.history)
        with ExitStack() as stack:
            folder = stack.enter_context(TemporaryFolder("chaos-"))
            archive = self.archive or make_archive(folder)
            card = read_card(archive)
            if card is None:
                raise SetupError(f"{archive} is no archive of ./scripts/package")
            cluster = Cluster(folder, archive, folder / "keys", history, REPLICAS)
            stack.callback(cluster.unmount)
            stack.enter_context(cluster)
            traffic = Traffic(history, cluster.gateway.ports[0], coloured_mixture(), self.seed)
            scene = Scene(cluster, traffic, can_hang(archive))
            traffic.key = scene.write_key()
            for unit in cluster.units:
                unit.start()
            director = Director(scene, history)
            if director.wait_until_whole(READY_SECONDS) is None:
                raise SetupError(f"not ready within {READY_SECONDS} s: {cluster.missing()}")
            if card.labels != LABELS:
                traffic.mixture = learn(cluster)
            prometheus = stack.enter_context(watching(cluster)) if self.prometheus else None
            if prometheus:
                time.sleep(SETTLE_SECONDS)  # it has just seen its first instance
            history.begin()
            if prometheus:
                history.add(Monitored(time=0))
            end = time.monotonic() + 60 * self.minutes
            with traffic, suppress(KeyboardInterrupt):
                director.inject(self.steps, end)
            if prometheus:
                note_alerts(prometheus, cluster, history)
        return history


def watching(cluster: Cluster) -> AbstractContextManager[Prometheus]:
    """Prometheus with the addresses of the replicas and the gateway."""
    folder = cluster.folder / "prometheus"
    folder.mkdir()
    targets = {
        "classifier": [f"127.0.0.1:{unit.ports[2]}" for unit in cluster.replicas],
        "gateway": [f"127.0.0.1:{cluster.gateway.ports[0]}"],
    }
    return running_prometheus(folder, targets, SCRAPE_SECONDS)


def note_alerts(prometheus: Prometheus, cluster: Cluster, history: History) -> None:
    """What was raised since the campaign began. Raises requests.RequestException."""
    time.sleep(SETTLE_SECONDS)
    began = time.time() - history.now()
    replicas = {f"127.0.0.1:{unit.ports[2]}": unit.number for unit in cluster.replicas}
    for alert in prometheus.alerts(began, time.time()):
        history.add(
            replace(
                alert,
                begin=round(alert.begin - began, 1),
                end=round(alert.end - began, 1),
                replica=replicas.get(alert.instance, -1),
            )
        )


def learn(cluster: Cluster) -> Mixture:
    """Drawn photographs, with what the model of an unknown archive says that they are.

    Without those of which it is not sure: batches of other sizes round differently. Raises
    SetupError if too few are left.
    """
    learnt = []
    for image in load_images(None):
        url = f"http://127.0.0.1:{cluster.replicas[0].ports[0]}/predictions/{cluster.model}"
        with direct_session() as session:
            answer = session.post(url, image.body, timeout=READY_SECONDS)
        (label, best), *others = read_predictions(answer.json()) or [("", 0.0)]
        if all(confidence < NEAR_TIE * best for _, confidence in others) and best:
            learnt.append(Picture(image.body, label))
    if len(learnt) < LEAST_PICTURES:
        raise SetupError(
            f"the model is sure of {len(learnt)} pictures; {LEAST_PICTURES} are needed"
        )
    return Mixture(cluster.model, learnt, learnt[0])


@dataclass
class Director:
    """Injects one fault after the other."""

    scene: Scene
    history: History
    _sampled: float = 0.0

    def inject(self, steps: Iterable[Step], end: float) -> None:
        """Until the time is over, no step is left, or a fault is not recovered from.

        Without any step, only time passes.
        """
        step = None
        for step in steps:
            self._wait(step.calm)
            if time.monotonic() >= end:
                return
            if not self._inject(step):
                return
        if step is None:
            self._wait(end - time.monotonic())

    def _inject(self, step: Step) -> bool:
        """Whether there was a recovery within the limit."""
        begin, detail, possible = self.history.now(), "", True
        self.scene.cleared = None
        try:
            with FAULTS[step.fault](self.scene, step):
                self._wait(step.seconds)
        except NotPossible as exc:
            detail, possible = str(exc), False
        except (SetupError, requests.RequestException, psutil.Error, LookupError) as exc:
            detail = f"{type(exc).__name__}: {exc}"
        end = self.history.now()
        recovered = self.wait_until_whole(step.kind.recovery)
        if recovered is None:
            detail = detail or self.scene.cluster.missing()
        fault = Fault(
            fault=step.fault,
            replica=step.replica,
            seconds=step.seconds,
            calm=step.calm,
            begin=begin,
            end=end,
            recovered=None if detail and possible else recovered,
            detail=detail,
            possible=possible,
            cleared=self.scene.cleared,
        )
        self.history.add(fault)
        took = "not recovered" if fault.recovered is None else f"{fault.recovered - end:.1f} s"
        who = "gateway" if step.replica < 0 else f"replica {step.replica}"
        print(f"{begin:7.1f} s  {step.fault:18} {who}  {took}  {detail}".rstrip(), flush=True)
        return recovered is not None

    def wait_until_whole(self, seconds: float) -> float | None:
        """When it was; None if it was not in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._tend()
            if self.scene.cluster.is_whole():
                return self.history.now()
            time.sleep(POLL_SECONDS)
        return None

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._tend()
            time.sleep(min(left, POLL_SECONDS))

    def _tend(self) -> None:
        self.scene.cluster.tend()
        if time.monotonic() - self._sampled >= SAMPLE_SECONDS:
            self._sampled = time.monotonic()
            self.scene.cluster.sample()


def report(history: History, verdicts: Sequence[Verdict], seed: int) -> bool:
    """Print the table of the rules and one JSON line; whether all promises were kept."""
    rows = [
        [
            verdict.rule.name,
            verdict.cases,
            len(verdict.broken),
            _text(verdict.worst.value if verdict.worst else None, verdict.rule.unit),
            _text(verdict.rule.limit, verdict.rule.unit),
            verdict.rule.promise,
        ]
        for verdict in verdicts
    ]
    headings = ("rule", "cases", "broken", "worst", "limit", "promise")
    print("\n".join(["", *text_table(headings, rows, left=(0, 5))]))
    for verdict in verdicts:
        for case in islice(verdict.broken, SHOWN):
            print(f"broken: {verdict.rule.name}: {case.what} ({case.value:g} {verdict.rule.unit})")
    clean = not any(verdict.broken for verdict in verdicts)
    faults = history.of(Fault)
    attempts = [attempt for attempt in history.of(Attempt) if attempt.attempt == 1]
    line = {
        "clean": clean,
        "seed": seed,
        "requests": len(attempts),
        "faults": sum(fault.possible for fault in faults),
        "not_possible": sorted({fault.fault for fault in faults if not fault.possible}),
        "broken": {verdict.rule.name: len(verdict.broken) for verdict in verdicts},
        "worst": {
            verdict.rule.name: float(verdict.worst.value)
            for verdict in verdicts
            if verdict.worst and isfinite(verdict.worst.value)
        },
    }
    print(f"\n{json.dumps(line)}", flush=True)
    return clean


def judge(campaign: Campaign) -> bool:
    """Run a campaign and print what came of it. Raises SetupError."""
    history = campaign.run()
    return report(history, check(history, RESPONSE_SECONDS), campaign.seed)


def _text(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:g} {unit}".rstrip()

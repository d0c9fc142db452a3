"""Measure the service, its peers and the limits of this machine; write REPORT.md.

    python -m benchmarks.run --weights FILE --recipe ENTRY --images DIR --calibration DIR

One server at a time, each started afresh in every round, the order of each round shuffled with a
fixed seed. A peer that cannot be set up or started is reported as failed, with its reason.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.alone import chosen_precision
from benchmarks.conditions import conditions, now
from benchmarks.environments import SetupFailed, prepare
from benchmarks.figures import best_concurrency
from benchmarks.images import load_rgb, read_labels
from benchmarks.overload import measure_overload
from benchmarks.pairs import measure_pair, without_gateway, without_metrics
from benchmarks.servers import (
    Servers,
    Started,
    StartFailed,
    absolute,
    make_parser,
    make_servers,
    say,
)
from benchmarks.subjects import PEERS, Subject, all_subjects
from benchmarks.usage import Meter, memory
from handler.machine import available_cores
from service.load.answers import Expectations
from service.load.generator import send_once
from service.load.images import ImageRequest, as_form
from service.load.measurement import Load, Measurement

FOLDER = Path(__file__).parent
SETTLE_CLIENTS = 8
CHECK_CLIENTS = 4
AUTO = "auto"
INPROCESS = "inprocess"  # no server, and measured beside them
GATEWAY_CLIENTS = (1, 8)  # with which the gateway's cost is measured
METRICS_CLIENTS = (8,)  # and that of metrics and logs


class Run:
    """One benchmark: what is to be done, and what has come of it so far (`data`)."""

    def __init__(self, args: argparse.Namespace, servers: Servers) -> None:
        self.args = args
        self.servers = servers
        self.images = load_rgb(args.images)
        self.labels = read_labels(args.images)
        options = {name: servers.model_options(name) for name in args.precisions}
        every = all_subjects(args.model, options)
        self.subjects = [s for s in every if args.only is None or s.name in args.only]
        self.inprocess = args.only is None or INPROCESS in args.only
        self.settling = Load(concurrency=SETTLE_CLIENTS, seconds=args.warmup_seconds)
        self.reference: dict[str, str] = {}
        self.broken: dict[str, str] = {}  # precisions that could not be packaged
        names = ("precisions", "concurrency", "seconds", "warmup_seconds", "rounds", "seed")
        self.data: dict[str, Any] = {
            "conditions": conditions(servers, self.images)
            | {"workers": servers.workers}
            | {name: getattr(args, name) for name in names},
            "subjects": {
                s.name: {"what": s.what, "kind": s.kind, "precision": s.precision, "failed": None}
                | {"failed_starts": [], "start_seconds": [], "runs": [], "memory": []}
                | {"pairs": [], "accuracy": None}
                for s in self.subjects
            },
            "reference": None,
            "inprocess": {},
            "overload": {},
        }

    def everything(self) -> None:
        for precision in self.args.precisions:
            try:
                self.servers.package(precision)
            except SetupFailed as exc:
                self.broken[precision] = str(exc)
                say(f"  failed: {exc}")
        pythons = {s.name: python for s in self.subjects if (python := self.set_up(s))}
        self.classify_reference()
        for number in range(1, self.args.rounds + 1):
            order = [s for s in self.subjects if s.name in pythons]
            random.Random(self.args.seed + number).shuffle(order)  # noqa: S311 no secret
            for subject in order:
                self.round(subject, pythons[subject.name], number)
                self.save()
            if self.inprocess:
                self.measure_inprocess(number)
        for subject in self.subjects:
            if subject.is_ours and subject.precision == self.servers.precision:
                self.overload(subject, pythons[subject.name])
                self.save()
        self.data["conditions"]["finished"] = now()

    def set_up(self, subject: Subject) -> Path | None:
        """The Python of a subject; None if there is none, and the reason is kept."""
        precision = subject.precision or self.servers.precision
        try:
            if precision in self.broken:
                raise SetupFailed(self.broken[precision])
            if subject.environment is None:
                return Path(sys.executable)
            say(f"setting up {subject.name}")
            return prepare(subject.environment)
        except SetupFailed as exc:
            self.data["subjects"][subject.name]["failed"] = f"set-up: {exc}"
            say(f"  failed: {exc}")
            return None

    def classify_reference(self) -> None:
        """The top classes that eager torch in fp32 gives the labelled images."""
        precision = self.servers.precision
        if not self.labels or self.args.weights == "untrained" or precision in self.broken:
            return
        say("classifying the labelled images with the reference")
        done = subprocess.run(
            [sys.executable, str(PEERS / "reference.py"), str(self.args.images)],
            env=self.servers.environ(precision),
            stdout=subprocess.PIPE,
            check=True,
        )
        self.reference = json.loads(done.stdout)
        right = sum(self.labels.get(name) == label for name, label in self.reference.items())
        self.data["reference"] = {"images": len(self.reference), "right": right}

    def round(self, subject: Subject, python: Path, number: int) -> None:
        """Start a subject, check it, measure it at every concurrency, weigh it, end it."""
        result = self.data["subjects"][subject.name]
        if result["failed"]:
            return
        say(f"round {number}: {subject.name}")
        images = self.images
        if subject.form == "multipart":
            images = [as_form([image], [subject.part]) for image in images]
        started = self.servers.started(subject, python, images[0], result["failed_starts"])
        try:
            with started as target:
                result["start_seconds"].append(target.seconds)
                target.measure(images, self.settling)
                if subject.accuracy and self.reference and result["accuracy"] is None:
                    result["accuracy"] = self.accuracy(target, images)
                for clients in self.args.concurrency:
                    load = Load(concurrency=clients, seconds=self.args.seconds, warmup_seconds=1.0)
                    meter = Meter(target.server)
                    run = target.measure(images, load, meter)
                    cpu_ms = meter.ms_per_request(run)
                    result["runs"].append({"round": number, **asdict(run), "cpu_ms": cpu_ms})
                    used = f"{sum(cpu_ms.values()):6.2f} ms CPU{_trouble(run)}"
                    say(f"  {clients:3} clients {run.throughput_rps:8.1f} req/s {used}")
                result["pairs"] += [
                    {"round": number, **pair} for pair in self.pairs(subject, target)
                ]
                result["memory"].append({"round": number, "processes": memory(target.server)})
        except StartFailed as exc:
            result["failed"] = f"round {number}: {exc}"
            say(f"  failed: {exc}")

    def pairs(self, subject: Subject, target: Started) -> list[dict[str, Any]]:
        """What the gateway costs, or metrics and logs."""
        counts: tuple[int, ...] = ()
        bare = target
        if subject.kind == "gateway":
            bare, counts = without_gateway(target), GATEWAY_CLIENTS
        elif subject.kind == "ours" and subject.precision == self.servers.precision:
            bare, counts = without_metrics(target), METRICS_CLIENTS
        seconds = self.args.seconds
        return [measure_pair(target, bare, self.images, clients, seconds) for clients in counts]

    def accuracy(self, target: Started, images: Sequence[ImageRequest]) -> dict[str, int]:
        """How many labelled images are classified as their labels and the reference say."""
        labelled = [image for image in images if image.name in self.reference]
        found = Expectations()
        sending = send_once(
            target.url, labelled, clients=CHECK_CLIENTS, headers=target.headers, expectations=found
        )
        samples = asyncio.run(sending)
        top = found.top_classes
        return {
            "images": len(labelled),
            "right": sum(self.labels[name] == label for name, label in top.items()),
            "as_reference": sum(self.reference[name] == label for name, label in top.items()),
            "unanswered": sum(sample.outcome != "ok" for sample in samples),
        }

    def overload(self, subject: Subject, python: Path) -> None:
        """Multiples of the best rate, at the concurrency that had it, on a fresh server."""
        result = self.data["subjects"][subject.name]
        clients = best_concurrency(result)
        if not clients:
            return
        say(f"overload: {subject.name}")
        found: dict[str, Any] = {"failed": None, "clients": clients, "runs": []}
        self.data["overload"][subject.name] = found
        started = self.servers.started(subject, python, self.images[0], result["failed_starts"])
        try:
            with started as target:
                target.measure(self.images, self.settling)
                found["runs"] = measure_overload(target, self.images, clients, self.args.seconds)
        except StartFailed as exc:
            found["failed"] = str(exc)

    def measure_inprocess(self, number: int) -> None:
        for precision in self.args.precisions:
            if precision in self.broken:
                continue
            say(f"round {number}: inprocess {precision}")
            result = self.data["inprocess"].setdefault(precision, {"failed": None, "runs": []})
            batches = sorted({1, self.servers.batch_size(precision)})
            runs, failed = self.servers.measure_inprocess(
                precision, batches, self.servers.worker_count(precision), self.args.seconds
            )
            if failed:
                result["failed"] = failed
                say(f"  failed: {failed}")
            result["runs"] += [{"round": number, **run} for run in runs]
            self.save()

    def save(self) -> None:
        """Keep what has been measured so far."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / report.JSON_FILE).write_text(json.dumps(self.data, indent=1) + "\n")


def _trouble(run: Measurement) -> str:
    parts = [f"{count} x {kind}" for kind, count in run.failures.items()]
    if run.refused:
        parts.append(f"{run.refused} refused")
    return f"  ({', '.join(parts)})" if parts else ""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Measure the service, its peers and the limits of this machine."
    parser = make_parser("run", description, "mobilenet_v2", FOLDER)
    add = parser.add_argument
    add(
        "--precisions",
        default=f"{AUTO},int8",
        help=f"of ours; {AUTO} is what the service takes here without int8; peers that use our "
        "engine, and the gateway, have the first",
    )
    add("--calibration", type=absolute, metavar="DIR", help="passed on for int8")
    add("--only", metavar="NAME,…", help="some subjects; --list names them")
    add("--list", action="store_true", help="name the subjects and end")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--warmup-seconds", type=float, default=3, help="after each start")
    add("--rounds", type=int, default=3)
    add("--seed", type=int, default=0, help="of the order of the subjects")
    add("--from-json", action="store_true", help="only draw the report again")
    args = parser.parse_args(argv)
    if args.from_json:
        return args
    names = [chosen_precision() if name == AUTO else name for name in args.precisions.split(",")]
    args.precisions = list(dict.fromkeys(names))
    args.names = [s.name for s in all_subjects(args.model, dict.fromkeys(args.precisions, ()))]
    args.names.append(INPROCESS)
    if args.only is not None:
        args.only = args.only.split(",")
        unknown = set(args.only) - set(args.names)
        if unknown:
            parser.error(f"no subject {', '.join(sorted(unknown))}; --list names them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.from_json:
        data = json.loads((args.out / report.JSON_FILE).read_text("utf-8"))
        report.write(data, args.out)
        return 0
    if args.list:
        print("\n".join(args.names))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    precision, workers = args.precisions[0], available_cores()
    with make_servers(args, device="cpu", precision=precision, workers=workers) as servers:
        run = Run(args, servers)
        try:
            run.everything()
        except KeyboardInterrupt:
            print("interrupted; what was measured is kept", file=sys.stderr)
            return 130
        finally:
            run.save()
    report.write(run.data, args.out)
    print(args.out / report.MARKDOWN_FILE)
    failed = [name for name, subject in run.data["subjects"].items() if subject["failed"]]
    for name in failed:
        print(f"failed: {name}: {run.data['subjects'][name]['failed']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

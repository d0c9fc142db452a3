"""Measure the service, its peers and the limits of this machine; write REPORT.md.

One server at a time, each started afresh in every round, the order of each round shuffled with a
fixed seed. A peer that cannot be set up or started is reported as failed, with its reason.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks import report
from benchmarks.environments import SetupFailed, prepare
from benchmarks.images import load_rgb, read_labels
from benchmarks.subjects import PEERS, ROOT, Subject, all_subjects
from handler.machine import available_cores
from service.load.answers import Expectations, read_predictions, without_tensor_header
from service.load.generator import measure
from service.load.images import ImageRequest, as_form, load_images
from service.load.measurement import Load, Measurement
from service.load.processes import Server, free_base_port, memory, running
from service.load.report import machine

FOLDER = Path(__file__).parent
START_SECONDS = 180
START_ATTEMPTS = 3
SETTLE_CLIENTS = 8
INPROCESS = "inprocess"  # no server, and measured beside them
OVERLOAD = 3  # times the best rate
LIBRARIES = ("torch", "torchvision", "torchserve", "openvino", "pillow", "aiohttp")


class StartFailed(Exception):
    """A server did not come to answer rightly; the message says why."""


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
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Run(args, Path(folder))
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


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure the service, its peers and the limits of this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="mobilenet_v2", help="for every subject")
    parser.add_argument("--weights", default="untrained", metavar="untrained|FILE")
    parser.add_argument("--recipe", metavar="ENTRY", help="as for ./scripts/serve")
    parser.add_argument(
        "--precisions", default="fp32,int8", help="of ours; peers use the engine of the first"
    )
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="passed on for int8")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs (None: drawn)")
    parser.add_argument("--only", metavar="NAME,…", help="some subjects; --list names them")
    parser.add_argument("--list", action="store_true", help="name the subjects and end")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--warmup-seconds", type=float, default=3, help="after each start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the subjects")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="for the report")
    parser.add_argument("--from-json", action="store_true", help="only draw the report again")
    args = parser.parse_args(argv)
    args.precisions = args.precisions.split(",")
    args.names = [s.name for s in all_subjects(args.model, dict.fromkeys(args.precisions, ()))]
    args.names.append(INPROCESS)
    if args.only is not None:
        args.only = args.only.split(",")
        unknown = set(args.only) - set(args.names)
        if unknown:
            parser.error(f"no subject {', '.join(sorted(unknown))}; --list names them")
    for name in ("images", "calibration"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.weights != "untrained":
        args.weights = Path(args.weights).resolve()
    return args


class Run:
    """One benchmark: what is to be done, and what has come of it so far (`data`)."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.workers = available_cores()
        self.pictures = load_rgb(args.images)
        self.labels = read_labels(args.images)
        self.options = {name: self._model_options(name) for name in args.precisions}
        every = all_subjects(args.model, self.options)
        self.subjects = [s for s in every if args.only is None or s.name in args.only]
        self.inprocess = args.only is None or INPROCESS in args.only
        self.model_dirs: dict[str, Path] = {}
        self.reference: dict[str, str] = {}
        self.broken: dict[str, str] = {}  # precisions that could not be packaged
        self.data: dict[str, Any] = {
            "conditions": self._conditions(),
            "subjects": {
                s.name: {"what": s.what, "kind": s.kind, "precision": s.precision, "failed": None}
                | {
                    "failed_starts": [],
                    "start_seconds": [],
                    "runs": [],
                    "memory": [],
                    "accuracy": None,
                }
                for s in self.subjects
            },
            "reference": None,
            "inprocess": {},
            "overload": {},
        }

    def _model_options(self, precision: str) -> list[object]:
        args = self.args
        options: list[object] = ["--model", args.model, "--weights", args.weights]
        options += ["--precision", precision, "--device", "cpu", "--workers", self.workers]
        if args.recipe:
            options += ["--recipe", args.recipe]
        if args.calibration and precision == "int8":
            options += ["--calibration", args.calibration]
        return options

    def _conditions(self) -> dict[str, Any]:
        args, pictures = self.args, self.pictures
        weights = args.weights if args.weights == "untrained" else args.weights.name
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip() or None,
            "machine": machine(),
            "versions": {name: _version(name) for name in LIBRARIES},
            "model": args.model,
            "weights": weights,
            "recipe": args.recipe,
            "precisions": args.precisions,
            "workers": self.workers,
            "images": len(pictures),
            "image_bytes": sum(len(p.body) for p in pictures) // len(pictures),
            "images_left_out": len(load_images(args.images)) - len(pictures),
            "drawn": args.images is None,
            "concurrency": args.concurrency,
            "seconds": args.seconds,
            "warmup_seconds": args.warmup_seconds,
            "rounds": args.rounds,
            "seed": args.seed,
        }

    def everything(self) -> None:
        for precision in self.args.precisions:
            self.unpack(precision)
        pythons = {s.name: self.set_up(s) for s in self.subjects}
        self.classify_reference()
        for number in range(1, self.args.rounds + 1):
            order = [s for s in self.subjects if pythons[s.name]]
            random.Random(self.args.seed + number).shuffle(order)  # noqa: S311 no secret
            for subject in order:
                self.round(subject, pythons[subject.name], number)
                self.save()
            if self.inprocess:
                self.measure_inprocess(number)
        for subject in self.subjects:
            if subject.kind == "ours" and self.data["subjects"][subject.name]["runs"]:
                self.overload(subject, pythons[subject.name])
        self.data["conditions"]["finished"] = datetime.now(timezone.utc).isoformat(
            timespec="seconds"
        )

    def unpack(self, precision: str) -> None:
        """Package a precision of ours, and unpack the archive for those who share its engine."""
        say(f"packaging {self.args.model} {precision}")
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "package.py")]
            + [str(word) for word in self.options[precision]],
            env=self.environ(precision),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            self.broken[precision] = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            say(f"  failed: {self.broken[precision]}")
            return
        self.model_dirs[precision] = self.folder / f"model-{precision}"
        with zipfile.ZipFile(self.store(precision) / f"{self.args.model}.mar") as archive:
            archive.extractall(self.model_dirs[precision])

    def classify_reference(self) -> None:
        """The top classes that eager torch in fp32 gives the labelled images."""
        precision = self.args.precisions[0]
        if not self.labels or self.args.weights == "untrained" or precision in self.broken:
            return
        say("classifying the labelled images with the reference")
        done = subprocess.run(
            [sys.executable, str(PEERS / "reference.py"), str(self.args.images)],
            env=self.environ(precision),
            stdout=subprocess.PIPE,
            check=True,
        )
        self.reference = json.loads(done.stdout)
        right = sum(self.labels.get(name) == label for name, label in self.reference.items())
        self.data["reference"] = {"images": len(self.reference), "right": right}

    def store(self, precision: str) -> Path:
        return self.folder / f"store-{precision}"

    def environ(self, precision: str) -> dict[str, str]:
        """No settings of the user's, and no proxy on the way to our own servers."""
        dropped = ("CLASSIFIER_", "TS_", "BENCHMARK_", "PYTHONPATH", "OMP_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(dropped) and not name.lower().endswith("_proxy")
        }
        python_path = [str(ROOT)]
        if precision in self.model_dirs:
            python_path.insert(0, str(self.model_dirs[precision]))
            kept["BENCHMARK_MODEL_DIR"] = str(self.model_dirs[precision])
            kept["BENCHMARK_BATCH_SIZE"] = str(self.batch_size(precision))
        return kept | {
            "PYTHONPATH": ":".join(python_path),
            "BENCHMARK_WORKERS": str(self.workers),
            "TS_MODEL_STORE": str(self.store(precision)),
        }

    def batch_size(self, precision: str) -> int:
        text = (self.model_dirs[precision] / "model-config.yaml").read_text("utf-8")
        return int(yaml.safe_load(text)["batchSize"])

    def set_up(self, subject: Subject) -> Path | None:
        """The Python of a subject; None where there is none, and the reason is kept."""
        precision = subject.precision or self.args.precisions[0]
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

    @contextmanager
    def started(
        self, subject: Subject, python: Path, pictures: Sequence[ImageRequest]
    ) -> Iterator[tuple[Server, str, float]]:
        """The running server once it answers rightly, its URL, and the seconds that took.

        Tried again where it does not come up: some have time limits of a second in them. Raises
        StartFailed when it never does.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            port = free_base_port()
            url = f"http://127.0.0.1:{port}{subject.path}"
            began = time.monotonic()
            with ExitStack() as stack:
                folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=""))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                server = stack.enter_context(self.start(subject, python, port, folder))
                try:
                    wait_until_right(subject, server, url, pictures)
                except StartFailed as exc:
                    if attempt == START_ATTEMPTS:
                        raise
                    self.data["subjects"][subject.name]["failed_starts"].append(str(exc))
                    say(f"  start {attempt} failed: {exc}")
                    continue
                yield server, url, time.monotonic() - began
                return

    def start(
        self, subject: Subject, python: Path, port: int, folder: Path
    ) -> AbstractContextManager[Server]:
        """The started server, in a folder of its own."""
        places = {
            "{python}": python,
            "{bin}": python.parent,
            "{port}": port,
            "{port+1}": port + 1,
            "{port+2}": port + 2,
            "{workers}": self.workers,
            "{libpython}": sysconfig.get_config_var("LIBDIR"),
        }
        environ = self.environ(subject.precision or self.args.precisions[0])
        environ |= {name: _fill(value, places) for name, value in subject.environ.items()}
        if subject.kind == "ours":
            # Started as people start it: with the repository's code, not an unpacked archive's.
            environ["PYTHONPATH"] = str(ROOT)
        else:
            environ.pop("TS_MODEL_STORE")
        environ |= {
            "BENCHMARK_PORT": str(port),
            "PATH": f"{python.parent}:{environ.get('PATH', '')}",
            "TMPDIR": str(folder),
            "TEMP": str(folder),
            "RAY_TMPDIR": str(folder),
            "PYTHONUNBUFFERED": "1",
        }
        command = [_fill(str(word), places) for word in subject.command]
        return running(command, environ, folder)

    def round(self, subject: Subject, python: Path | None, number: int) -> None:
        """Start a subject, check it, measure it at every concurrency, weigh it, end it."""
        assert python is not None  # noqa: S101 for mypy
        result = self.data["subjects"][subject.name]
        if result["failed"]:
            return
        say(f"round {number}: {subject.name}")
        pictures = self.pictures
        if subject.form == "multipart":
            pictures = [as_form([p], [subject.part]) for p in pictures]
        expectations = Expectations()
        try:
            with self.started(subject, python, pictures) as (server, url, seconds):
                result["start_seconds"].append(seconds)
                self.measure(subject, url, pictures, SETTLE_CLIENTS, expectations, settle=True)
                if subject.accuracy and self.reference and result["accuracy"] is None:
                    result["accuracy"] = self.accuracy(subject, url, pictures)
                for clients in self.args.concurrency:
                    run = self.measure(subject, url, pictures, clients, expectations)
                    result["runs"].append({"round": number, **asdict(run)})
                    say(f"  {clients:3} clients {run.throughput_rps:8.1f} req/s{_trouble(run)}")
                result["memory"].append({"round": number, "processes": memory(server)})
        except StartFailed as exc:
            result["failed"] = f"round {number}: {exc}"
            say(f"  failed: {exc}")

    def measure(
        self,
        subject: Subject,
        url: str,
        pictures: Sequence[ImageRequest],
        clients: int,
        expectations: Expectations,
        settle: bool = False,
    ) -> Measurement:
        load = Load(
            concurrency=clients,
            seconds=self.args.warmup_seconds if settle else self.args.seconds,
            warmup_seconds=0.0 if settle else 1.0,
        )
        return asyncio.run(
            measure(url, pictures, load, headers=subject.headers, expectations=expectations)
        )

    def accuracy(
        self, subject: Subject, url: str, pictures: Sequence[ImageRequest]
    ) -> dict[str, int]:
        """How the labelled images are classified, held against labels and reference."""
        labelled = [picture for picture in pictures if picture.name in self.reference]
        answers = asyncio.run(ask_all(url, labelled, subject.headers, 4))
        top = {p.name: label for p, (_, label) in zip(labelled, answers, strict=True)}
        return {
            "images": len(top),
            "right": sum(self.labels[name] == label for name, label in top.items()),
            "as_reference": sum(self.reference[name] == label for name, label in top.items()),
            "unanswered": sum(outcome != "ok" for outcome, _ in answers),
        }

    def overload(self, subject: Subject, python: Path | None) -> None:
        """An open loop at several times the best rate: what is answered, and how fast is a no?"""
        assert python is not None  # noqa: S101 for mypy
        best = report.best_throughput(self.data["subjects"][subject.name])
        say(f"overload: {subject.name} at {OVERLOAD} x {best:.0f} req/s")
        load = Load(rate=OVERLOAD * best, seconds=self.args.seconds, warmup_seconds=2.0)
        try:
            with self.started(subject, python, self.pictures) as (_, url, _):
                self.measure(subject, url, self.pictures, SETTLE_CLIENTS, Expectations(), True)
                run = asyncio.run(measure(url, self.pictures, load))
        except StartFailed as exc:
            self.data["overload"][subject.name] = {"failed": str(exc)}
        else:
            self.data["overload"][subject.name] = {"best_rps": best, **asdict(run)}

    def measure_inprocess(self, number: int) -> None:
        for precision in self.model_dirs:
            say(f"round {number}: inprocess {precision}")
            result = self.data["inprocess"].setdefault(precision, {"failed": None, "runs": []})
            batches = sorted({1, self.batch_size(precision)})
            runs, failed = self.run_inprocess(precision, batches, self.workers)
            if failed:
                result["failed"] = failed
                say(f"  failed: {failed}")
            result["runs"] += [{"round": number, **run} for run in runs]
            self.save()

    def run_inprocess(
        self, precision: str, batches: Sequence[int], processes: int
    ) -> tuple[list[dict[str, Any]], str | None]:
        """What peers/inprocess.py measures, and what it said where it failed."""
        command = [sys.executable, PEERS / "inprocess.py", "--processes", processes]
        command += ["--seconds", self.args.seconds, "--batches", *batches]
        if self.args.images:
            command += ["--images", self.args.images]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        environ = self.environ(precision) | {"OMP_NUM_THREADS": "1"}
        with running(command, environ, folder) as process:
            process.process.wait()
            lines = [line for line in process.log.read_text().splitlines() if line[:1] == "{"]
            runs = [json.loads(line) for line in lines if '"images_per_second"' in line]
            failed = process.process.returncode != 0 or not runs
            return runs, process.last_lines() if failed else None

    def save(self) -> None:
        """Keep what has been measured so far."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / report.JSON_FILE).write_text(json.dumps(self.data, indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:  # PackageNotFoundError
        return None


def _fill(text: str, places: Mapping[str, object]) -> str:
    return re.sub(r"\{[a-z0-9+]+\}", lambda match: str(places[match[0]]), text)


def _trouble(run: Measurement) -> str:
    parts = [f"{count} x {kind}" for kind, count in run.failures.items()]
    if run.refused:
        parts.append(f"{run.refused} refused")
    return f"  ({', '.join(parts)})" if parts else ""


def say(text: str) -> None:
    print(text, flush=True)


def wait_until_right(
    subject: Subject, server: Server, url: str, pictures: Sequence[ImageRequest]
) -> None:
    """Return when the banner is out and an image is answered rightly. Raises StartFailed."""
    deadline = time.monotonic() + START_SECONDS
    answer = "no answer"
    while time.monotonic() < deadline:
        if server.has_ended():
            raise StartFailed(
                f"ended with status {server.process.returncode}: {server.last_lines()}"
            )
        if subject.banner is None or subject.banner in server.log.read_text("utf-8", "replace"):
            outcome, _ = asyncio.run(ask_all(url, pictures[:1], subject.headers, 1))[0]
            if outcome == "ok":
                return
            answer = outcome
        time.sleep(0.5)
    raise StartFailed(f"no right answer in {START_SECONDS} s ({answer}): {server.last_lines()}")


async def ask_all(
    url: str, pictures: Sequence[ImageRequest], headers: Mapping[str, str], clients: int
) -> list[tuple[str, str]]:
    """Each picture once: ("ok", top class) or what went wrong and ""."""
    waiting = iter(enumerate(pictures))
    answers = [("unanswered", "")] * len(pictures)

    async def client(session: aiohttp.ClientSession) -> None:
        for index, picture in waiting:
            try:
                async with session.post(
                    url, data=picture.body, headers={"Content-Type": picture.content_type}
                ) as response:
                    content = without_tensor_header(await response.read(), response.headers)
                if response.status != 200:
                    answers[index] = (f"HTTP {response.status}", "")
                    continue
                predictions = read_predictions(json.loads(content))
                problem = Expectations().problem(picture.name, predictions)
                answers[index] = (problem or "ok", predictions[0][0] if predictions else "")
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as exc:
                answers[index] = (type(exc).__name__, "")

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, trust_env=False) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return answers


if __name__ == "__main__":
    sys.exit(main())

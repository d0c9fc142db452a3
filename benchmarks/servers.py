"""The servers of a benchmark: their archives, packaged, and each of them, until it answers."""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environments import SetupFailed
from benchmarks.subjects import PEERS, ROOT, Subject
from benchmarks.usage import Meter
from service.load.answers import Expectations
from service.load.generator import measure, send_once
from service.load.images import ImageRequest
from service.load.measurement import Load, Measurement
from service.load.processes import Server, free_base_port, running
from service.processes import wait_until
from service.tables import text_table

START_SECONDS = 180
START_ATTEMPTS = 3
ANSWER_SECONDS = 30
DROPPED = (
    "CLASSIFIER_",
    "GATEWAY_",
    "TS_",
    "BENCHMARK_",
    "PYTHONPATH",
    "OMP_",
)  # settings of the user's


class StartFailed(Exception):
    """A server did not come to answer rightly; the message says why."""


@dataclass(frozen=True)
class Started:
    """A server that answers rightly."""

    server: Server
    url: str
    direct_url: str  # of the same service without its gateway; "" if it has none
    seconds: float  # until it did so
    headers: Mapping[str, str]
    expectations: Expectations = field(default_factory=Expectations)

    def measure(
        self, images: Sequence[ImageRequest], load: Load, meter: Meter | None = None
    ) -> Measurement:
        """`meter` is read at the begin and at the end of the measured seconds."""
        measuring = measure(
            self.url,
            images,
            load,
            headers=self.headers,
            expectations=self.expectations,
            mark=meter.read if meter else lambda: None,
        )
        return asyncio.run(measuring)


@dataclass(frozen=True, kw_only=True)
class Servers:
    """What all servers of a benchmark have in common."""

    folder: Path  # takes the archives, and what servers write
    model: str
    weights: str | Path  # "untrained" or a file
    recipe: str | None
    calibration: Path | None
    device: str
    precision: str  # of the subjects that do not name one
    workers: int | None  # None: as many as ours takes by itself
    images: Path | None  # a folder of JPEGs; None: drawn ones

    def model_options(self, precision: str) -> list[object]:
        """The options of ./scripts/serve and ./scripts/package."""
        options: list[object] = ["--model", self.model, "--weights", self.weights]
        options += ["--precision", precision, "--device", self.device]
        if self.workers:
            options += ["--workers", self.workers]
        if self.recipe:
            options += ["--recipe", self.recipe]
        if self.calibration and precision == "int8":
            options += ["--calibration", self.calibration]
        return options

    def package(self, precision: str) -> None:
        """Package the model, and unpack it for the subjects that share its engine.

        Raises SetupFailed.
        """
        say(f"packaging {self.model} {precision}")
        command = [sys.executable, ROOT / "scripts" / "package.py", *self.model_options(precision)]
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environ(precision),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SetupFailed((done.stderr.strip().splitlines() or ["no reason"])[-1])
        with zipfile.ZipFile(self._store(precision) / f"{self.model}.mar") as archive:
            archive.extractall(self.model_dir(precision))

    def model_dir(self, precision: str) -> Path:
        """The unpacked archive; it is missing if packaging failed."""
        return self.folder / f"model-{precision}"

    def _store(self, precision: str) -> Path:
        return self.folder / f"store-{precision}"

    def batch_size(self, precision: str) -> int:
        return int(self._config(precision)["batchSize"])

    def worker_count(self, precision: str) -> int:
        return self.workers or int(self._config(precision)["minWorkers"])

    def _config(self, precision: str) -> Mapping[str, Any]:
        text = (self.model_dir(precision) / "model-config.yaml").read_text("utf-8")
        return dict(yaml.safe_load(text))

    def environ(self, precision: str) -> dict[str, str]:
        """No settings of the user's, and no proxy on the way to our own servers."""
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(DROPPED) and not name.lower().endswith("_proxy")
        }
        python_path = [ROOT]
        model_dir = self.model_dir(precision)
        if model_dir.exists():
            python_path.insert(0, model_dir)
            environ["BENCHMARK_MODEL_DIR"] = str(model_dir)
            environ["BENCHMARK_BATCH_SIZE"] = str(self.batch_size(precision))
            environ["BENCHMARK_WORKERS"] = str(self.worker_count(precision))
        return environ | {
            "PYTHONPATH": ":".join(map(str, python_path)),
            "TS_MODEL_STORE": str(self._store(precision)),
        }

    @contextmanager
    def started(
        self, subject: Subject, python: Path, image: ImageRequest, failed_starts: list[str]
    ) -> Iterator[Started]:
        """The running server, once it answers an image rightly.

        A start that fails is tried again, because some servers have time limits of a second in
        them; its reason is added to `failed_starts`. Raises StartFailed if none succeeds.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            port = free_base_port()
            url = f"http://127.0.0.1:{port}{subject.path}"
            began = time.monotonic()
            with ExitStack() as stack:
                folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=""))
                for path in (self.folder, folder):
                    path.chmod(0o711)  # nginx's workers are nobody's if we are root
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                server = stack.enter_context(self._start(subject, python, port, folder))
                try:
                    wait_until_right(subject, server, url, image)
                except StartFailed as exc:
                    if attempt == START_ATTEMPTS:
                        raise
                    failed_starts.append(str(exc))
                    say(f"  start {attempt} failed: {exc}")
                    continue
                direct = subject.direct_port.format_map(ports(port))
                direct_url = f"http://127.0.0.1:{direct}{subject.path}" if direct else ""
                seconds = time.monotonic() - began
                yield Started(server, url, direct_url, seconds, subject.headers)
                return

    def _start(
        self, subject: Subject, python: Path, port: int, folder: Path
    ) -> AbstractContextManager[Server]:
        """The started server, in a folder of its own."""
        precision = subject.precision or self.precision
        places = {
            "python": python,
            "bin": python.parent,
            **ports(port),
            "workers": self.worker_count(precision),
            "libpython": sysconfig.get_config_var("LIBDIR"),
        }
        environ = self.environ(precision)
        environ |= {name: value.format_map(places) for name, value in subject.environ.items()}
        if subject.is_ours:
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
        command = [str(word).format_map(places) for word in subject.command]
        return running(command, environ, folder)

    def measure_inprocess(
        self, precision: str, batches: Sequence[int], processes: int, seconds: float
    ) -> tuple[list[dict[str, Any]], str | None]:
        """What peers/inprocess.py measures, and what it said if it failed."""
        command: list[object] = [sys.executable, PEERS / "inprocess.py", "--processes", processes]
        command += ["--one-request", "--seconds", seconds, "--batches", *batches]
        if self.images:
            command += ["--images", self.images]
        environ = self.environ(precision) | {"OMP_NUM_THREADS": "1"}
        with running(command, environ, Path(tempfile.mkdtemp(dir=self.folder))) as process:
            process.process.wait()
            lines = [line for line in process.log.read_text().splitlines() if line[:1] == "{"]
            runs = [json.loads(line) for line in lines if '"images_per_second"' in line]
            failed = process.process.returncode != 0 or not runs
            return runs, process.last_lines() if failed else None


@contextmanager
def make_servers(
    args: argparse.Namespace, *, device: str, precision: str, workers: int | None
) -> Iterator[Servers]:
    """The servers of a benchmark with the options of make_parser, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Servers(
            folder=Path(folder),
            model=args.model,
            weights=args.weights,
            recipe=args.recipe,
            calibration=getattr(args, "calibration", None),
            device=device,
            precision=precision,
            workers=workers,
            images=args.images,
        )


def make_parser(
    name: str, description: str, model: str, out: Path | None = None
) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of servers has; `out`: it writes there."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=model)
    parser.add_argument(
        "--weights",
        type=lambda text: text if text == "untrained" else Path(text).resolve(),
        default="untrained",
        metavar="untrained|FILE",
    )
    parser.add_argument("--recipe", metavar="ENTRY", help="as for ./scripts/serve")
    parser.add_argument("--images", type=absolute, metavar="DIR", help="JPEGs (None: drawn)")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    if out:
        parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="for the report")
    return parser


def ports(port: int) -> dict[str, int]:
    """What "{port}" to "{port+3}" stand for."""
    return {"port": port} | {f"port+{offset}": port + offset for offset in (1, 2, 3)}


def absolute(text: str) -> Path:
    """An argparse type: servers run in other folders."""
    return Path(text).resolve()


def wait_until_right(subject: Subject, server: Server, url: str, image: ImageRequest) -> None:
    """Return when the server answers an image rightly. Raises StartFailed."""
    outcome = "no answer"

    def is_over() -> bool:
        nonlocal outcome
        if not subject.is_ours or server.events("ready"):
            sending = send_once(
                url, [image], headers=subject.headers, timeout_seconds=ANSWER_SECONDS
            )
            outcome = asyncio.run(sending)[0].outcome
        return outcome == "ok" or server.has_ended()

    wait_until(is_over, START_SECONDS, 0.5)
    if outcome != "ok":
        reason = f"no right answer in {START_SECONDS} s ({outcome})"
        if server.has_ended():
            reason = f"ended with status {server.process.returncode}"
        raise StartFailed(f"{reason}: {server.last_lines()}")


def say(text: str) -> None:
    print(text, flush=True)


def show(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], digits: int = 1) -> None:
    """Print some columns as a table."""
    cells = [[row[name] for name in columns] for row in rows]
    say("\n".join(text_table(columns, cells, digits=digits)) + "\n")

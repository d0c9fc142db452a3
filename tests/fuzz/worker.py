"""Fuzzes one target in this process: by atheris, or by blind mutations where there is none.

    python -m tests.fuzz.worker TARGET EXECUTIONS SECONDS SEED FOLDER

FOLDER gets each input that fails, and beside it a .txt with the traceback. What is printed last has
libFuzzer's form in both cases. A crash, or a hang that only a signal can end, leaves its input too.
"""

import mmap
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from tests.fuzz.target import Target, digest, load, regressions

try:
    import atheris
except ImportError:  # it has wheels for few platforms
    atheris = None

# Whose branches guide the mutations: our code, and the parsers in Python behind it.
INSTRUMENTED = ["handler", "service", "multipart", "PIL"]
HANG_SECONDS = 30  # of the wall clock: the machine may be busy
MEMORY_MB = 3072  # resident, and of one allocation
CURRENT = "current"  # the file with the input that is being tried, without atheris
HEADER = 4  # bytes of its length


class Recorder:
    """Tries inputs, and keeps those that fail: one for each place that an error comes from."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._places: set[tuple[str, str, int]] = set()

    def __call__(self, data: bytes) -> None:
        started = time.process_time()
        try:
            self._target.check(data)
            seconds = time.process_time() - started
            if seconds > self._target.cpu_seconds:
                raise TimeoutError(f"{seconds:.1f} s of CPU time")
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = (type(error).__name__, frame.filename, frame.lineno or 0)
            if place not in self._places:
                self._places.add(place)
                path = self._folder / digest(data)
                path.write_bytes(data)
                path.with_suffix(".txt").write_text(traceback.format_exc()[-8000:], "utf-8")


def mutate(data: bytes, target: Target, rng: random.Random) -> bytes:
    """One to four small changes: bits, bytes, blocks, the target's words."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        end = min(len(changed), at + rng.randint(1, 16))
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            del changed[at:end]
        elif kind == 4:
            changed[at:at] = changed[at:end] * rng.randint(1, 4)
        elif target.tokens:
            changed[at:at] = rng.choice(target.tokens)
    return repaired(bytes(changed[: target.max_bytes]), target, rng)


def repaired(data: bytes, target: Target, rng: random.Random) -> bytes:
    return target.repair(data) if target.repair and rng.random() < 0.5 else data


def run_blindly(
    name: str, target: Target, tried: Recorder, executions: int, seconds: int, seed: int
) -> None:
    """Mutate the seeds without knowing which branches they reach."""
    rng = random.Random(seed)
    corpus = corpus_of(name, target)
    started, done = time.monotonic(), 0
    with open_current(tried) as current:

        def stop(*_: object) -> None:
            raise TimeoutError(f"{HANG_SECONDS} s")

        signal.signal(signal.SIGALRM, stop)
        limit_memory()
        while done < executions and (not seconds or time.monotonic() - started < seconds):
            first = corpus[done] if done < len(corpus) else None
            data = mutate(rng.choice(corpus), target, rng) if first is None else first
            current[: HEADER + len(data)] = len(data).to_bytes(HEADER, "little") + data
            signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
            tried(data)
            signal.setitimer(signal.ITIMER_REAL, 0)
            done += 1
    print(f"stat::number_of_executed_units: {done}", file=sys.stderr)


def open_current(tried: Recorder) -> mmap.mmap:
    """Memory that outlives the process, for the input that it may die of."""
    with (tried._folder / CURRENT).open("w+b") as file:
        file.truncate(2**20)
        return mmap.mmap(file.fileno(), 2**20)


def limit_memory() -> None:
    """Allocations beyond the limit fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_MB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def run_guided(
    name: str, target: Target, tried: Recorder, executions: int, seconds: int, seed: int
) -> None:
    """Hand over to libFuzzer, which ends the process."""
    folder = tried._folder / "corpus"
    folder.mkdir()
    for data in corpus_of(name, target):
        (folder / digest(data)).write_bytes(data)
    words = tried._folder / "words"
    words.write_text("".join(f'"{escaped(word)}"\n' for word in target.tokens))
    arguments = {
        "runs": executions,
        "max_total_time": seconds,
        "seed": seed or 1,  # 0 would be drawn
        "max_len": target.max_bytes,
        "timeout": HANG_SECONDS,
        "rss_limit_mb": MEMORY_MB,
        "dict": words,
        "artifact_prefix": f"{tried._folder}/",
        "print_final_stats": 1,
    }
    options: dict[str, Any] = {}
    if target.repair:

        def mutator(data: bytes, most: int, drawn: int) -> bytes:
            return repaired(atheris.Mutate(data, most), target, random.Random(drawn))[:most]

        options["custom_mutator"] = mutator
    for owner, function in target.guides:
        setattr(owner, function, atheris.instrument_func(getattr(owner, function)))
    listed = [f"-{key}={value}" for key, value in arguments.items()]
    atheris.Setup([name, *listed, str(folder)], tried, **options)
    atheris.Fuzz()


def corpus_of(name: str, target: Target) -> list[bytes]:
    return [b"", *target.seeds(), *(path.read_bytes() for path in regressions(name))]


def escaped(word: bytes) -> str:
    """As libFuzzer reads it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


def main(argv: list[str]) -> int:
    name, executions, seconds, seed, folder = argv
    instrumented = atheris.instrument_imports(INSTRUMENTED) if atheris else nullcontext()
    with instrumented:
        target = load(name)
        with suppress(Exception):  # what is imported and set up at first use counts for no input
            target.check(target.seeds()[0])
    tried = Recorder(target, Path(folder))
    run: Callable[..., None] = run_guided if atheris else run_blindly
    run(name, target, tried, int(executions), int(seconds), int(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

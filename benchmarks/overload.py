"""More requests than a server can answer, and the seconds afterwards.

A closed loop finds the best rate, an open loop sends a multiple of it by the clock, and another
closed loop begins at the moment at which that ends, while its last requests are still in flight.
`python -m benchmarks.overload` does this to the service behind its gateway; benchmarks.run, to all.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

from benchmarks.alone import started_alone
from benchmarks.environments import SetupFailed
from benchmarks.servers import Started, StartFailed, make_parser, say
from service.load.generator import REFUSALS, TIMEOUT_SECONDS, Generator, Reply, cpu_percent
from service.load.images import ImageRequest
from service.load.measurement import Load, Sample, summarise
from service.load.wire import Wire

TIMES = (3, 10)  # the best rate
CLIENTS = 8  # of the closed loops
IN_TIME = 2.0  # seconds until full speed
WARMUP_SECONDS = 1.0
RECOVERY_SECONDS = 4.0
PAUSE_SECONDS = 0.1  # of a refused client afterwards: it does not go on with the overload
SLICE_SECONDS = 0.25
WINDOW_SECONDS = 1.0  # the rate in which full speed shows
FULL = 0.95  # of the best rate


def measure_overload(
    target: Started, images: Sequence[ImageRequest], clients: int, seconds: float
) -> list[dict[str, Any]]:
    """For each of TIMES: the Measurement as a dict, the best rate before, and what came after."""
    rows = []
    for times in TIMES:
        best = asyncio.run(_best(target, images, clients, seconds))
        row = asyncio.run(_overload(target, images, clients, seconds, times, best["best_rps"]))
        rows.append({"times": times} | best | row)
    return rows


async def _best(
    target: Started, images: Sequence[ImageRequest], clients: int, seconds: float
) -> dict[str, float]:
    wire = Wire(target.url, TIMEOUT_SECONDS)
    generator = Generator(wire.post, cycle(images), target.expectations)
    load = Load(concurrency=clients, seconds=seconds, warmup_seconds=WARMUP_SECONDS)
    begin = time.perf_counter() + WARMUP_SECONDS
    cpu = asyncio.create_task(cpu_percent(begin, begin + seconds))
    await generator.closed_loop(clients, begin + seconds)
    run = summarise(generator.samples, begin, begin + seconds, load, await cpu)
    wire.close()
    return {"best_rps": run.throughput_rps, "best_generator_cpu_percent": run.generator_cpu_percent}


async def _overload(
    target: Started,
    images: Sequence[ImageRequest],
    clients: int,
    seconds: float,
    times: int,
    best: float,
) -> dict[str, Any]:
    wire = Wire(target.url, TIMEOUT_SECONDS)
    pictures = cycle(images)
    flood = Generator(wire.post, pictures, target.expectations)
    load = Load(rate=times * best, seconds=seconds, warmup_seconds=WARMUP_SECONDS)
    start = time.perf_counter()
    begin, end = start + WARMUP_SECONDS, start + WARMUP_SECONDS + seconds

    async def patient(image: ImageRequest) -> Reply:
        reply = await wire.post(image)
        if reply[0] in REFUSALS:
            await asyncio.sleep(PAUSE_SECONDS)
        return reply

    after = Generator(patient, pictures, target.expectations)

    async def recover() -> None:
        await asyncio.sleep(end - time.perf_counter())
        await after.closed_loop(clients, end + RECOVERY_SECONDS)

    cpu = asyncio.create_task(cpu_percent(begin, end))
    await asyncio.gather(flood.open_loop(load.rate, start, end), recover())
    run = summarise(flood.samples, begin, end, load, await cpu)
    wire.close()
    rates = slice_rates(flood.samples + after.samples, end)
    failed = sum(sample.outcome not in ("ok", "refused") for sample in after.samples)
    return asdict(run) | {
        "after_rps": rates,
        "after_failed": failed,
        "full_speed_seconds": full_speed_seconds(rates, best),
    }


def slice_rates(samples: Sequence[Sample], end: float) -> list[float]:
    """Good answers a second in each slice after `end`."""
    counts = [0] * round(RECOVERY_SECONDS / SLICE_SECONDS)
    for sample in samples:
        index = (sample.ended - end) / SLICE_SECONDS
        if sample.outcome == "ok" and 0 <= index < len(counts):
            counts[int(index)] += 1
    return [count / SLICE_SECONDS for count in counts]


def full_speed_seconds(rates: Sequence[float], best: float) -> float | None:
    """When the first WINDOW_SECONDS with FULL of the best rate begin; None: never."""
    width = round(WINDOW_SECONDS / SLICE_SECONDS)
    for index in range(len(rates) - width + 1):
        if sum(rates[index : index + width]) / width >= FULL * best:
            return index * SLICE_SECONDS
    return None


def main(argv: Sequence[str] | None = None) -> int:
    description = "Send a gateway 3 and 10 times what it can answer, and see it recover."
    parser = make_parser("overload", description, "mobilenet_v2")
    parser.set_defaults(seconds=60)
    args = parser.parse_args(argv)
    try:
        with started_alone(args) as alone:
            rows = measure_overload(alone.target, alone.images, CLIENTS, args.seconds)
    except (SetupFailed, StartFailed) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    for row in rows:
        say(
            f"{row['times']} times {row['best_rps']:.0f} requests/s for {args.seconds:.0f} s: "
            f"{row['throughput_rps']:.0f}/s answered, {row['refused']} refused "
            f"(p99 {row['refused_p99_ms']:.0f} ms), {row['failed']} failed, "
            f"full speed after {row['full_speed_seconds']} s"
        )
    say(json.dumps(rows))
    return 0 if all(is_good(row) for row in rows) else 1


def is_good(row: Mapping[str, Any]) -> bool:
    """Whether nothing failed, and full speed was there again in time."""
    after = row["full_speed_seconds"]
    return not row["failed"] and not row["after_failed"] and after is not None and after <= IN_TIME


if __name__ == "__main__":
    sys.exit(main())

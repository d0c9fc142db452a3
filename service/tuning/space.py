"""The configurations that can be tried for a model on this machine."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from handler.engines import MAX_FORWARD, find_hardware
from handler.errors import InvalidSettings
from handler.machine import available_cores
from handler.selection import Hardware, select
from handler.settings import Settings
from service.options import ModelOptions
from service.plan import plan_package
from service.torchserve.config import ServerConfig
from service.tuning.search import Axis, Configuration

CANDIDATES = (  # engines and precisions, the likely winner first
    *(("cuda", precision) for precision in ("fp16", "bf16", "fp32")),
    *(("openvino", precision) for precision in ("bf16", "fp32", "int8")),
    ("torch", "fp32"),
)
# On a CPU, and on a GPU: there small batches waste it, and 0 ms would make them small.
BATCH_SIZES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (4, 8, 16, 32, 64)}
FORWARDS = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (8, 16, 32, 64)}
DELAYS_MS = {"cpu": (0, 1, 2, 5, 10), "cuda": (1, 2, 5, 10)}
WORKERS_PER_GPU = (1, 2, 4, 8)


@dataclass(frozen=True)
class SearchSpace:
    """Where the search starts, and what it varies from there."""

    start: Configuration  # what is served without tuning
    engines: list[tuple[str, str]]
    axes: list[Axis]


def possible_engines(device: str, calibrated: bool, hardware: Hardware) -> list[tuple[str, str]]:
    """The engines and precisions that run here, as (engine, precision)."""
    found = []
    for engine, precision in CANDIDATES:
        settings = Settings(device=device, engine=engine, precision=precision)
        with suppress(InvalidSettings):  # it does not run here
            select(settings, hardware, converted=True, int8=calibrated)
            found.append((engine, precision))
    return found


def find_space(options: ModelOptions, device: str, server: ServerConfig) -> SearchSpace:
    """What can be tried for a model. Raises InvalidSettings if that is nothing."""
    engines = possible_engines(device, bool(options.calibration), find_hardware())
    if options.precision != "auto":
        engines = [pair for pair in engines if pair[1] == options.precision]
    if not engines:
        raise InvalidSettings(f"no engine runs in {options.precision} here")
    plan = plan_package(options.models[0], options, server)
    config, settings = plan.config, plan.settings
    cores, workers = available_cores(), config["minWorkers"]
    given = {
        name: getattr(options, name)
        for name in ("workers", "batch_size", "max_batch_delay_ms")
        if getattr(options, name) is not None
    }
    if options.workers_per_gpu:
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
    gpus = len(config.get("deviceIds", range(server.usable_gpus()))) if device == "cuda" else 0
    return SearchSpace(start, engines, make_axes(engines, cores, gpus, given))


def make_axes(
    engines: Sequence[tuple[str, str]], cores: int, gpus: int, given: dict[str, int]
) -> list[Axis]:
    """What is varied, the most important axis first; what the user has `given` is kept.

    Not where JPEGs are decoded: that of the GPU is taken if it gives the same pixels.
    """
    device = "cuda" if gpus else "cpu"

    def engine(best: Configuration) -> list[Configuration]:
        return [replace(best, engine=name, precision=precision) for name, precision in engines]

    def workers(best: Configuration) -> list[Configuration]:
        # Half of a worker's share of the cores is tried as well: the frontend needs some, too.
        counts = {count for power in range(11) if (count := 2**power) < cores} | {cores}
        if gpus:
            counts = {gpus * count for count in WORKERS_PER_GPU}
        if "workers" in given:
            counts = {given["workers"]}
        shares = [
            (count, threads)
            for count in sorted(counts)
            for threads in sorted({max(1, cores // count), max(1, cores // count // 2)})
        ]
        return [replace(best, workers=count, threads=threads) for count, threads in shares]

    def batch(best: Configuration) -> list[Configuration]:
        sizes = [given["batch_size"]] if "batch_size" in given else BATCH_SIZES[device]
        return [
            replace(best, batch_size=size, max_forward=min(best.max_forward, size))
            for size in sizes
        ]

    def delay(best: Configuration) -> list[Configuration]:
        if best.batch_size == 1 or "max_batch_delay_ms" in given:
            return []
        return [replace(best, max_batch_delay_ms=ms) for ms in DELAYS_MS[device]]

    def forward(best: Configuration) -> list[Configuration]:
        return [replace(best, max_forward=n) for n in FORWARDS[device] if n <= best.batch_size]

    return [engine, workers, batch, forward, delay]

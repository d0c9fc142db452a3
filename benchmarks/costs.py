"""The report's tables of CPU time and memory."""

from collections.abc import Sequence
from math import hypot, inf
from statistics import median

from benchmarks.figures import Data, measured, spread, values
from benchmarks.usage import KINDS
from service.tables import markdown_table

SHOWN_MS, SHOWN_MIB = 0.005, 0.5  # less is left out
TORCHSERVE_PART = "Java: rest"  # which every TorchServe has


def cpu_time(data: Data) -> list[str]:
    """CPU time a request of every server, and of those with TorchServe by part."""
    clients = data["conditions"]["concurrency"]
    servers = measured(data, "ours", "gateway", "peer", "limit")
    rows = [
        [name, *(spread(values(subject, count, "cpu_ms"), 2) for count in clients)]
        for name, subject in servers.items()
    ]
    if not rows:
        return []
    heads = [f"{count} client{'s' if count > 1 else ''}" for count in clients]
    lines = markdown_table(["server", *heads], rows)
    lines += ["", "Milliseconds of all processes of a server for each good answer."]
    by_part = []
    for name, subject in servers.items():
        parts = sorted(
            {
                part
                for run in subject["runs"]
                for part, ms in run["cpu_ms"].items()
                if ms >= SHOWN_MS
            }
        )
        if TORCHSERVE_PART in parts:
            by_part += [[name, part, *_of_part(subject, part, clients)] for part in parts]
    if by_part:
        legend = (
            "The same by part. Java's threads are told apart by their names: compilers of byte "
            "code, Netty's event loops, a thread for each worker, and those that read the workers' "
            "log lines and metrics."
        )
        lines += ["", legend, "", *markdown_table(["server", "part", *heads], by_part, left=(0, 1))]
    return lines


def _of_part(subject: Data, part: str, clients: Sequence[int]) -> list[str]:
    cells = []
    for count in clients:
        runs = [run["cpu_ms"] for run in subject["runs"] if run["concurrency"] == count]
        cells.append(spread([run[part] for run in runs if part in run], 2))
    return cells


def pairs(data: Data) -> list[str]:
    """What gateway, metrics and logs cost, from loads that took turns on one server."""
    rows = []
    for name, subject in measured(data, "ours", "gateway").items():
        for count in sorted({pair["clients"] for pair in subject["pairs"]}):
            found = [pair for pair in subject["pairs"] if pair["clients"] == count]
            what = "the gateway" if subject["kind"] == "gateway" else "metrics and logs"
            cells = [
                spread([cost for pair in found if (cost := of_pair(pair)) is not None], digits)
                for of_pair, digits in ((rate_cost, 1), (cpu_cost, 1), (p50_cost, 2))
            ]
            error = sum(rate_error(pair) ** 2 for pair in found) ** 0.5 / len(found)
            failed = sum(pair[side]["failed"] for pair in found for side in ("with", "without"))
            rows.append([what, name, count, cells[0], f"{error:.1f}", *cells[1:], failed])
    if not rows:
        return []
    headings = ["what", "server", "clients", "rate, %", "±", "CPU, %", "p50, ms"]
    headings.append("failed or refused")
    legend = (
        "How much lower the rate is with it, and how much higher CPU time a request and p50 are. "
        "The loads with and without it took turns on one running server, in 16 short slices each; "
        "± is the standard error of the rate's mean, as the slices differ among themselves. "
        "Without the gateway: requests straight to TorchServe beside it. Without metrics and logs: "
        "requests marked as health checks (`X-Probe: 1`), which the handler neither counts nor "
        "logs; TorchServe's own metrics remain."
    )
    return [*markdown_table(headings, rows, left=(0, 1)), "", legend]


def rate_cost(pair: Data) -> float | None:
    """Percent of the rate that is lost with it."""
    loaded, bare = pair["with"]["throughput_rps"], pair["without"]["throughput_rps"]
    return 100 * (1 - loaded / bare) if bare else None


def rate_error(pair: Data) -> float:
    """Standard error of `rate_cost`, in the same percent."""
    parts = [pair[side] for side in ("with", "without")]
    if not all(side["throughput_rps"] for side in parts):
        return inf
    return 100 * hypot(*(side["standard_error_rps"] / side["throughput_rps"] for side in parts))


def cpu_cost(pair: Data) -> float | None:
    """Percent of CPU time a request that it adds."""
    loaded, bare = pair["with"]["cpu_ms"], pair["without"]["cpu_ms"]
    return 100 * (loaded / bare - 1) if loaded and bare else None


def p50_cost(pair: Data) -> float | None:
    """Milliseconds that it adds to p50."""
    loaded, bare = pair["with"]["p50_ms"], pair["without"]["p50_ms"]
    return float(loaded - bare) if loaded and bare else None


def memory(data: Data) -> list[str]:
    """PSS of every server, and what that of ours is made of."""
    rows = []
    for name, subject in measured(data, "ours", "gateway", "peer", "limit").items():
        weighed = subject["memory"]
        if weighed:
            sizes = [sum(p["pss_mib"] for p in found["processes"]) for found in weighed]
            count = median(len(found["processes"]) for found in weighed)
            rows.append([name, spread(sizes, 0), f"{count:.0f}"])
    lines = markdown_table(["server", "MiB in all", "processes"], rows, digits=0) if rows else []
    for name, subject in measured(data, "ours", "gateway").items():
        if subject["memory"]:
            lines += ["", f"**{name}**, in the last round:", ""]
            cells = [
                [p["process"], p["pss_mib"], *(p["kinds_mib"].get(kind, 0.0) for kind in KINDS)]
                for p in subject["memory"][-1]["processes"]
                if p["pss_mib"] >= SHOWN_MIB
            ]
            lines += markdown_table(["process", "MiB", *KINDS], cells, digits=0)
    if lines:
        lines += [
            "",
            "Proportional set size: a page that processes share is divided among them. Anonymous: "
            "heaps, stacks and whatever else is in no file. torch, OpenVINO: their libraries. "
            "Weights: the model's files, as far as they are mapped and not copied into a heap.",
        ]
    return lines


def mib_of(found: Data, parts: Sequence[str]) -> float:
    """PSS of some parts of a server in one weighing."""
    return float(sum(p["pss_mib"] for p in found["processes"] if p["process"] in parts))

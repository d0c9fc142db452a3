"""REPORT.md and its plots, from report.json and nothing else."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.bars import BASELINE, answered, bars, right_peers
from benchmarks.costs import cpu_time, memory, pairs
from benchmarks.figures import (
    Data,
    best_throughput,
    concurrencies,
    inprocess_best,
    measured,
    median_of,
    spread,
    values,
)
from benchmarks.overload import SLICE_SECONDS
from benchmarks.plots import plot_latency, plot_throughput
from service.tables import Row, markdown_table

JSON_FILE = "report.json"
MARKDOWN_FILE = "REPORT.md"
THROUGHPUT_PLOT = "throughput.png"
LATENCY_PLOT = "latency.png"
EMPTY = "empty"

INTRODUCTION = """\
# Benchmark

Written by `python -m benchmarks.run` from `report.json`; not a figure here was typed by hand.
Draw it again with `--from-json`.

Every server does the same job on the same machine: a JPEG comes in over HTTP, the five likeliest
classes go out as JSON. One server runs at a time, started afresh in each round; the order of each
round is shuffled. The load generator (`./scripts/benchmark`) runs on the same cores, so every
throughput here is lower than the server alone could give, for fast servers more than for slow ones.

Each server has a worker a core, and each worker one thread (`OMP_NUM_THREADS=1`), which is what
anybody finds out who measures several processes on one CPU; only `stock-as-is` is left with its
defaults. Frameworks that form batches of plain requests do so, up to the model's batch size and
for at most 1 ms. `-eager` is PIL, torchvision's transforms and eager torch, as in a tutorial;
`-ours` is the decoding and the engine of this service inside the peer, so that the difference
between the two is the engine, and the difference to this service is the serving.

Every answer is checked; a wrong one counts as failed. Cells are medians over the rounds, with
minimum–maximum in brackets. If a peer is better than this service, that is a loss, and is listed
under [Losses](#losses).
"""

GPU = """\
No figure of a GPU has been measured yet: nothing above says anything about one. On a machine that
has one, `python -m benchmarks.gpu` measures model, decoding, handler and the whole service.\
"""


def write(data: Data, folder: Path) -> None:
    """Write REPORT.md and the plots beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_throughput(data, folder / THROUGHPUT_PLOT)
    plot_latency(data, folder / LATENCY_PLOT)
    (folder / MARKDOWN_FILE).write_text(render(data), "utf-8")


def render(data: Data) -> str:
    sections = [
        INTRODUCTION,
        section("Conditions", conditions(data)),
        section("Bars", bars(data)),
        section("Throughput", throughput(data), f"![throughput]({THROUGHPUT_PLOT})"),
        section("Latency", latency(data), f"![latency against throughput]({LATENCY_PLOT})"),
        section("CPU time a request", cpu_time(data)),
        section("Losses", losses(data)),
        section("The limits", limits(data)),
        section("One client", one_client(data)),
        section("Overload", overload(data)),
        section("Gateway, metrics and logs", pairs(data)),
        section("Accuracy", accuracy(data)),
        section("Memory", memory(data)),
        section("What failed", failures(data)),
        section("GPU", [GPU]),
    ]
    return "\n".join(sections)


def section(title: str, lines: Sequence[str], *more: str) -> str:
    body = "\n".join(lines) or "Not measured."
    return "\n".join([f"## {title}\n", body, *(f"\n{text}" for text in more), ""])


def table(headings: Row, rows: Sequence[Row], legend: str = "") -> list[str]:
    """A table with a line below it; nothing without rows."""
    return [*markdown_table(headings, rows), *(["", legend] if legend else [])] if rows else []


def conditions(data: Data) -> list[str]:
    facts = data["conditions"]
    rounds = [{run["round"] for run in s["runs"]} for s in data["subjects"].values() if s["runs"]]
    done = min(map(len, rounds), default=0)  # an interrupted run has fewer than were asked for
    machine = facts["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items() if text)
    images = (
        f"{facts['images']} {'drawn' if facts['drawn'] else 'real'} colour JPEGs of "
        f"{facts['image_bytes'] / 1024:.0f} KiB on average"
    )
    if facts["images_left_out"]:
        images += (
            f"; {facts['images_left_out']} others left out, because they are not RGB and "
            "TorchServe's own handler fails on them"
        )
    rows = [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"),
        ("instructions", ", ".join(machine.get("flags") or ["unknown"])),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("libraries", versions),
        ("model", f"{facts['model']}, weights {facts['weights']}, recipe {facts['recipe']}"),
        ("workers", f"{facts['workers']} in every server"),
        ("images", images),
        (
            "measured",
            f"{done} of {facts['rounds']} rounds, {facts['seconds']:g} s at each of "
            f"{', '.join(map(str, facts['concurrency']))} clients, order seed {facts['seed']}",
        ),
        ("when", f"{facts['started']} to {facts.get('finished', 'interrupted')}"),
        ("commit", str(facts["commit"])),
    ]
    return markdown_table(["condition", ""], rows)


def throughput(data: Data) -> list[str]:
    clients = data["conditions"]["concurrency"]
    baseline = best_throughput(data["subjects"].get(BASELINE, {"runs": []}))
    rows = []
    for name, subject in measured(data, "ours", "gateway", "peer").items():
        cells = [spread(values(subject, count, "throughput_rps")) for count in clients]
        ratio = f"{best_throughput(subject) / baseline:.2f}" if baseline else "-"
        cpu = max(run["generator_cpu_percent"] for run in subject["runs"])
        failed = sum(run["failed"] for run in subject["runs"])
        refused = sum(run["refused"] for run in subject["runs"])
        title = f"**{name}**" if subject["kind"] in ("ours", "gateway") else name
        rows.append([f"{title}: {subject['what']}", *cells, ratio, failed, refused, f"{cpu:.0f}%"])
    heads = [f"{count} client{'s' if count > 1 else ''}" for count in clients]
    legend = (
        f"Good answers a second. Ratio: best against {BASELINE}'s best. Failed, refused: requests "
        "of all rounds. Generator: the most CPU it took, of one core."
    )
    headings = ["server", *heads, "ratio", "failed", "refused", "generator"]
    return table(headings, rows, legend)


def latency(data: Data) -> list[str]:
    rows = []
    for name, subject in measured(data, "ours", "gateway", "peer", "limit").items():
        for count in concurrencies(subject):
            cells = [spread(values(subject, count, key)) for key in ("p50_ms", "p95_ms", "p99_ms")]
            rows.append([name, count, *cells])
    return table(["server", "clients", "p50 ms", "p95 ms", "p99 ms"], rows)


COMPARED = {
    "throughput_rps": "throughput",
    "p50_ms": "p50",
    "p95_ms": "p95",
    "p99_ms": "p99",
    "cpu_ms": "CPU time",
}


def losses(data: Data) -> list[str]:
    """Every figure in which a peer is better than ours.

    A peer that answered wrongly is not compared: how fast it was says nothing. Nor is one that has
    our engine in another precision.
    """
    right = right_peers(data)
    wrong = sorted(set(measured(data, "peer")) - set(right))
    lines = (
        [f"Not compared, because some answers were wrong: {', '.join(wrong)}.\n"] if wrong else []
    )
    for name, subject in measured(data, "ours").items():
        rows = []
        same = (None, subject["precision"])
        peers = {n: peer for n, peer in right.items() if peer["precision"] in same}
        for count in concurrencies(subject):
            for key, title in COMPARED.items():
                more_is_better = key == "throughput_rps"
                own = median_of(subject, count, key)
                for peer, other in peers.items():
                    theirs = median_of(other, count, key)
                    if own is None or theirs is None or theirs == own:
                        continue
                    if (theirs > own) == more_is_better:
                        difference = f"{100 * (theirs / own - 1):+.0f}%"
                        rows.append([peer, count, title, theirs, own, difference])
        lines += [f"**{name}** loses {len(rows)} of the comparisons:", ""]
        headings = ["to", "clients", "in", "theirs", "ours", "difference"]
        lines += [*markdown_table(headings, rows), ""] if rows else []
    return lines


def limits(data: Data) -> list[str]:
    """1 / (1 / in process + 1 / empty handler): what the two costs allow, one after the other."""
    empty = best_throughput(data["subjects"].get(EMPTY, {"runs": []}))
    rows = []
    for name, subject in measured(data, "ours").items():
        within = inprocess_best(data, subject["precision"])
        if not within or not empty:
            continue
        limit = 1 / (1 / within + 1 / empty)
        best = best_throughput(subject)
        rows.append([name, within, empty, limit, best, f"{100 * best / limit:.0f}%"])
    headings = ["server", "in process", "empty handler", "limit", "best", "of the limit"]
    legend = (
        "In process: our handler without TorchServe and HTTP, a process a core, the better of "
        "batch 1 and the model's batch size. Empty handler: TorchServe as we start it, with "
        "nothing to do. "
        "Limit: 1 / (1 / in process + 1 / empty handler)."
    )
    return table(headings, rows, legend)


def one_client(data: Data) -> list[str]:
    """What one client waits, against the work itself and TorchServe's own part."""
    empty = median_of(data["subjects"].get(EMPTY, {"runs": []}), 1, "p50_ms")
    rows = []
    for name, subject in measured(data, "ours").items():
        runs = data["inprocess"].get(subject["precision"], {"runs": []})["runs"]
        alone = [r["p50_ms"] for r in runs if r["batch"] == 1 and r["processes"] == 1]
        own = median_of(subject, 1, "p50_ms")
        if not alone or empty is None or own is None:
            continue
        together = median(alone) + empty
        difference = f"{100 * (own / together - 1):+.0f}%"
        rows.append([name, median(alone), empty, together, own, difference])
    headings = ["server", "in process", "empty handler", "together", "measured", "difference"]
    return table(headings, rows, "p50 in ms.")


def overload(data: Data) -> list[str]:
    rows, after = [], []
    for name, found in data["overload"].items():
        for run in found["runs"]:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in run["failures"].items())
            allowed, raw = (f"{100 * rate / run['best_rps']:.0f}%" for rate in answered(data, run))
            start = [f"{name}, {run['times']} times", f"{run['rate']:.0f}", run["throughput_rps"]]
            keys = ("p50_ms", "p99_ms", "refused", "refused_p50_ms", "refused_p99_ms")
            generator = [f"{run['generator_cpu_percent']:.0f}%", run["start_lag_p99_ms"]]
            figures = [run[key] for key in keys]
            rows.append([*start, raw, allowed, *figures, kinds or "0", *generator])
            shares = [100 * rate / run["best_rps"] for rate in seconds_of(run["after_rps"])]
            after.append([*start[:1], run["full_speed_seconds"], *(f"{s:.0f}%" for s in shares)])
    if not rows:
        return []
    headings = ["server", "sent /s", "answered /s", "of the best", "of the best, allowing"]
    headings += ["p50 ms", "p99 ms", "refused", "refused p50 ms", "refused p99 ms", "failed"]
    headings += ["generator", "generator late p99 ms"]
    legend = (
        "An open loop: requests by the clock, latency from the moment each was due. The best rate "
        "was measured right before, in a closed loop. The generator runs on the same cores: "
        "*allowing* is the share if the server had had the CPU time that the generator took more "
        "than it did for the best rate. TorchServe refuses with 503, the gateway with 429."
    )
    seconds = [f"second {number + 1}" for number in range(max(map(len, after)) - 2)]
    then = "The seconds after the overload, in a closed loop again, of the best rate:"
    lines = [*table(headings, rows, legend), "", then, ""]
    return [*lines, *markdown_table(["server", "full speed after, s", *seconds], after, digits=2)]


def seconds_of(rates: Sequence[float]) -> list[float]:
    """The means of whole seconds, of rates in shorter slices."""
    width = round(1 / SLICE_SECONDS)
    return [mean(rates[index : index + width]) for index in range(0, len(rates), width)]


def accuracy(data: Data) -> list[str]:
    reference = data["reference"]
    if not reference:
        return []
    counts = (reference["images"], reference["right"])
    rows: list[Row] = [["eager torch, fp32 (the reference)", *counts, "100.0%", 0]]
    for name, subject in measured(data, "ours", "peer").items():
        found = subject["accuracy"]
        if found:
            same = f"{100 * found['as_reference'] / found['images']:.1f}%"
            rows.append([name, found["images"], found["right"], same, found["unanswered"]])
    return markdown_table(
        ["server", "labelled images", "right", "as the reference", "unanswered"], rows
    )


def failures(data: Data) -> list[str]:
    reasons = [(name, subject["failed"]) for name, subject in data["subjects"].items()]
    reasons += [(f"inprocess {name}", run["failed"]) for name, run in data["inprocess"].items()]
    reasons += [(f"overload of {name}", run["failed"]) for name, run in data["overload"].items()]
    reasons += [
        (f"a start of {name}, tried again", reason)
        for name, subject in data["subjects"].items()
        for reason in subject["failed_starts"]
    ]
    rows = [[name, reason] for name, reason in reasons if reason]
    for name, subject in data["subjects"].items():
        kinds: Counter[str] = Counter()
        for run in subject["runs"]:
            kinds.update(run["failures"])
            kinds["answered from a cache"] += run["cached"]
        wrong = ", ".join(f"{count} x {kind}" for kind, count in kinds.items() if count)
        if wrong:
            rows.append([name, f"requests: {wrong}"])
    return table(["what", "why"], rows) or ["Nothing."]

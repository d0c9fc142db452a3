"""REPORT.md and its plots, from report.json and nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

JSON_FILE = "report.json"
MARKDOWN_FILE = "REPORT.md"
THROUGHPUT_PLOT = "throughput.png"
LATENCY_PLOT = "latency.png"
BASELINE = "stock-omp1"
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
minimum–maximum in brackets. Where a peer is better than this service, that is a loss, and is listed
under [Losses](#losses).
"""

GPU = """\
No figure of a GPU has been measured yet: nothing above says anything about one. On a machine that
has one, `python -m benchmarks.gpu` measures model, decoding, handler and the whole service.\
"""

Data = Mapping[str, Any]
Table = list[str]


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
        section("Throughput", throughput(data), f"![throughput]({THROUGHPUT_PLOT})"),
        section("Latency", latency(data), f"![latency against throughput]({LATENCY_PLOT})"),
        section("Losses", losses(data)),
        section("The limits", limits(data)),
        section("One client", one_client(data)),
        section("Overload", overload(data)),
        section("Accuracy", accuracy(data)),
        section("Memory", memory(data)),
        section("What failed", failures(data)),
        section("GPU", [GPU]),
    ]
    return "\n".join(sections)


def section(title: str, lines: Sequence[str], *more: str) -> str:
    body = "\n".join(lines) if lines else "Not measured."
    return "\n".join([f"## {title}\n", body, *(f"\n{text}" for text in more), ""])


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A Markdown table; the first column is text, the others figures."""
    ruler = ["---"] + ["---:"] * (len(headings) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [headings, ruler, *rows]]


# --- figures ---


def values(subject: Data, clients: int, name: str) -> list[float]:
    """A figure of a subject at one concurrency, of each round that has it."""
    found = [run[name] for run in subject["runs"] if run["concurrency"] == clients]
    return [value for value in found if value is not None]


def middle(subject: Data, clients: int, name: str) -> float | None:
    found = values(subject, clients, name)
    return median(found) if found else None


def concurrencies(subject: Data) -> list[int]:
    return sorted({run["concurrency"] for run in subject["runs"]})


def best_throughput(subject: Data) -> float:
    """The best concurrency's median, good answers a second; 0 of nothing."""
    found = [middle(subject, clients, "throughput_rps") for clients in concurrencies(subject)]
    return max((value for value in found if value is not None), default=0.0)


def spread(found: Sequence[float], digits: int = 1) -> str:
    """Median (minimum–maximum)."""
    if not found:
        return "-"
    low, mid, high = (f"{value:.{digits}f}" for value in (min(found), median(found), max(found)))
    return mid if len(found) == 1 else f"{mid} ({low}–{high})"


def measured(data: Data, *kinds: str) -> dict[str, Data]:
    """Subjects with results, the fastest first."""
    found = {n: s for n, s in data["subjects"].items() if s["runs"] and s["kind"] in kinds}
    return dict(sorted(found.items(), key=lambda item: -best_throughput(item[1])))


# --- sections ---


def conditions(data: Data) -> Table:
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
    return table(["condition", ""], rows)


def throughput(data: Data) -> Table:
    clients = data["conditions"]["concurrency"]
    baseline = best_throughput(data["subjects"].get(BASELINE, {"runs": []}))
    rows = []
    for name, subject in measured(data, "ours", "peer").items():
        cells = [spread(values(subject, count, "throughput_rps")) for count in clients]
        ratio = f"{best_throughput(subject) / baseline:.2f}" if baseline else "-"
        cpu = max(run["generator_cpu_percent"] for run in subject["runs"])
        failed = sum(run["failed"] for run in subject["runs"])
        refused = sum(run["refused"] for run in subject["runs"])
        title = f"**{name}**" if subject["kind"] == "ours" else name
        rows.append(
            [f"{title}: {subject['what']}", *cells, ratio, str(failed), str(refused), f"{cpu:.0f}%"]
        )
    heads = [f"{count} client{'s' if count > 1 else ''}" for count in clients]
    legend = [
        "",
        f"Good answers a second. Ratio: best against {BASELINE}'s best. Failed, refused: requests "
        "of all rounds. Generator: the most CPU it took, of one core.",
    ]
    headings = ["server", *heads, "ratio", "failed", "refused", "generator"]
    return table(headings, rows) + legend if rows else []


def latency(data: Data) -> Table:
    rows = []
    for name, subject in measured(data, "ours", "peer", "limit").items():
        for count in concurrencies(subject):
            cells = [spread(values(subject, count, key)) for key in ("p50_ms", "p95_ms", "p99_ms")]
            rows.append([name, str(count), *cells])
    return table(["server", "clients", "p50 ms", "p95 ms", "p99 ms"], rows) if rows else []


MORE_IS_BETTER: dict[str, tuple[str, bool]] = {
    "throughput_rps": ("throughput", True),
    "p50_ms": ("p50", False),
    "p95_ms": ("p95", False),
    "p99_ms": ("p99", False),
}


def losses(data: Data) -> Table:
    """Every figure in which a peer is better than ours.

    A peer that answered wrongly is not compared: how fast it was says nothing.
    """
    every = measured(data, "peer")
    peers = {n: s for n, s in every.items() if not any(run["failed"] for run in s["runs"])}
    wrong = sorted(set(every) - set(peers))
    lines = (
        [f"Not compared, because some answers were wrong: {', '.join(wrong)}.\n"] if wrong else []
    )
    for name, subject in measured(data, "ours").items():
        rows = []
        for count in concurrencies(subject):
            for key, (title, more) in MORE_IS_BETTER.items():
                own = middle(subject, count, key)
                for peer, other in peers.items():
                    theirs = middle(other, count, key)
                    if own is None or theirs is None or (theirs > own) != more or theirs == own:
                        continue
                    difference = f"{100 * (theirs / own - 1):+.0f}%"
                    figures = (f"{theirs:.1f}", f"{own:.1f}", difference)
                    rows.append([peer, str(count), title, *figures])
        lines += [f"**{name}** loses {len(rows)} of the comparisons:", ""]
        headings = ["to", "clients", "in", "theirs", "ours", "difference"]
        lines += [*table(headings, rows), ""] if rows else []
    return lines


def limits(data: Data) -> Table:
    """1 / (1 / in process + 1 / empty handler): what the two costs allow, one after the other."""
    empty = best_throughput(data["subjects"].get(EMPTY, {"runs": []}))
    rows = []
    for name, subject in measured(data, "ours").items():
        within = inprocess_best(data, subject["precision"])
        if not within or not empty:
            continue
        limit = 1 / (1 / within + 1 / empty)
        best = best_throughput(subject)
        cells = (f"{value:.1f}" for value in (within, empty, limit, best))
        rows.append([name, *cells, f"{100 * best / limit:.0f}%"])
    headings = ["server", "in process", "empty handler", "limit", "best", "of the limit"]
    legend = [
        "",
        "In process: our handler without TorchServe and HTTP, a process a core, the better of "
        "batch 1 and the model's batch size. Empty handler: TorchServe as we start it, with "
        "nothing to do. "
        "Limit: 1 / (1 / in process + 1 / empty handler).",
    ]
    return table(headings, rows) + legend if rows else []


def inprocess_best(data: Data, precision: str | None) -> float:
    """Images a second in process, the best batch size's median; 0 of nothing."""
    runs = data["inprocess"].get(precision, {"runs": []})["runs"]
    most = max((run["processes"] for run in runs), default=0)
    by_batch: dict[int, list[float]] = {}
    for run in runs:
        if run["processes"] == most:
            by_batch.setdefault(run["batch"], []).append(run["images_per_second"])
    return max(map(median, by_batch.values()), default=0.0)


def one_client(data: Data) -> Table:
    """What one client waits, against the work itself and TorchServe's own part."""
    empty = middle(data["subjects"].get(EMPTY, {"runs": []}), 1, "p50_ms")
    rows = []
    for name, subject in measured(data, "ours").items():
        runs = data["inprocess"].get(subject["precision"], {"runs": []})["runs"]
        alone = [r["p50_ms"] for r in runs if r["batch"] == 1 and r["processes"] == 1]
        own = middle(subject, 1, "p50_ms")
        if not alone or empty is None or own is None:
            continue
        together = median(alone) + empty
        figures = (f"{value:.1f}" for value in (median(alone), empty, together, own))
        rows.append([name, *figures, f"{100 * (own / together - 1):+.0f}%"])
    headings = ["server", "in process", "empty handler", "together", "measured", "difference"]
    return [*table(headings, rows), "", "p50 in ms."] if rows else []


def overload(data: Data) -> Table:
    rows = []
    for name, run in data["overload"].items():
        if "requests" not in run:
            continue
        kinds = ", ".join(f"{count} x {kind}" for kind, count in run["failures"].items())
        rows.append(
            [
                name,
                f"{run['rate']:.0f}",
                f"{run['throughput_rps']:.1f}",
                f"{100 * run['throughput_rps'] / run['best_rps']:.0f}%",
                milliseconds(run["p50_ms"]),
                milliseconds(run["p99_ms"]),
                str(run["refused"]),
                milliseconds(run["refused_p50_ms"]),
                milliseconds(run["refused_p99_ms"]),
                kinds or "0",
                milliseconds(run["start_lag_p99_ms"]),
            ]
        )
    headings = ["server", "sent /s", "answered /s", "of the best", "p50 ms", "p99 ms"]
    headings += ["503s", "503 p50 ms", "503 p99 ms", "failed", "generator late p99 ms"]
    legend = ["", "An open loop: requests by the clock, latency from the moment each was due."]
    return table(headings, rows) + legend if rows else []


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def accuracy(data: Data) -> Table:
    reference = data["reference"]
    if not reference:
        return []
    counts = (str(reference["images"]), str(reference["right"]))
    rows = [["eager torch, fp32 (the reference)", *counts, "100.0%", "0"]]
    for name, subject in measured(data, "ours", "peer").items():
        found = subject["accuracy"]
        if found:
            same = f"{100 * found['as_reference'] / found['images']:.1f}%"
            rows.append(
                [name, str(found["images"]), str(found["right"]), same, str(found["unanswered"])]
            )
    return table(["server", "labelled images", "right", "as the reference", "unanswered"], rows)


def memory(data: Data) -> Table:
    """PSS of all processes, after the last load of a round."""
    rows = []
    for name, subject in measured(data, "ours", "peer", "limit").items():
        totals = [
            sum(process["pss_mib"] for process in sample["processes"])
            for sample in subject["memory"]
        ]
        if totals:
            count = len(subject["memory"][-1]["processes"])
            rows.append([name, spread(totals, 0), str(count)])
    lines = table(["server", "MiB", "processes"], rows) if rows else []
    for name, subject in measured(data, "ours").items():
        if subject["memory"]:
            processes = subject["memory"][-1]["processes"]
            rows = [[p["process"], f"{p['pss_mib']:.0f}"] for p in processes]
            lines += ["", f"**{name}**, in the last round:", ""]
            lines += table(["process", "MiB"], rows)
    legend = ["", "Proportional set size: a page that processes share is divided among them."]
    return lines + legend if lines else []


def failures(data: Data) -> Table:
    reasons = [(name, subject["failed"]) for name, subject in data["subjects"].items()]
    reasons += [(f"inprocess {name}", run["failed"]) for name, run in data["inprocess"].items()]
    reasons += [
        (f"overload of {name}", run["failed"])
        for name, run in data["overload"].items()
        if "requests" not in run
    ]
    reasons += [
        (f"a start of {name}, tried again", reason)
        for name, subject in data["subjects"].items()
        for reason in subject["failed_starts"]
    ]
    rows = [[name, str(reason).replace("|", "/")] for name, reason in reasons if reason]
    wrong: dict[str, dict[str, int]] = {}
    for name, subject in data["subjects"].items():
        for run in subject["runs"]:
            cached = {"answered from a cache": run["cached"]} if run["cached"] else {}
            for kind, count in {**run["failures"], **cached}.items():
                kinds = wrong.setdefault(name, {})
                kinds[kind] = kinds.get(kind, 0) + count
    rows += [
        [name, "requests: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())]
        for name, kinds in wrong.items()
    ]
    return table(["what", "why"], rows) if rows else ["Nothing."]


# --- plots ---


def draw(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    fill(axes)
    figure.savefig(path, dpi=90)


def plot_throughput(data: Data, path: Path) -> None:
    """A bar for each server: its best median, with the extremes of that concurrency."""
    subjects = measured(data, "ours", "peer")

    def fill(axes: Any) -> None:
        for position, (name, subject) in enumerate(reversed(subjects.items())):
            found = max(
                (values(subject, count, "throughput_rps") for count in concurrencies(subject)),
                key=median,
            )
            mid = median(found)
            error = [[mid - min(found)], [max(found) - mid]]
            colour = "tab:orange" if subject["kind"] == "ours" else "tab:blue"
            axes.barh(position, mid, xerr=error, color=colour, label=name)
        axes.set_yticks(range(len(subjects)), list(reversed(subjects)))
        axes.set_xlabel("good answers a second, at the best concurrency")

    draw(path, (8, 1 + 0.3 * max(1, len(subjects))), fill)


def plot_latency(data: Data, path: Path) -> None:
    """A line for each server: p95 against throughput, a point for each concurrency."""

    def fill(axes: Any) -> None:
        for name, subject in measured(data, "ours", "peer").items():
            points = [
                (middle(subject, count, "throughput_rps"), middle(subject, count, "p95_ms"))
                for count in concurrencies(subject)
            ]
            known = [point for point in points if None not in point]
            if known:
                width = 2.5 if subject["kind"] == "ours" else 1
                axes.plot(*zip(*known, strict=True), marker="o", linewidth=width, label=name)
        axes.set(xlabel="good answers a second", ylabel="p95 latency, ms", yscale="log")
        if axes.lines:
            axes.legend(fontsize=7, ncols=2)

    draw(path, (8, 5), fill)

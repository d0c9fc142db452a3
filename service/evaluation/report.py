"""What was measured, for a terminal and as one HTML file that needs no network."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.bulk.report import draw_thumbnail, render
from service.bulk.sources import read_file
from service.evaluation.figures import EXAMPLES, Comparison, Figures, Group, Share
from service.evaluation.run import Outcome, Run
from service.tables import counted, text_table

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_FAILED = 200


@dataclass(frozen=True)
class Report:
    """A target's figures, and those of another one if there are two."""

    a: Figures
    b: Figures | None = None
    comparison: Comparison | None = None

    @property
    def targets(self) -> list[tuple[str, Figures]]:
        return [("A", self.a), ("B", self.b)] if self.b else [("", self.a)]


def lines(report: Report) -> list[str]:
    """For a terminal: the figures of each target, and the rest of the first."""
    text = []
    for letter, figures in report.targets:
        text += [f"{letter} {figures.target}".strip(), *_models(figures), *_headline(figures), ""]
    if compared := report.comparison:
        text += [
            f"{counted(compared.images, 'image')}: both right {compared.both}, "
            f"only A {compared.only_a}, only B {compared.only_b}, neither {compared.neither}",
            compared.verdict,
            "",
        ]
    for title, groups in {"worst classes": report.a.worst, **report.a.slices}.items():
        text += [*_groups(title, groups), ""]
    rows = [(pair.truth, pair.predicted, pair.images) for pair in report.a.confused]
    if rows:
        text += text_table(["most confused", "taken for", "images"], rows, left=(0, 1))
    return text


def percent(share: Share) -> str:
    """With its interval."""
    return f"{share.share:.1%} ({share.low:.1%} to {share.high:.1%})"


def headline(figures: Figures) -> list[tuple[str, str]]:
    """What is measured, and its value in words."""
    rows = [
        ("images", f"{figures.images}, of {figures.classes} classes"),
        ("top-1", f"{figures.top1.hits} of {figures.top1.of}: {percent(figures.top1)}"),
        ("top-5", f"{figures.top5.hits} of {figures.top5.of}: {percent(figures.top5)}"),
    ]
    if calibration := figures.calibration:
        rows.append(
            (
                "ECE",
                f"{calibration.ece:.3f}: it says {calibration.confidence:.1%} on average, and is "
                f"right in {calibration.right:.1%}",
            )
        )
    if sets := figures.sets:
        size = f"{sets.mean_size:.2f} classes on average, {sets.largest} at most"
        rows.append(("set", f"{percent(sets.coverage)} hold the class; {size}"))
    if figures.unknown:
        rows.append(("unknown", f"{figures.unknown.hits} of {figures.unknown.of}"))
    if figures.failed:
        counts = ", ".join(f"{count} {kind}" for kind, count in figures.failed.items())
        total = sum(figures.failed.values())
        how = "as wrong" if figures.counted == figures.images else "as nothing"
        rows.append(("failed", f"{total}, counted {how}: {counts}"))
    return rows


def _headline(figures: Figures) -> list[str]:
    rows = headline(figures)
    width = max(len(name) for name, _ in rows)
    return [f"  {name:{width}}  {value}" for name, value in rows]


def _models(figures: Figures) -> list[str]:
    if len(figures.models) == 1:
        return [f"  {model}" for model in figures.models]
    return [f"  {count} by {model}" for model, count in figures.models.items()]


def _groups(title: str, groups: Sequence[Group]) -> list[str]:
    rows = [(group.name, group.top1.of, group.top1.hits, percent(group.top1)) for group in groups]
    return text_table([title, "images", "right", "top-1"], rows)


def write_report(report: Report, runs: Sequence[Run], path: Path) -> None:
    """The file is there in whole, or as it was before. Images are read again. Raises OSError."""
    a = runs[0]
    apart = _apart(*runs) if report.b else {}
    shown = {name for pair in report.a.confused for name in pair.examples}
    shown |= {str(one.path) for group in apart.values() for one in group}
    text = render(
        TEMPLATE,
        report=report,
        headline=headline,
        percent=percent,
        apart=apart,
        failed=[one for one in a.outcomes if one.error][:MOST_FAILED],
        thumbnails={name: found for name in sorted(shown) if (found := _thumbnail(name))},
    )
    new = path.with_name(f"{path.name}.tmp")
    new.write_text(text, "utf-8", errors="backslashreplace")
    new.replace(path)


def _apart(a: Run, b: Run) -> dict[str, list[Outcome]]:
    """Some images that only one of the two classifies rightly, as A has answered."""
    right = {one.path for one in b.outcomes if one.is_right}
    groups: dict[str, list[Outcome]] = {"Only A is right": [], "Only B is right": []}
    for one in a.outcomes:
        if one.is_right != (one.path in right):
            group = groups["Only A is right" if one.is_right else "Only B is right"]
            if len(group) < 2 * EXAMPLES:
                group.append(one)
    return groups


def _thumbnail(name: str) -> str | None:
    """A JPEG as base64 text."""
    small = draw_thumbnail(read_file(Path(name)).body)
    return b64encode(small).decode() if small else None

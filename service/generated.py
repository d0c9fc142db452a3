"""What is generated from declarations in the code: metrics.yaml, and tables in the documents.

A document has each table between two comments, `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import re
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from handler.errors import SetupError
from handler.metrics import FAMILIES, Family
from handler.rules import Rule, rules_of
from handler.settings import PREFIX, Settings
from service.chaos.checker import rules
from service.chaos.cluster import RESPONSE_SECONDS
from service.chaos.schedule import KINDS, Kind
from service.gateway.settings import PREFIX as GATEWAY_PREFIX
from service.gateway.settings import GatewaySettings
from service.jobs.settings import JobsSettings
from service.tables import markdown_table
from service.torchserve.metrics import METRICS as TORCHSERVE

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = """\
# Made by ./scripts/generate, from handler/metrics.py and service/torchserve/metrics.py.
# The frontend drops metrics that are not declared here. It adds a label `Hostname` to each of
# `model_metrics`, and `unit` is what it says in the HELP of its page.

"""


def outdated(parsers: Mapping[str, ArgumentParser], root: Path = ROOT) -> dict[Path, str]:
    """The new text of each file in the repository that is not as it would be generated now.

    `parsers` are those of the commands, by name. Raises SetupError for a name of a table that is
    unknown.
    """
    blocks = tables(parsers)
    texts = {root / "handler" / "configs" / "metrics.yaml": metrics_yaml()}

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in blocks:
            known = ", ".join(blocks)
            raise SetupError(f"{path.name}: the table {name} is unknown; known: {known}")
        return "\n".join([begin.rstrip(), *blocks[name], end])

    for path in sorted((root / "docs").rglob("*.md")):
        texts[path] = BLOCK.sub(fill, path.read_text("utf-8"))
    return {path: text for path, text in texts.items() if path.read_text("utf-8") != text}


def metrics_yaml() -> str:
    """TorchServe's `metrics_config`."""
    content = {"ts_metrics": _declarations(TORCHSERVE), "model_metrics": _declarations(FAMILIES)}
    return HEADER + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=200)


def _declarations(families: Mapping[str, Family]) -> dict[str, list[dict[str, Any]]]:
    """Type -> declarations; TorchServe knows a histogram of ours as counters."""
    found: dict[str, list[dict[str, Any]]] = {"counter": [], "gauge": []}
    for name, family in families.items():
        for series, (kind, labels) in family.series(name).items():
            found[kind].append({"name": series, "unit": family.help, "dimensions": [*labels]})
    return found


def tables(parsers: Mapping[str, ArgumentParser]) -> dict[str, list[str]]:
    """The lines of each table, by the name in its comment.

    Options that a command has in common with ./scripts/serve are in the table of the latter only.
    """
    options = {name: _options(parser) for name, parser in parsers.items()}
    for name in options.keys() - {"serve"}:
        options[name] = [row for row in options[name] if row not in options.get("serve", [])]
    return {
        "metrics": _table(
            ["metric", "type", "labels", ""],
            [
                [f"`{name}`", family.kind, ", ".join(family.labels), _sentences(family)]
                for name, family in FAMILIES.items()
            ],
        ),
        "buckets": _table(
            ["histogram", "upper bounds of its buckets, besides `+Inf`"],
            [
                [f"`{name}`", ", ".join(map(str, family.bounds))]
                for name, family in FAMILIES.items()
                if family.bounds
            ],
        ),
        "torchserve metrics": _table(
            ["metric", "labels", ""],
            [
                [f"`{name}`", ", ".join(family.labels), family.note]
                for name, family in TORCHSERVE.items()
                if family.note
            ],
        ),
        "promises": _table(
            ["rule", "limit", ""],
            [
                [f"`{rule.name}`", f"{rule.limit:g} {rule.unit}".strip(), rule.promise]
                for rule in rules(RESPONSE_SECONDS)
            ],
        ),
        "faults": _table(
            ["fault", "lasts", "recovered", "alert"],
            [
                [
                    f"`{name}`",
                    "{:g} to {:g} s".format(*kind.seconds),
                    f"{kind.recovery:g} s",
                    _alerts(kind),
                ]
                for name, kind in KINDS.items()
            ],
        ),
        "settings": _settings(PREFIX, Settings),
        "gateway settings": _settings(GATEWAY_PREFIX, GatewaySettings, without=JobsSettings),
        "jobs settings": _settings(GATEWAY_PREFIX, JobsSettings),
        **{
            f"options {name}": _table(["option", "default", ""], rows)
            for name, rows in options.items()
        },
    }


def _alerts(kind: Kind) -> str:
    """Those that a fault must raise, or why there are none."""
    raised = [
        f"`{name}`" + (f", from {seconds:g} s" if seconds else "")
        for name, seconds in kind.alerts.items()
    ]
    return "; ".join(raised) or f"none: {kind.unraised}"


def _sentences(family: Family) -> str:
    return f"{family.help[0].upper()}{family.help[1:]}. {family.note}".strip()


def _settings(prefix: str, kind: type, without: type | None = None) -> list[str]:
    left_out = rules_of(without) if without else {}
    return _table(
        ["variable", "default", "allowed", ""],
        [
            [f"`{prefix}{name.upper()}`", _value(rule.default), _allowed(rule), rule.meaning]
            for name, rule in rules_of(kind).items()
            if name not in left_out
        ],
    )


def _allowed(rule: Rule) -> str:
    values = (True, False) if rule.type is bool else rule.choices
    limits = "" if rule.type is str else rule.allowed
    return ", ".join(map(_value, values)) or limits


def _value(value: Any) -> str:
    """A value as the environment has it; nothing for the empty text."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else ""


def _options(parser: ArgumentParser) -> list[list[str]]:
    return [
        # mkdocs would show the backslash that a pipe in a table needs
        [f"`{_usage(action)}`".replace("|", "/"), *_help(parser, action)]
        for action in parser._actions
        if action.dest != "help"
    ]


def _usage(action: Action) -> str:
    """An option or argument with its value: `--device auto|cpu|cuda`, `--tuned [FILE]`."""
    value = action.metavar or "|".join(map(str, action.choices or [])) or action.dest.upper()
    form = {0: "", "?": f"[{value}]", "*": f"[{value} …]", "+": f"{value} …"}
    return " ".join([", ".join(action.option_strings), form.get(action.nargs, str(value))]).strip()


def _help(parser: ArgumentParser, action: Action) -> tuple[str, str]:
    """The default, and the help without the words about it."""
    text = (action.help or "") % (vars(action) | {"prog": parser.prog})
    meaning, _, default = text.partition("(default: ")
    if not default and action.default not in (None, False, SUPPRESS) and action.default != []:
        default = f"{action.default})"
    return default.removesuffix(")"), meaning.strip()


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown_table(headings, rows, left=range(len(headings)))

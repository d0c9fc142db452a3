"""Options of ./scripts/tune."""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from handler.machine import available_cores
from service.arguments import Parser, number, positive
from service.options import NOT_SERVED, ModelOptions, add_options, read_options
from service.registry.references import parse_reference
from service.tuning.bench import TuningOptions


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="./scripts/tune",
        description="Find the configuration that serves a model fastest within a latency limit. "
        "A model option that is given (--precision, --workers, …) is kept and not varied.",
        allow_abbrev=False,
    )
    add_options(parser, ModelOptions, without=["tuned", "weights_sha256", *NOT_SERVED])
    add = parser.add_argument_group("tuning").add_argument
    limit = "99 of 100 requests must be answered within this time"
    add("--slo-p99-ms", type=positive, required=True, metavar="MS", help=limit)
    budget = "start no measurement that would end later (default: %(default)s)"
    add("--budget-minutes", type=positive, default=10.0, metavar="N", help=budget)
    each = "of each measurement (default: %(default)s)"
    add("--seconds", type=positive, default=5.0, metavar="S", help=each)
    add(
        "--concurrency",
        type=number(1, 10_000),
        nargs="+",
        metavar="N",
        default=[1, *(available_cores() * 2**power for power in range(5))],
        help="clients, one measurement each, until one misses the SLO "
        "(default: 1 and 1 to 16 a core)",
    )
    add("--images", type=Path, metavar="DIR", help="JPEGs to send (default: drawn here)")
    add("--out", metavar="FILE", default="auto", help="(default: model_store/tuned-{model}.yaml)")
    add("--plot", type=Path, metavar="FILE.png", help="(default: beside --out, as .png)")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[ModelOptions, TuningOptions]:
    """The model's options and those of the tuning; exits with 2 if they are wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if parse_reference(args.weights):
        parser.error("--weights must be a file here")
    model = read_options(ModelOptions, parser, args)
    if len(model.models) > 1:
        parser.error("one --model is tuned at a time")
    absolute: dict[str, Any] = {  # servers run in another folder
        name: str(Path(value).resolve())
        for name in ("weights", "labels", "calibration", "calibrate", "golden", "golden_logits")
        if (value := getattr(model, name)) not in (None, "pretrained", "untrained")
    }
    args.concurrency = tuple(sorted(set(args.concurrency)))
    tuning = {spec.name: getattr(args, spec.name) for spec in fields(TuningOptions)}
    return replace(model, **absolute), TuningOptions(**tuning)

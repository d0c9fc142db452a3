"""Load a running server, check every answer, and say how fast it was.

A table for people comes first; the last line is one JSON object.
"""

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from http import HTTPStatus

import aiohttp

from handler.errors import SetupError
from service.client import read_answer, read_key, silence
from service.load.answers import Expectations
from service.load.generator import REFUSALS, measure, try_one
from service.load.images import ImageRequest, in_forms, load_images
from service.load.measurement import Load
from service.load.options import make_parser
from service.load.report import heading, make_report, plot_runs, row

# A form is needed for several images: the cheapest one, unless another is asked for.
SUBTYPES = {"raw": "mixed", "multipart": "form-data"}


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.concurrency is None and args.rate is None:
        args.concurrency = [1, 8, 32]
    base = args.url.rstrip("/")
    url = base if "/" in base.partition("://")[2] else f"{base}/predictions/{args.model}"
    try:
        headers = dict(re.split(r":\s*", header, maxsplit=1) for header in args.header)
        if args.key_file:
            headers["X-API-Key"] = read_key(args.key_file)
        images = load_images(args.images)
        expected = json.loads(args.expect.read_text("utf-8")) if args.expect else None
    except (SetupError, OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    if args.form == "multipart" or args.per_request > 1:
        images = in_forms(images, args.per_request, SUBTYPES[args.form])
    expectations = Expectations(expected)
    report = make_report(url, args.form, args.per_request, images)
    times = {"seconds": args.seconds, "warmup_seconds": args.warmup_seconds}
    loads = [Load(concurrency=clients, **times) for clients in args.concurrency or ()]
    loads += [Load(rate=rate, **times) for rate in args.rate or ()]
    try:
        if problem := asyncio.run(find_problem(url, images[0], headers)):
            print(f"error: {problem}", file=sys.stderr)
            return 2
        print(heading(), flush=True)
        for load in loads:
            measuring = measure(url, images, load, headers=headers, expectations=expectations)
            report.measurements.append(asyncio.run(measuring))
            print(row(report.measurements[-1]), flush=True)
    except KeyboardInterrupt:
        return 130
    if args.plot:
        plot_runs(report.measurements, args.plot)
    print(json.dumps(asdict(report)))
    return 1 if any(run.failed or not run.ok for run in report.measurements) else 0


async def find_problem(url: str, image: ImageRequest, headers: Mapping[str, str]) -> str | None:
    """Why a load would be pointless; None if the server classifies an image, or is only busy."""
    try:
        status, _, content = await try_one(url, image, headers)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return silence(url)
    if status in (HTTPStatus.OK, *REFUSALS):
        return None
    answer = read_answer(status, content, f"HTTP {status}")
    return f"{url}: {answer.get('type')}: {answer.get('message')}"


if __name__ == "__main__":
    sys.exit(main())

"""What ./scripts/serve prints when it is ready."""

import os
import shlex
import sys
from collections.abc import Sequence

from service.gateway.process import Gateway
from service.logs import Log
from service.scaling.options import make_parser
from service.torchserve.config import ROOT, Addresses
from service.torchserve.management import Management

TIMEOUT_SECONDS = 30  # for what a worker answers
EXAMPLE = ROOT / "examples" / "clock.jpg"


def announce(
    log: Log,
    served: Sequence[str],
    addresses: Addresses,
    gateway: Gateway | None,
    seconds: float,
) -> None:
    """Say that the service is ready, in the log and to people at a terminal."""
    if log.form == "json":
        log.event(
            "INFO",
            "ready",
            message=f"Ready after {seconds:.1f} s.",
            models=served,
            predictions=addresses.inference.url,
            management=addresses.management.url,
            metrics=addresses.metrics.url,
            gateway=gateway.url if gateway else None,
            grpc=gateway.grpc_url if gateway else None,
        )
    if log.form == "text" or sys.stderr.isatty():
        text = banner(served, addresses, gateway, seconds) + "\n"
        log.text(text) if log.form == "text" else sys.stderr.write(text)


def scale_command(model: str, workers: int, addresses: Addresses) -> str:
    """The line that gives `model`, by its name or name/version, so many workers."""
    name, _, version = model.partition("/")
    words = [f"{os.path.relpath(ROOT)}/scripts/scale", name, str(workers)]
    if version:
        words += ["--version", version]
    for option in ("management", "metrics"):
        url = getattr(addresses, option).url
        if url != make_parser().get_default(option):
            words += [f"--{option}", url]
    return shlex.join(words)


def banner(
    served: Sequence[str], addresses: Addresses, gateway: Gateway | None, seconds: float
) -> str:
    """What people need next, in lines that work when pasted."""
    example = shlex.quote(os.path.relpath(EXAMPLE))
    management = Management(addresses.management.url, TIMEOUT_SECONDS)
    lines = []
    for model in served:
        facts = management.info(model)
        workers = management.describe(model).min_workers
        top_k = min(3, facts["classes"])
        predict = f"{addresses.inference.url}/predictions/{model}"
        described = f"{management.url}/models/{model}"
        lines += [
            f"{model} is ready: {workers} worker{'s' if workers > 1 else ''} on {facts['device']}, "
            f"{facts['engine']}, weights {facts['weights']['name']}",
            "",
            f"  predict   curl {predict} -T {example}",
            f"  top {top_k}     curl {predict} -F file=@{example} -F top_k={top_k}",
            f"  info      curl '{described}?customized=true'",
            f"  scale     {scale_command(model, workers + 1, addresses)}",
            "",
        ]
    if gateway:
        url, key = gateway.url, "-H 'X-API-Key: KEY' " if gateway.has_keys else ""
        lines += [
            f"The gateway is {url}/",
            "",
            f"  predict   curl {key}{url}/predict -F file=@{example}",
            f"  health    curl {url}/health",
            f"  info      curl {key}{url}/info",
            *([f"  gRPC      {gateway.grpc_url}"] if gateway.grpc_url else []),
            "",
        ]
    lines += [f"  metrics   curl {addresses.metrics.url}/metrics", "  stop      Ctrl-C"]
    for purpose, address in (
        ("predictions", addresses.inference),
        ("management", addresses.management),
        ("metrics", addresses.metrics),
    ):
        if address.host not in ("127.0.0.1", "localhost"):
            lines.append(f"  {purpose} are open to the network on {address.host}: see Security")
    return "\n".join(["", *lines, "", f"Ready after {seconds:.1f} s.", ""])

"""The service behind its gateway, for benchmarks that measure nothing else."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.images import load_rgb
from benchmarks.servers import Servers, Started, make_servers
from benchmarks.subjects import gateway
from handler.machine import available_cores
from handler.selection import Hardware, select
from handler.settings import Settings
from service.load.images import ImageRequest


@dataclass(frozen=True)
class Alone:
    """The running gateway, and what it is measured with."""

    target: Started
    servers: Servers
    images: Sequence[ImageRequest]


def chosen_precision() -> str:
    """What `auto` takes on this machine's CPU for an archive without an int8 model."""
    from handler.openvino_engine import has_bf16  # imports torch, which takes seconds

    hardware = Hardware(cpu_bf16=has_bf16())
    return select(Settings(device="cpu"), hardware, converted=True, int8=False).precision


@contextmanager
def started_alone(args: argparse.Namespace, **environ: str) -> Iterator[Alone]:
    """Package the model, and serve it with a worker a core.

    `args` are those of make_parser, `environ` settings of the gateway. Raises SetupFailed or
    StartFailed.
    """
    precision = chosen_precision()
    workers = available_cores()
    with make_servers(args, device="cpu", precision=precision, workers=workers) as servers:
        images = load_rgb(args.images)
        subject = gateway(servers.model, precision, servers.model_options(precision))
        subject = replace(subject, environ={**subject.environ, **environ})
        servers.package(precision)
        with servers.started(subject, Path(sys.executable), images[0], []) as target:
            yield Alone(target, servers, images)

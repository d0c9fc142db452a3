"""Command-line options. Standard library only: --help and mistakes need no set-up."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

DEFAULT_MODEL = "mobilenet_v2"
DEFAULT_VERSION = "1.0"
RANGES = {"workers": (1, 1024), "batch_size": (1, 1024), "max_batch_delay_ms": (1, 10_000)}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What decides an archive and how it is served. None and "auto": the user did not say."""

    models: tuple[str, ...] = ()
    version: str = DEFAULT_VERSION
    weights: str | None = None  # "pretrained", "untrained" or a file
    weights_prefix: str | None = None
    transform_input: str | None = None  # "on" or "off"
    recipe: str | None = None
    labels: str | None = None
    device: str = "auto"
    device_ids: tuple[int, ...] | None = None
    precision: str = "auto"
    calibration: str | None = None
    minimum_agreement: float = 0.97
    workers: int | None = None
    workers_per_gpu: int | None = None
    batch_size: int | None = None
    max_batch_delay_ms: int | None = None
    tuned: str | None = None  # a file; "auto": the one of each model in the store


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """The options of ./scripts/serve."""

    archives: tuple[str, ...] = ()
    host: str | None = None
    port: int | None = None
    management_port: int | None = None
    metrics_port: int | None = None
    log_format: str | None = None  # "json" or "text"
    gateway: bool = False
    gateway_port: int | None = None
    torch: str = "auto"


Options = TypeVar("Options", bound=ModelOptions)


def parse_serve(argv: Sequence[str] | None = None) -> ServeOptions:
    """Options of ./scripts/serve; exits with 2 and one line if they are wrong."""
    parser = serve_parser()
    options = read_options(ServeOptions, parser, parser.parse_args(argv))
    if options.gateway_port and not options.gateway:
        parser.error("--gateway-port goes with --gateway")
    if options.archives and not options.models:
        for name in "weights recipe labels calibration tuned".split():
            if getattr(options, name):
                parser.error(f"--{name} is for making an archive, and --archive has one made")
    return options


def parse_package(argv: Sequence[str] | None = None) -> ModelOptions:
    """Options of ./scripts/package; exits with 2 and one line if they are wrong."""
    parser = package_parser()
    return read_options(ModelOptions, parser, parser.parse_args(argv))


def serve_parser() -> argparse.ArgumentParser:
    parser = _parser("./scripts/serve", "Package models and serve them with TorchServe.")
    add_model_options(parser)
    _add_tuned(parser)
    parser.add_argument(
        "--archive",
        action="append",
        dest="archives",
        metavar="FILE|DIR",
        help="an archive to serve as it is, or all in a folder; in place of the default model, or "
        "beside --model, such as another version of it; repeatable (default: none)",
        default=[],
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host",
        type=_host,
        help="address for predictions; the others stay as config.properties has them "
        "(default: config.properties, 127.0.0.1)",
    )
    for option, purpose, default in (
        ("--port", "predictions", 8080),
        ("--management-port", "scaling and info", 8081),
        ("--metrics-port", "Prometheus", 8082),
    ):
        server.add_argument(
            option,
            metavar="PORT",
            type=number(1, 65535),
            help=f"{purpose} (default: config.properties, {default})",
        )
    server.add_argument(
        "--log-format",
        choices=["json", "text"],
        help="one JSON object a line, or lines for people (default: text at a terminal, else json)",
    )
    gateway = parser.add_argument_group("gateway")
    gateway.add_argument(
        "--gateway",
        action="store_true",
        help="start nginx in front of TorchServe as well; GATEWAY_ variables are its settings "
        "(default: off)",
    )
    gateway.add_argument(
        "--gateway-port",
        metavar="PORT",
        type=number(1, 65535),
        help="(default: GATEWAY_PORT, 8000)",
    )
    parser.add_argument(
        "--torch",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="which build of torch to install; auto: the CPU build if there is no GPU and "
        "PyTorch's own index answers, else the default build (default: %(default)s)",
    )
    return parser


def package_parser() -> argparse.ArgumentParser:
    parser = _parser("./scripts/package", "Make model_store/{model}.mar.")
    add_model_options(parser)
    _add_tuned(parser)
    parser.add_argument(
        "--version",
        type=_version,
        help="of the archive; another than the default makes {model}-{version}.mar, which "
        "./scripts/serve --archive serves beside (default: %(default)s)",
        default=DEFAULT_VERSION,
    )
    return parser


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides the content of an archive."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="NAME",
        help=f"any torchvision classifier, repeatable (default: {DEFAULT_MODEL})",
        default=[],
    )
    model.add_argument(
        "--weights",
        metavar="pretrained|untrained|FILE",
        help="FILE: a checkpoint with a state dict in it, of torch.save or safetensors "
        "(default: pretrained, or untrained if they cannot be downloaded)",
    )
    model.add_argument(
        "--weights-prefix",
        metavar="NAME",
        help="which of several sets of weights in the file: what is before its tensors' names, "
        "such as model_ema (default: the only one that fits)",
    )
    model.add_argument(
        "--transform-input",
        choices=["on", "off"],
        help="own weights of googlenet and inception_v3: on if torchvision built the network with "
        "pretrained weights, off if without (default: asked for)",
    )
    model.add_argument(
        "--recipe",
        metavar="ENTRY",
        help="torchvision weights entry whose transforms and labels apply "
        "(default: the model's DEFAULT)",
    )
    model.add_argument(
        "--labels",
        metavar="FILE",
        help="class names: one a line, numbered lines, CSV, JSON or YAML (default: the recipe's)",
    )
    model.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: a GPU if there is one (default: %(default)s)",
    )
    model.add_argument(
        "--device-ids",
        metavar="0,1",
        type=_device_ids,
        help="GPUs to use, counted among those that are visible "
        "(default: as in handler/configs, all)",
    )
    model.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="auto: the fastest there is: int8 with --calibration, bf16 if CPU or GPU have it, "
        "fp16 on other GPUs, fp32 (default: %(default)s)",
    )
    model.add_argument(
        "--calibration",
        metavar="DIR",
        help="images to make an int8 model with, and labels.csv to measure it with: file, class_id "
        "(default: no int8)",
    )
    model.add_argument(
        "--minimum-agreement",
        metavar="SHARE",
        type=_share,
        default=0.97,
        help="of held-out images whose best class int8 must leave as it is (default: %(default)s)",
    )
    model.add_argument(
        "--workers",
        metavar="N|auto",
        type=_workers,
        help="processes per model, on all GPUs together; auto: one a core on CPU, "
        "--workers-per-gpu on each GPU (default: auto)",
    )
    model.add_argument(
        "--workers-per-gpu",
        metavar="N",
        type=number(1, 64),
        help="if --workers does not say (default: the cores shared among the GPUs, at most 4)",
    )
    model.add_argument(
        "--batch-size",
        metavar="N",
        type=number(*RANGES["batch_size"]),
        help="most requests in a batch (default: as in handler/configs)",
    )
    model.add_argument(
        "--max-batch-delay-ms",
        metavar="MS",
        type=number(*RANGES["max_batch_delay_ms"]),
        help="how long a batch waits for more requests (default: as in handler/configs)",
    )


def _add_tuned(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tuned",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="what ./scripts/tune found to be fastest; other options go over it "
        "(default: not used; without FILE model_store/tuned-{model}.yaml)",
    )


def read_options(
    kind: type[Options], parser: argparse.ArgumentParser, args: argparse.Namespace
) -> Options:
    """What was parsed as typed options; exits with 2 if they cannot go together."""
    names = {spec.name for spec in fields(kind)}
    given: dict[str, Any] = {
        name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names
    }
    if not given["models"] and not given.get("archives"):
        given["models"] = (DEFAULT_MODEL,)
    options = kind(**given)
    if options.device == "cpu" and (options.device_ids or options.workers_per_gpu):
        parser.error("--device-ids and --workers-per-gpu are for GPUs, and --device is cpu")
    own = options.weights not in (None, "pretrained", "untrained")
    if not own and (options.weights_prefix is not None or options.transform_input):
        parser.error("--weights-prefix and --transform-input are for a file given as --weights")
    if options.transform_input and not set(options.models) <= {"googlenet", "inception_v3"}:
        parser.error("--transform-input is for googlenet and inception_v3")
    if len(options.models) > 1 and (own or options.recipe or options.labels):
        parser.error("a weights file, --recipe and --labels go with one --model")
    if len(options.models) > 1 and options.tuned not in (None, "auto"):
        parser.error("a file after --tuned goes with one --model")
    return options


def to_argv(options: ModelOptions) -> list[str]:
    """The arguments from which ./scripts/serve reads these options."""
    argv = [f"--model={model}" for model in options.models]
    for spec in fields(ModelOptions):
        value = getattr(options, spec.name)
        if spec.name not in ("models", "version") and value != spec.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            argv.append(f"--{spec.name.replace('_', '-')}={text}")
    return argv


def number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number in a range."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, got {text!r}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _workers(text: str) -> int | None:
    return None if text == "auto" else number(*RANGES["workers"])(text)


def _device_ids(text: str) -> tuple[int, ...]:
    ids = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in ids) or len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"must be numbers like 0,1, each once, got {text!r}")
    return tuple(map(int, ids))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be 0 to 1, got {text!r}")
    return share


def _version(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", text):
        raise argparse.ArgumentTypeError(
            f"must be at most 32 letters, digits, dots, dashes and underscores, got {text!r}"
        )
    return text


def _host(text: str) -> str:
    if not text or ":" in text or "/" in text:
        raise argparse.ArgumentTypeError(
            f"must be a host name or an IPv4 address (TorchServe has no IPv6), got {text!r}"
        )
    return text

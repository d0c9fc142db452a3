"""Command-line options. Standard library only: --help and mistakes need no set-up."""

import argparse
import re
from collections.abc import Callable, Sequence

DEFAULT_MODEL = "mobilenet_v2"
DEFAULT_VERSION = "1.0"
RANGES = {"workers": (1, 1024), "batch_size": (1, 1024), "max_batch_delay_ms": (1, 10_000)}


def parse_serve(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of ./scripts/serve; exits with 2 and one line where they are wrong."""
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
        default=argparse.SUPPRESS,
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host",
        type=_host,
        help="address for predictions; the others stay as config.properties has them "
        "(default: config.properties, 127.0.0.1)",
        default=argparse.SUPPRESS,
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
            default=argparse.SUPPRESS,
        )
    server.add_argument(
        "--log-format",
        choices=["json", "text"],
        help="one JSON object a line, or lines for people (default: text at a terminal, else json)",
        default=argparse.SUPPRESS,
    )
    gateway = parser.add_argument_group("gateway")
    gateway.add_argument(
        "--gateway",
        action="store_true",
        help="start nginx in front of TorchServe as well; GATEWAY_ variables are its settings",
    )
    gateway.add_argument(
        "--gateway-port",
        metavar="PORT",
        type=number(1, 65535),
        help="(default: GATEWAY_PORT, 8000)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--torch",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="which build of torch to install; auto: the CPU build where there is no GPU "
        "and PyTorch's own index answers, else the default build",
    )
    args = parser.parse_args(argv)
    optional = "host port management_port metrics_port log_format gateway_port"
    for name in optional.split():
        setattr(args, name, getattr(args, name, None))
    args.archives = getattr(args, "archives", [])
    if args.gateway_port and not args.gateway:
        parser.error("--gateway-port goes with --gateway")
    check_model_options(parser, args)
    return args


def parse_package(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of ./scripts/package."""
    parser = _parser("./scripts/package", "Make model_store/{model}.mar.")
    add_model_options(parser)
    _add_tuned(parser)
    parser.add_argument(
        "--version",
        type=_version,
        help="of the archive; another than the default makes {model}-{version}.mar, which "
        "./scripts/serve --archive serves beside",
        default=DEFAULT_VERSION,
    )
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    return args


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides the content of an archive."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="NAME",
        help=f"any torchvision classifier, repeatable (default: {DEFAULT_MODEL})",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--weights",
        metavar="pretrained|untrained|FILE",
        help="FILE: a checkpoint with a state dict in it, of torch.save or safetensors "
        "(default: pretrained, or untrained where they cannot be downloaded)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--weights-prefix",
        metavar="NAME",
        help="which of several sets of weights in the file: what is before its tensors' names, "
        "such as model_ema (default: the only one that fits)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--transform-input",
        choices=["on", "off"],
        help="own weights of googlenet and inception_v3: on if torchvision built the network with "
        "pretrained weights, off if without (default: asked for)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--recipe",
        metavar="ENTRY",
        help="torchvision weights entry whose transforms and labels apply "
        "(default: the model's DEFAULT)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--labels",
        metavar="FILE",
        help="class names: one a line, numbered lines, CSV, JSON or YAML (default: the recipe's)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: a GPU where there is one",
    )
    model.add_argument(
        "--device-ids",
        metavar="0,1",
        type=_device_ids,
        help="GPUs to use, counted among those that are visible "
        "(default: as in handler/configs, all)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="auto: the fastest there is: int8 with --calibration, bf16 where CPU or GPU have it, "
        "fp16 on other GPUs, fp32",
    )
    model.add_argument(
        "--calibration",
        metavar="DIR",
        help="images to make an int8 model with, and labels.csv to measure it with: file, class_id "
        "(default: no int8)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--minimum-agreement",
        metavar="SHARE",
        type=_share,
        default=0.97,
        help="of held-out images whose best class int8 must leave as it is",
    )
    model.add_argument(
        "--workers",
        default="auto",
        metavar="N|auto",
        type=_workers,
        help="processes per model, on all GPUs together; auto: one a core on CPU, "
        "--workers-per-gpu on each GPU",
    )
    model.add_argument(
        "--workers-per-gpu",
        metavar="N",
        type=number(1, 64),
        help="where --workers does not say (default: the cores shared among the GPUs, at most 4)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--batch-size",
        metavar="N",
        type=number(*RANGES["batch_size"]),
        help="most requests in a batch (default: as in handler/configs)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--max-batch-delay-ms",
        metavar="MS",
        type=number(*RANGES["max_batch_delay_ms"]),
        help="how long a batch waits for more requests (default: as in handler/configs)",
        default=argparse.SUPPRESS,
    )


def _add_tuned(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tuned",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="what ./scripts/tune found to be fastest; other options go over it "
        "(default: not used; without FILE model_store/tuned-{model}.yaml)",
        default=argparse.SUPPRESS,
    )


def check_model_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what was not given, and refuse what cannot go together."""
    args.version = getattr(args, "version", DEFAULT_VERSION)
    optional = """
        models weights weights_prefix transform_input recipe labels device_ids calibration
        workers_per_gpu batch_size max_batch_delay_ms tuned
    """
    for name in optional.split():
        setattr(args, name, getattr(args, name, None))
    default = [] if getattr(args, "archives", None) else [DEFAULT_MODEL]
    args.models = list(dict.fromkeys(args.models or default))
    if not args.models:
        for name in "weights recipe labels calibration tuned".split():
            if getattr(args, name):
                parser.error(f"--{name} is for making an archive, and --archive has one made")
    if args.device == "cpu" and (args.device_ids or args.workers_per_gpu):
        parser.error("--device-ids and --workers-per-gpu are for GPUs, and --device is cpu")
    own = args.weights not in (None, "pretrained", "untrained")
    if not own and (args.weights_prefix is not None or args.transform_input):
        parser.error("--weights-prefix and --transform-input are for a file given as --weights")
    if args.transform_input and not set(args.models) <= {"googlenet", "inception_v3"}:
        parser.error("--transform-input is for googlenet and inception_v3")
    if len(args.models) > 1 and (own or args.recipe or args.labels):
        parser.error("a weights file, --recipe and --labels go with one --model")
    if len(args.models) > 1 and args.tuned not in (None, "auto"):
        parser.error("a file after --tuned goes with one --model")


def package_argv(args: argparse.Namespace, models: Sequence[str]) -> list[str]:
    """The arguments with which ./scripts/package makes some of the models of `args`."""
    names = """
        weights weights_prefix transform_input recipe labels device device_ids precision calibration
        minimum_agreement workers workers_per_gpu batch_size max_batch_delay_ms tuned
    """
    given = {name: getattr(args, name) for name in names.split()}
    return [f"--model={model}" for model in models] + [
        f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None
    ]


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


def _workers(text: str) -> str | int:
    return text if text == "auto" else number(*RANGES["workers"])(text)


def _device_ids(text: str) -> str:
    """Checked, and still text: as it is passed on."""
    ids = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in ids) or len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"must be numbers like 0,1, each once, got {text!r}")
    return text


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

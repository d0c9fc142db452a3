"""Command-line options. Standard library only: --help and mistakes need no set-up."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from service.arguments import (
    PORT,
    WORKERS,
    Parser,
    device_ids,
    host,
    model_version,
    number,
    registered_name,
    sha256,
    share,
    weights,
    worker_count,
)
from service.registry.references import Url, parse_reference

DEFAULT_MODEL = "mobilenet_v2"
DEFAULT_VERSION = "1.0"
NOT_SERVED = ("version", "sign", "log_to")  # options of ./scripts/package alone
RANGES = {"workers": WORKERS, "batch_size": (1, 1024), "max_batch_delay_ms": (0, 10_000)}


def _option(
    text: str, metavar: str | None = None, default: Any = None, flag: str = "", **argument: Any
) -> Any:
    """A field that is an option: its help and argparse's other arguments.

    `flag` is its name on the command line if that is not the field's.
    """
    argument |= {"help": text} | ({"metavar": metavar} if metavar else {})
    return field(default=default, metadata={"flag": flag, "argument": argument})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What decides an archive and how it is served. None and "auto": the user did not say."""

    models: tuple[str, ...] = _option(
        f"any torchvision classifier, repeatable (default: {DEFAULT_MODEL})",
        "NAME",
        default=(),
        flag="--model",
        action="append",
    )
    weights: str | None = _option(
        "FILE: a checkpoint with a state dict in it, of torch.save or safetensors; such a file "
        "behind https://, s3:// or gs://; mlflow:models:/NAME@ALIAS, mlflow:models:/NAME/VERSION "
        "or mlflow:runs:/RUN_ID/PATH "
        "(default: pretrained, or untrained if they cannot be downloaded)",
        "pretrained|untrained|FILE|URL",
        type=weights,
    )
    weights_sha256: str | None = _option(
        "of the file behind a URL, for which it must be given, or of MLflow's weights "
        "(default: of MLflow's weights their tag sha256, if they have it)",
        "HEX",
        type=sha256,
    )
    weights_prefix: str | None = _option(
        "which of several sets of weights in the file: what is before its tensors' names, "
        "such as model_ema (default: the only one that fits)",
        "NAME",
    )
    transform_input: str | None = _option(
        "own weights of googlenet and inception_v3: on if torchvision built the network with "
        "pretrained weights, off if without (default: asked for)",
        choices=["on", "off"],
    )
    recipe: str | None = _option(
        "torchvision weights entry whose transforms and labels apply "
        "(default: the model's DEFAULT)",
        "ENTRY",
    )
    labels: str | None = _option(
        "class names: one a line, numbered lines, CSV, JSON or YAML (default: the recipe's)", "FILE"
    )
    device: str = _option(
        "auto: a GPU if there is one (default: %(default)s)",
        default="auto",
        choices=["auto", "cpu", "cuda"],
    )
    device_ids: tuple[int, ...] | None = _option(
        "GPUs to use, counted among those that are visible (default: as in handler/configs, all)",
        "0,1",
        type=device_ids,
    )
    precision: str = _option(
        "auto: the fastest that gives the network's own answers, of int8 with --calibration, bf16 "
        "if the CPU has it and fp32, or of fp16, bf16 and fp32 on a GPU (default: %(default)s)",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
    )
    calibration: str | None = _option(
        "images to make an int8 model with, and labels.csv to measure it with: file, class_id "
        "(default: no int8)",
        "DIR",
    )
    calibrate: str | None = _option(
        "100 or more labelled images, others than those of --calibration, to calibrate the "
        "confidence with, and labels.csv: file, class_id (default: not calibrated)",
        "DIR",
    )
    golden: str | None = _option(
        "images of yours that each worker has to classify as the reference does, and labels.csv: "
        "file, label (default: drawn ones alone)",
        "DIR",
    )
    golden_logits: str | None = _option(
        "your own logits of --golden: .npy, .safetensors or .csv (default: not compared)", "FILE"
    )
    minimum_agreement: float = _option(
        "of held-out images whose best class int8 must leave as it is (default: %(default)s)",
        "SHARE",
        default=0.97,
        type=share,
    )
    workers: int | None = _option(
        "processes per model, on all GPUs together; auto: one a core on CPU, "
        "--workers-per-gpu on each GPU (default: auto)",
        "N|auto",
        type=worker_count,
    )
    workers_per_gpu: int | None = _option(
        "if --workers does not say (default: half of the cores, shared among the GPUs, but at most "
        "8, and one for each 2 GiB of a GPU's memory)",
        "N",
        type=number(1, 64),
    )
    batch_size: int | None = _option(
        "most requests in a batch (default: as in handler/configs)",
        "N",
        type=number(*RANGES["batch_size"]),
    )
    max_batch_delay_ms: int | None = _option(
        "how long a batch waits for more requests; 0: not at all, and two make a batch "
        "(default: as in handler/configs)",
        "MS",
        type=number(*RANGES["max_batch_delay_ms"]),
    )
    tuned: str | None = _option(  # a file; "auto": the one of each model in the store
        "what ./scripts/tune found to be fastest; other options go over it "
        "(default: not used; without FILE model_store/tuned-{model}.yaml)",
        "FILE",
        nargs="?",
        const="auto",
    )
    version: str = _option(
        "of the archive; another than the default makes {model}-{version}.mar, which "
        "./scripts/serve --archive serves beside (default: %(default)s)",
        default=DEFAULT_VERSION,
        type=model_version,
    )
    sign: str | None = _option(
        "sign the archive with this private key (Ed25519, PEM), also if it is up to date "
        "(default: no signature)",
        "KEY.pem",
    )
    log_to: str | None = _option(  # the model's name
        "log the archive, its weights, labels and card to MLflow as a new version of this "
        "registered model, also if it is up to date (default: not logged)",
        "mlflow:NAME",
        type=registered_name,
    )


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """The options of ./scripts/serve."""

    archives: tuple[str, ...] = _option(
        "an archive to serve as it is, or all in a folder; in place of the default model, or "
        "beside --model, such as another version of it; repeatable (default: none)",
        "FILE|DIR",
        default=(),
        flag="--archive",
        action="append",
    )
    host: str | None = _option(
        "address for predictions; the others stay as config.properties has them "
        "(default: config.properties, 127.0.0.1)",
        type=host,
    )
    port: int | None = _option("predictions (default: config.properties, 8080)", "PORT", type=PORT)
    management_port: int | None = _option(
        "scaling and info (default: config.properties, 8081)", "PORT", type=PORT
    )
    metrics_port: int | None = _option(
        "Prometheus (default: config.properties, 8082)", "PORT", type=PORT
    )
    log_format: str | None = _option(
        "one JSON object a line, or lines for people (default: text at a terminal, else json)",
        choices=["json", "text"],
    )
    require_signed: str | None = _option(
        "the public key of whoever has to have signed every archive (./scripts/package --sign); "
        "off: nobody; with CLASSIFIER_ENV=production one of the two has to be said (default: off)",
        "PUBLIC.pem|off",
    )
    gateway: bool = _option(
        "start nginx in front of TorchServe as well; GATEWAY_ variables are its settings "
        "(default: off)",
        default=False,
        action="store_true",
    )
    gateway_port: int | None = _option("(default: GATEWAY_PORT, 8000)", "PORT", type=PORT)
    torch: str = _option(
        "which build of torch to install; auto: the CPU build if there is no GPU and "
        "PyTorch's own index answers, else the default build (default: %(default)s)",
        default="auto",
        choices=["auto", "cpu", "cuda"],
    )


Options = TypeVar("Options", bound=ModelOptions)


# --- Commands


def parse_serve(argv: Sequence[str] | None = None) -> ServeOptions:
    """Options of ./scripts/serve; exits with 2 and one line if they are wrong."""
    parser = serve_parser()
    options = read_options(ServeOptions, parser, parser.parse_args(argv))
    if options.gateway_port and not options.gateway:
        parser.error("--gateway-port goes with --gateway")
    if options.archives and not options.models:
        made_with = "weights recipe labels calibration calibrate golden golden_logits tuned"
        for name in made_with.split():
            if getattr(options, name):
                parser.error(f"--{name} is for making an archive, and --archive has one made")
    return options


def parse_package(argv: Sequence[str] | None = None) -> ModelOptions:
    """Options of ./scripts/package; exits with 2 and one line if they are wrong."""
    parser = package_parser()
    return read_options(ModelOptions, parser, parser.parse_args(argv))


def serve_parser() -> argparse.ArgumentParser:
    about = "Package models and serve them with TorchServe."
    parser = Parser("./scripts/serve", description=about, allow_abbrev=False)
    add_options(parser, ServeOptions, without=NOT_SERVED)
    return parser


def package_parser() -> argparse.ArgumentParser:
    about = "Make model_store/{model}.mar."
    parser = Parser("./scripts/package", description=about, allow_abbrev=False)
    add_options(parser, ModelOptions)
    return parser


def add_options(
    parser: argparse.ArgumentParser, kind: type[ModelOptions], without: Collection[str] = ()
) -> None:
    """The options that are the fields of `kind`, except those in `without`."""
    of_models = {spec.name for spec in fields(ModelOptions)}
    model, server = (parser.add_argument_group(title) for title in ("model", "server"))
    for spec in fields(kind):
        if spec.name not in without:
            (model if spec.name in of_models else server).add_argument(
                spec.metadata["flag"] or _flag(spec.name),
                dest=spec.name,
                default=[] if spec.default == () else spec.default,  # argparse appends to lists
                **spec.metadata["argument"],
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
    reference = parse_reference(given["weights"])
    in_mlflow = reference is not None and not isinstance(reference, Url)  # which knows the model
    if not given["models"] and not given.get("archives") and not in_mlflow:
        given["models"] = (DEFAULT_MODEL,)
    options = kind(**given)
    if options.device == "cpu" and (options.device_ids or options.workers_per_gpu):
        parser.error("--device-ids and --workers-per-gpu are for GPUs, and --device is cpu")
    own = options.weights not in (None, "pretrained", "untrained")
    if not own and (options.weights_prefix is not None or options.transform_input):
        parser.error("--weights-prefix and --transform-input are for a file given as --weights")
    if isinstance(reference, Url) and not options.weights_sha256:
        parser.error(f"{reference.shown} needs --weights-sha256 HEX: the digest it must have")
    if options.weights_sha256 and not reference:
        parser.error("--weights-sha256 is for --weights of a URL or of mlflow:")
    if options.transform_input and not set(options.models) <= {"googlenet", "inception_v3"}:
        parser.error("--transform-input is for googlenet and inception_v3")
    if len(options.models) > 1 and (own or options.recipe or options.labels or options.golden):
        parser.error("a weights file, --golden, --recipe and --labels go with one --model")
    if options.golden_logits and not options.golden:
        parser.error("--golden-logits goes with --golden")
    if len(options.models) > 1 and options.log_to:
        parser.error("--log-to goes with one --model")
    if len(options.models) > 1 and options.tuned not in (None, "auto"):
        parser.error("a file after --tuned goes with one --model")
    return options


def to_argv(options: ModelOptions) -> list[str]:
    """The arguments from which ./scripts/serve reads these options."""
    argv = [f"--model={model}" for model in options.models]
    for spec in fields(ModelOptions):
        value = getattr(options, spec.name)
        if spec.name not in ("models", *NOT_SERVED) and value != spec.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            argv.append(f"{_flag(spec.name)}={text}")
    return argv


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

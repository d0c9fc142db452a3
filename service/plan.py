"""What a start is going to do, decided once: options, environment, files -> one ServicePlan.

Precedence, from the lowest: handler/configs/default.yaml, gpu.yaml, the model's own file there, the
file of `--tuned`, the options. The environment goes over the handler's settings, as in all workers.
Nothing after this module reads options, and nothing here needs torch.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.machine import available_cores, count_gpus, gpu_memory
from handler.model_card import ModelCard
from handler.rules import Rule, check_mapping
from handler.settings import Settings
from service.archive.mar import CONFIG_FILE, read_card, read_config, read_target
from service.archive.signing import read_public_key
from service.gateway.settings import GatewaySettings
from service.options import DEFAULT_VERSION, ModelOptions, ServeOptions
from service.registry.fetching import Origin
from service.torchserve.config import ROOT, ServerConfig
from service.torchserve.gpus import check_gpus, gpu_environment
from service.tuning.tuned import describe_differences, find_tuned

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

CONFIGS = ROOT / "handler" / "configs"

MAX_WORKERS_PER_GPU = 8
EXPLANATION_BYTES = 75_000  # at most, of one image: handler/explanations.py, in base64
GPU_WORKER_BYTES = 2 * 2**30  # of a GPU's memory: a CUDA context, a model and its graphs

# What handler/configs/*.yaml may say, of what org.pytorch.serve.archive.model.ModelConfig reads.
# Not workers and device, which are options, nor clientTimeoutInMills, which leaves clients without
# an answer, nor what is for other kinds of models. TorchServe does not read `handler`: it is ours.
MODEL_CONFIG = dict.fromkeys(
    "batchSize responseTimeout startupTimeout maxRetryTimeoutInSec jobQueueSize".split(),
    Rule(type=int, low=1),
) | {
    "maxBatchDelay": Rule(type=int, low=0),
    "deviceIds": Rule(type=list[int]),
    "handler": Rule(type=dict | None),
}

# The same of an archive, which has its maker's options in it. No hash covers it.
ARCHIVED_CONFIG = MODEL_CONFIG | {
    "deviceType": Rule(type=str, choices=("cpu", "gpu")),
    "minWorkers": Rule(type=int, low=1),
    "maxWorkers": Rule(type=int, low=1),
    "handler": Rule(type=dict),
}


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """How one archive is served."""

    name: str
    version: str
    archive: Path
    card: ModelCard | None  # of the archive as it is now; None if there is none yet, or a damaged
    config: Mapping[str, Any]  # TorchServe's model configuration: model-config.yaml
    settings: Settings  # the handler's: those in `config`, under the environment
    server: ServerConfig

    @property
    def served_as(self) -> str:
        """What the management port calls it."""
        return f"{self.name}/{self.version}"

    def check_limits(self, labels: Sequence[str]) -> None:
        """Raise InvalidSettings if the handler's limits do not fit into TorchServe's.

        The largest answer is that of a full batch of the most images, explained, with every class,
        whose labels V2 may give three times, once in a set: TorchServe kills the worker that
        exceeds max_response_size.
        """
        batch, images = self.config["batchSize"], self.settings.max_images
        image = EXPLANATION_BYTES + sum(96 + 3 * len(label.encode()) for label in labels)
        if (answer := batch * images * image) > (limit := self.server.max_response_size):
            fitting = limit // (images * image)
            remedy = f"use --batch-size {fitting}" if fitting else "lower max_images"
            raise InvalidSettings(
                f"batchSize {batch} x max_images {images} x {len(labels)} classes may answer "
                f"{answer} bytes, max_response_size is {limit}: {remedy}"
            )
        if self.settings.max_image_bytes > (limit := self.server.max_request_size):
            raise InvalidSettings(
                f"max_image_bytes is {self.settings.max_image_bytes}, max_request_size only {limit}"
            )


@dataclass(frozen=True, kw_only=True)
class PackagePlan(ModelPlan):
    """A model whose archive is made here, unless it is up to date: what goes into it."""

    weights: str | None  # "pretrained", "untrained", a file; None: pretrained if there are any
    origin: Origin | None  # of a file that was fetched from elsewhere
    weights_prefix: str | None
    transform_input: str | None  # "on" or "off"
    recipe: str | None  # torchvision's entry; None: the model's DEFAULT
    labels: Path | None  # None: the recipe's
    calibration: Path | None
    calibrate: Path | None  # labelled images for the confidence
    golden: Path | None  # images of the trainer's
    golden_logits: Path | None  # and the trainer's logits for them
    minimum_agreement: float
    sign: Path | None  # the private key
    notes: tuple[str, ...]  # for the operator: what is not as the file of --tuned says

    @property
    def served_as(self) -> str:
        return self.name

    @property
    def holds_openvino(self) -> bool:
        """Whether the archive holds the model for OpenVINO. The environment has no say in it."""
        engine = self.config["handler"].get("engine", "auto")
        return engine in ("auto", "openvino") and self.config.get("deviceType") != "gpu"


@dataclass(frozen=True, kw_only=True)
class ServicePlan:
    """One start of ./scripts/serve."""

    server: ServerConfig
    packages: tuple[PackagePlan, ...]
    given: tuple[ModelPlan, ...]  # archives that are served as they are
    public_key: "Ed25519PublicKey | None"  # of whoever must have signed the archives
    gateway: GatewaySettings | None
    environ: Mapping[str, str]  # what Java's environment has besides ours
    notes: tuple[str, ...]  # for the operator

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        return *self.packages, *self.given


def plan_service(options: ServeOptions, origin: Origin | None = None) -> ServicePlan:
    """Decide everything about a start. Raises SetupError for what cannot be.

    `origin` of the weights, if they were fetched (service.registry.fetching).
    """
    server = ServerConfig.load(
        options.host, options.port, options.management_port, options.metrics_port
    )
    server.check_start()
    gpus = server.usable_gpus()
    warning = check_gpus(options.device, count_gpus(), os.environ)
    packages = tuple(plan_package(name, options, server, origin) for name in options.models)
    taken = {f"{plan.name}/{plan.version}" for plan in packages}
    given = tuple(_plan_given(options, server, taken))
    for plan in (*packages, *given):
        check_device_ids(plan.config, gpus)
    notes = [note for plan in packages for note in plan.notes]
    return ServicePlan(
        server=server,
        packages=packages,
        given=given,
        public_key=_plan_public_key(options.require_signed, [*packages, *given]),
        gateway=_plan_gateway(options, server, [*packages, *given]) if options.gateway else None,
        environ=server.environment() | gpu_environment(options.device, gpus, os.environ),
        notes=tuple([warning, *notes] if warning else notes),
    )


def plan_package(
    name: str, options: ModelOptions, server: ServerConfig, origin: Origin | None = None
) -> PackagePlan:
    """Decide how an archive is made and served. Raises InvalidSettings."""
    device = os.environ.get("CLASSIFIER_DEVICE", options.device)
    gpu = device != "cpu" and server.usable_gpus() > 0
    config = _read_configs("default", *["gpu"] * gpu, name)
    asked, notes = options, []
    if found := find_tuned(name, options.tuned, server.model_store):
        path, tuned = found
        notes = describe_differences(path, tuned, options)
        config["handler"] |= asdict(tuned.handler)
        options = tuned.fill_in(options)
    config, settings = _under_options(config, options, asked, server)
    other = "" if options.version == DEFAULT_VERSION else f"-{options.version}"
    archive = server.model_store / f"{name}{other}.mar"
    return PackagePlan(
        name=name,
        version=options.version,
        archive=archive,
        card=read_card(archive),
        config=config,
        settings=settings,
        server=server,
        weights=options.weights,
        origin=origin,
        weights_prefix=options.weights_prefix,
        transform_input=options.transform_input,
        recipe=options.recipe,
        labels=Path(options.labels) if options.labels else None,
        calibration=Path(options.calibration) if options.calibration else None,
        calibrate=Path(options.calibrate) if options.calibrate else None,
        golden=Path(options.golden) if options.golden else None,
        golden_logits=Path(options.golden_logits) if options.golden_logits else None,
        minimum_agreement=options.minimum_agreement,
        sign=Path(options.sign) if options.sign else None,
        notes=tuple(notes),
    )


def _plan_given(
    options: ServeOptions, server: ServerConfig, taken: set[str]
) -> Iterator[ModelPlan]:
    """The archives of `--archive`: their own configuration, under the options of this start.

    `taken` is what is served already. Raises InvalidModel for an archive that is missing or of
    others', SetupError for a version that is taken, InvalidSettings if an archive's own settings,
    those of the start and its labels do not go together.
    """
    for path in map(Path, options.archives):
        archives = sorted(path.glob("*.mar")) if path.is_dir() else [path]
        if not archives:
            raise SetupError(f"--archive: there is no .mar file in {path}")
        for archive in archives:
            name, version = read_target(archive)
            target = f"{name}/{version}"
            if target in taken:
                raise SetupError(f"--archive: {archive} is {target}, which is served already")
            taken.add(target)
            card = read_card(archive)
            if card is None:
                raise InvalidModel(
                    f"{archive} is damaged, or was not made by ./scripts/package as it is now"
                )
            own = _archived_config(archive)
            config, settings = _under_options(own, options, options, server)
            if not (card.weights.trained or settings.allow_untrained):
                raise InvalidSettings(
                    f"{archive.name} is untrained, and allow_untrained is false (CLASSIFIER_ENV is "
                    f"{settings.env})"
                )
            plan = ModelPlan(
                name=name,
                version=version,
                archive=archive,
                card=card,
                config=config,
                settings=settings,
                server=server,
            )
            plan.check_limits(card.labels)
            yield plan


def _archived_config(archive: Path) -> dict[str, Any]:
    """The configuration in an archive, held against the rules. Raises InvalidSettings."""
    try:
        config = check_mapping(ARCHIVED_CONFIG, read_config(archive))
        for name in ("batchSize", "handler"):
            if name not in config:
                raise InvalidSettings(f"{name} is missing")
    except Exception as exc:  # PyYAML and zipfile raise many types
        reason = " ".join(str(exc).split())
        raise InvalidSettings(f"{archive}: {CONFIG_FILE}: {reason}") from exc
    return config


def _plan_public_key(asked: str | None, models: Sequence[ModelPlan]) -> "Ed25519PublicKey | None":
    """The key of `--require-signed`, about which production has to say something."""
    if asked is None and any(model.settings.env == "production" for model in models):
        raise InvalidSettings(
            "CLASSIFIER_ENV is production, which serves signed archives: give --require-signed "
            "PUBLIC.pem, or --require-signed off if nobody else can write where they lie"
        )
    return None if asked in (None, "off") else read_public_key(Path(asked))


def _plan_gateway(
    options: ServeOptions, server: ServerConfig, models: Sequence[ModelPlan]
) -> GatewaySettings:
    """The gateway to what is served here, if GATEWAY_ variables say nothing else."""
    here = {
        "GATEWAY_UPSTREAMS": server.addresses.inference.url.removeprefix("http://"),
        "GATEWAY_MANAGEMENT": server.addresses.management.url.removeprefix("http://"),
        "GATEWAY_MODELS": ",".join(dict.fromkeys(plan.name for plan in models)),
        "GATEWAY_MAX_BODY_BYTES": str(server.max_request_size),
    }
    port = {"GATEWAY_PORT": str(options.gateway_port)} if options.gateway_port else {}
    return GatewaySettings.load(here | os.environ | port)


def _under_options(
    config: Mapping[str, Any], options: ModelOptions, asked: ModelOptions, server: ServerConfig
) -> tuple[dict[str, Any], Settings]:
    """A configuration with options over it, and its settings.

    `asked` are the options without what a tuned file has filled in.
    """
    config, handler = dict(config), dict(config["handler"])
    if options.batch_size:
        config["batchSize"] = options.batch_size
    if options.max_batch_delay_ms is not None:
        config["maxBatchDelay"] = options.max_batch_delay_ms
    if options.device != "auto":
        config["deviceType"] = "gpu" if options.device == "cuda" else "cpu"
        handler["device"] = options.device
    if options.device_ids:
        config["deviceIds"] = list(options.device_ids)
    if options.precision != "auto":
        handler["precision"] = options.precision
    config["handler"] = handler
    settings = Settings.load(handler)
    for name, option in (("device", asked.device), ("precision", asked.precision)):
        if option not in ("auto", getattr(settings, name)):
            raise InvalidSettings(
                f"--{name} {option} and CLASSIFIER_{name.upper()}={getattr(settings, name)} differ"
            )
    workers = asked.workers if asked.workers_per_gpu else options.workers
    if workers is None:
        gpus = 0 if settings.device == "cpu" else server.usable_gpus()
        used = len(config.get("deviceIds", range(gpus))) if gpus else 0
        workers = workers_for(used, options.workers_per_gpu)
    # TorchServe ignores either of the two without the other, and takes one worker a core instead.
    return config | {"minWorkers": workers, "maxWorkers": workers}, settings


def workers_for(gpus: int, per_gpu: int | None = None) -> int:
    """How many workers a model has if nobody says: one a core, or some on each GPU.

    Several on a GPU, so that one decodes while another computes: of 1, 4 and 8 on an H100 with 16
    cores, 8 were the fastest. There are no more than half the GPU's share of the cores, because
    TorchServe's frontend takes about as much of them as the workers, and no more than its memory
    holds.
    """
    cores = available_cores()
    if gpus == 0:
        return cores
    if per_gpu is None:
        memory = gpu_memory()
        fitting = MAX_WORKERS_PER_GPU if memory is None else memory // GPU_WORKER_BYTES
        per_gpu = max(1, min(MAX_WORKERS_PER_GPU, cores // gpus // 2, fitting))
    return gpus * per_gpu


def check_device_ids(config: Mapping[str, Any], gpus: int) -> None:
    """Raise InvalidSettings for a GPU that is not there: TorchServe would ignore the whole list.

    The ids are positions among the visible GPUs, as torch counts them.
    """
    for number in config.get("deviceIds", ()) if gpus else ():
        if not 0 <= number < gpus:
            raise InvalidSettings(f"deviceIds must be 0 to {gpus - 1}, the GPUs here, got {number}")


def _read_configs(*names: str) -> dict[str, Any]:
    """Files of handler/configs, each over those before it. Raises InvalidSettings."""
    config: dict[str, Any] = {}
    handler: dict[str, Any] = {}
    for name in names:
        path = CONFIGS / f"{name}.yaml"
        if path.exists():
            content = _read_yaml(path)
            handler |= content.pop("handler", None) or {}
            config |= content
    return config | {"handler": handler}


def _read_yaml(path: Path) -> dict[str, Any]:
    """A checked file of handler/configs: TorchServe would ignore unknown keys and odd values."""
    try:
        content = yaml.safe_load(path.read_bytes()) or {}
    except Exception as exc:  # PyYAML raises many types: KeyError for `!!bool x`
        reason = " ".join(str(exc).split())
        raise InvalidSettings(f"{path.name} is not valid YAML: {reason}") from exc
    try:
        return check_mapping(MODEL_CONFIG, content)
    except InvalidSettings as exc:
        raise InvalidSettings(f"{path.name}: {exc}") from exc

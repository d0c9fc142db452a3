"""The file that ./scripts/tune writes and `--tuned` reads: the best configuration and its facts.

It goes over handler/configs/*.yaml. Options and the environment go over it, and the operator is
told.
"""

import os
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path

import yaml

from handler.errors import InvalidSettings, SetupError
from handler.machine import available_cores, cpu_model
from handler.rules import build, setting
from handler.settings import PREFIX, Settings
from service.options import RANGES, ModelOptions

COMMENT = "# Written by ./scripts/tune, for ./scripts/serve --tuned.\n"


@dataclass(frozen=True, kw_only=True)
class TunedOptions:
    """What options of ./scripts/serve say as well."""

    device: str
    precision: str
    workers: int = setting(MISSING, "", *RANGES["workers"])
    batch_size: int = setting(MISSING, "", *RANGES["batch_size"])
    max_batch_delay_ms: int = setting(MISSING, "", *RANGES["max_batch_delay_ms"])


@dataclass(frozen=True, kw_only=True)
class TunedHandler:
    """What settings of the handler say as well."""

    engine: str
    threads: int
    max_forward: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """On what machine and how the configuration was measured."""

    slo_p99_ms: float
    throughput_rps: float | None = None  # None while it is being measured
    p99_ms: float | None = None
    concurrency: int | None = None  # clients, each with one request at a time
    date: str
    cpu: str
    cores: int
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The content of the file."""

    model: str
    options: TunedOptions
    handler: TunedHandler
    facts: Facts

    def write(self, path: Path) -> None:
        """Raises SetupError."""
        text = COMMENT + yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, "utf-8")
            part.replace(path)
        except OSError as exc:
            raise SetupError(f"{path} cannot be written: {exc.strerror}") from exc

    def fill_in(self, options: ModelOptions) -> ModelOptions:
        """The options of a command, with what the file says for those that say nothing."""
        tuned = asdict(self.options).items()
        return replace(
            options, **{name: value for name, value in tuned if not _is_given(options, name)}
        )


def tuned_path(model: str, choice: str, store: Path) -> Path:
    """The file that `--tuned` names; "auto": the one that ./scripts/tune writes by itself."""
    return store / f"tuned-{model}.yaml" if choice == "auto" else Path(choice)


def find_tuned(model: str, choice: str | None, store: Path) -> tuple[Path, Tuned] | None:
    """The file of a model and what it says; None without `--tuned`. Raises InvalidSettings."""
    if choice is None:
        return None
    path = tuned_path(model, choice, store)
    return path, read_tuned(path, model)


def read_tuned(path: Path, model: str) -> Tuned:
    """Raises InvalidSettings for a damaged file, an unknown key, a wrong value, another model."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise InvalidSettings(f"{path} is missing: ./scripts/tune writes it") from exc
    except OSError as exc:
        raise InvalidSettings(f"{path} cannot be read: {exc.strerror}") from exc
    try:
        content = yaml.safe_load(data)
    except Exception as exc:  # PyYAML raises many types: KeyError for `!!bool x`
        raise InvalidSettings(f"{path} is not valid YAML: {' '.join(str(exc).split())}") from exc
    try:
        tuned = build(Tuned, content)
        device, precision = tuned.options.device, tuned.options.precision
        Settings(device=device, precision=precision, **asdict(tuned.handler))
    except InvalidSettings as exc:
        raise InvalidSettings(f"{path}: {exc}") from exc
    if tuned.model != model:
        raise InvalidSettings(f"{path} was tuned for {tuned.model}, and the model is {model}")
    return tuned


def describe_differences(path: Path, tuned: Tuned, options: ModelOptions) -> list[str]:
    """Lines for the operator: what is not as the tuned file at `path` says or was measured."""
    facts = tuned.facts
    lines = []
    here = (cpu_model(), available_cores())
    # A warning, not a refusal: the settings still work, only their speed is in doubt, and a service
    # that its host moved to another CPU overnight must come up. What cannot run here (bf16, a GPU)
    # is refused by its own check.
    if (facts.cpu, facts.cores) != here:
        lines.append(
            f"warning: {path} was tuned on another machine ({facts.cpu}, cores: {facts.cores}; "
            f"here {here[0]}, cores: {here[1]}): run ./scripts/tune again"
        )
    for name, value in asdict(tuned.options).items():
        given = getattr(options, name)
        if _is_given(options, name) and given != value:
            option = f"--{name.replace('_', '-')}"
            lines.append(f"warning: {option} {given} goes over {path}, which has {value}")
    for name, value in (asdict(tuned.options) | asdict(tuned.handler)).items():
        variable = PREFIX + name.upper()
        given = os.environ.get(variable)
        if given not in (None, str(value)):
            lines.append(f"warning: {variable}={given} goes over {path}, which has {value}")
    return lines


def _is_given(options: ModelOptions, name: str) -> bool:
    """Whether an option says something: its default is None, or "auto" if that is a choice."""
    return getattr(options, name) not in (None, "auto")

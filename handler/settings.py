"""Settings of the handler: environment over model-config YAML over the profile over defaults."""

import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from handler.errors import InvalidSettings

PREFIX = "CLASSIFIER_"

# What `env` changes. Production refuses a model that knows nothing, and warms up longer.
PROFILES: dict[str, dict[str, Any]] = {
    "development": {},
    "staging": {"warmup_batches": 3},
    "production": {"warmup_batches": 3, "allow_untrained": False},
}

# What a Kubernetes Service, or a link of Docker's, called like the prefix of our settings gives to
# its neighbours. NAME_PORT is told by its value: GATEWAY_PORT is a setting as well.
_SERVICE = re.compile(
    "[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    "|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile("(tcp|udp|sctp)://.+")
_LINK_NAME = re.compile("/[^/]+/[^/]+")

_KINDS: dict[Any, str] = {int: "a whole number", bool: "true or false", str: "text"}


def platform_variables(environ: Mapping[str, str], *prefixes: str) -> list[str]:
    """Names under the prefixes that Kubernetes or Docker made, and that are no settings."""
    links = tuple(
        name.removesuffix("NAME") + "ENV_"
        for name, text in environ.items()
        if name.endswith("_NAME") and _LINK_NAME.fullmatch(text)
    )
    return [
        name
        for name, text in environ.items()
        if name.startswith(prefixes)
        and (
            _SERVICE.fullmatch(name)
            or (name.endswith("_PORT") and _SERVICE_URL.fullmatch(text))
            or (name.endswith("_NAME") and _LINK_NAME.fullmatch(text))
            or name.startswith(links)
        )
    ]


def own_variables(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The variables with a prefix of ours that somebody set as a setting."""
    foreign = platform_variables(environ, prefix)
    return {
        name: text
        for name, text in environ.items()
        if name.startswith(prefix) and name not in foreign
    }


def _number(default: int, low: int, high: int) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


def _choice(*choices: str) -> Any:
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One worker's settings. A value that breaks its rule raises InvalidSettings."""

    env: str = _choice(*PROFILES)  # CLASSIFIER_ENV: the profile whose defaults apply
    top_k: int = _number(5, 1, 1000)  # classes in an answer when the request does not say
    max_image_bytes: int = _number(10 * 2**20, 1, 2**30)  # bytes of one encoded image
    max_image_pixels: int = _number(50_000_000, 1, 2**30)  # width x height, summed over a request
    max_images: int = _number(32, 1, 1024)  # images in one request
    device: str = _choice("auto", "cpu", "cuda")  # auto: the GPU that TorchServe assigns, else CPU
    engine: str = _choice("auto", "openvino", "cuda", "torch")  # auto: OpenVINO on a CPU, else CUDA
    # auto: the fastest that there is. fp16: for GPUs before Ampere, which do not compute in bf16
    precision: str = _choice("auto", "fp32", "bf16", "fp16", "int8")
    decoder: str = _choice("auto", "cpu", "gpu")  # auto: the GPU where its pixels are the CPU's
    max_forward: int = _number(
        0, 0, 1024
    )  # images in one forward pass; 0: 1 or 4 on CPU, 64 on GPU
    threads: int = _number(0, 0, 1024)  # CPU threads of a worker; 0: its share of the cores
    cache_bytes: int = _number(0, 0, 2**40)  # memory of a worker for earlier results; 0: no cache
    warmup_batches: int = _number(1, 0, 100)  # forward passes before a worker reports ready
    allow_untrained: bool = True  # whether a model with random weights may be served
    log_level: str = _choice("info", "warning", "error")  # lines below it are not written
    log_requests: bool = True  # one JSON line for each request

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check(spec, getattr(self, spec.name))

    @classmethod
    def load(
        cls, section: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
    ) -> "Settings":
        """Settings from the `handler:` section of a model-config YAML and the environment.

        Raises InvalidSettings, with the name, the rule and the value seen.
        """
        specs = {spec.name: spec for spec in fields(cls)}
        if section is not None and not isinstance(section, Mapping):
            raise InvalidSettings(f"handler must be a mapping of settings, got {section!r}")
        values = dict(section or {})
        for key in values:
            if key not in specs:
                raise InvalidSettings(f"handler.{key} is unknown; known: {', '.join(specs)}")
        for name, text in own_variables(environ, PREFIX).items():
            key = name[len(PREFIX) :].lower()
            if key not in specs or name != name.upper():
                known = ", ".join(PREFIX + key.upper() for key in specs)
                raise InvalidSettings(f"{name} is unknown; known: {known}")
            values[key] = _parse(specs[key], text, name)
        profile = values.get("env", specs["env"].default)
        _check(specs["env"], profile)
        return cls(**PROFILES[profile] | values)


def _parse(spec: Field[Any], text: str, name: str) -> Any:
    """Turn an environment variable's text into the field's type."""
    if spec.type is int:
        try:
            return int(text)
        except ValueError:
            raise InvalidSettings(f"{name} must be a whole number, got {text!r}") from None
    if spec.type is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise InvalidSettings(f"{name} must be true or false, got {text!r}")
        return words[text.lower()]
    return text


def _check(spec: Field[Any], value: Any) -> None:
    if type(value) is not spec.type:  # exact, because True is an int
        kind = _KINDS[spec.type]
        raise InvalidSettings(f"{spec.name} must be {kind}, got {value!r}")
    if "low" in spec.metadata:
        low, high = spec.metadata["low"], spec.metadata["high"]
        if not low <= value <= high:
            raise InvalidSettings(f"{spec.name} must be {low} to {high}, got {value!r}")
    if "choices" in spec.metadata and value not in spec.metadata["choices"]:
        choices = ", ".join(spec.metadata["choices"])
        raise InvalidSettings(f"{spec.name} must be one of {choices}, got {value!r}")

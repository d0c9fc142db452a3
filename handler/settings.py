"""Settings of the handler: environment over model-config YAML over the profile over defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.cache_url import check_url
from handler.rules import check, check_names, from_environment, rules_of, setting

PREFIX = "CLASSIFIER_"

# What `env` changes. Production refuses a model that knows nothing, and warms up longer.
PROFILES: dict[str, dict[str, Any]] = {
    "development": {},
    "staging": {"warmup_batches": 3},
    "production": {"warmup_batches": 3, "allow_untrained": False},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One worker's settings. A value that breaks its rule raises InvalidSettings."""

    env: str = setting(
        "development",
        "profile: `staging` has 3 rounds of warm-up; `production` too, and it refuses untrained "
        "weights",
        choices=tuple(PROFILES),
    )
    top_k: int = setting(5, "classes in an answer if the request does not say", low=1, high=1000)
    max_image_bytes: int = setting(10 * 2**20, "bytes of one encoded image", low=1, high=2**30)
    max_image_pixels: int = setting(
        50_000_000, "width x height, summed over the images of a request", low=1, high=2**30
    )
    max_images: int = setting(32, "images in one request", low=1, high=1024)
    device: str = setting(
        "auto",
        "`auto`: the GPU that TorchServe assigns, else the CPU; set by `--device`",
        choices=("auto", "cpu", "cuda"),
    )
    engine: str = setting(
        "auto",
        "`auto`: `openvino` on a CPU, `cuda` on a GPU; `torch` is plain torch on either",
        choices=("auto", "openvino", "cuda", "torch"),
    )
    precision: str = setting(
        "auto",
        "`auto`: the fastest that gives the network's own answers; `fp16` is for GPUs, `int8` for "
        "CPUs; set by "
        "`--precision`",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
    )
    decoder: str = setting(
        "auto",
        "where JPEGs are decoded; `auto`: on the GPU those of which it has the CPU's pixels",
        choices=("auto", "cpu", "gpu"),
    )
    decode: str = setting(
        "exact",
        "`fast`: libjpeg itself scales large JPEGs down, to no less than twice the resize size",
        choices=("exact", "fast"),
    )
    max_forward: int = setting(
        0,
        "images in one forward pass; 0: 2 on a CPU (1 for models over 64 MB), 64 on a GPU",
        low=0,
        high=1024,
    )
    threads: int = setting(
        0,
        "CPU threads of each worker, to decode and, on a CPU, to run the model; 0: the cores "
        "shared among the workers",
        low=0,
        high=1024,
    )
    cache_bytes: int = setting(
        0, "memory of each worker for results of images seen before; 0: no cache", low=0, high=2**40
    )
    cache_url: str = setting(
        "",
        "a Redis in which replicas share results: `redis://`, `rediss://` or `unix://`; "
        "empty: none",
    )
    cache_ttl_seconds: int = setting(
        86_400, "how long the shared cache keeps a result", low=1, high=31_536_000
    )
    warmup_batches: int = setting(
        1, "rounds of warm-up before a worker reports ready", low=0, high=100
    )
    allow_untrained: bool = setting(True, "whether a model with random weights may be served")
    log_level: str = setting(
        "info",
        "lines of the workers below this level are not written",
        choices=("info", "warning", "error"),
    )
    log_requests: bool = setting(True, "one JSON line for each request")

    def __post_init__(self) -> None:
        check(self)
        if self.cache_url:
            check_url(self.cache_url)

    @classmethod
    def load(
        cls, section: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
    ) -> "Settings":
        """Settings from the `handler:` section of a model-config YAML and the environment.

        Raises InvalidSettings, with the name, the rule and the value seen.
        """
        section = {} if section is None else section
        check_names(rules_of(cls), section, "handler")
        given = from_environment(cls, PREFIX, environ)
        if given.get("cache_url"):
            check_url(given["cache_url"], f"{PREFIX}CACHE_URL")
        values = dict(section) | given
        profile = values.get("env", cls.env)
        rules_of(cls)["env"].check("env", profile)
        return cls(**PROFILES[profile] | values)

"""config.properties, read once: TorchServe's own settings as typed values."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from handler.environment import own_variables
from handler.errors import InvalidSettings
from handler.machine import count_gpus

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config.properties"

# Every key that TorchServe 0.12 reads, since it starts happily on a typo (pytorch/serve#86).
# Source: the constants of org.pytorch.serve.util.ConfigManager; the last two are read by the
# launcher (ts/model_server.py), whose place TorchServe.start() takes.
CONFIG_KEYS = frozenset(
    """
    allowed_urls async_logging blacklist_env_vars certificate_file cors_allowed_headers
    cors_allowed_methods cors_allowed_origin cpp_log_config cpu_launcher_args cpu_launcher_enable
    debug decode_input_request default_response_timeout default_service_handler
    default_startup_timeout default_workers_per_model disable_system_metrics
    disable_token_authorization enable_envvars_config enable_grpc_ssl enable_metrics_api
    enable_model_api grpc_inference_address grpc_inference_max_connection_age_grace_ms
    grpc_inference_max_connection_age_ms grpc_inference_port grpc_management_address
    grpc_management_max_connection_age_grace_ms grpc_management_max_connection_age_ms
    grpc_management_port inference_address initial_distribution_port initial_worker_port
    install_py_dep_per_model io_ratio ipex_enable ipex_gpu_enable job_queue_size keystore
    keystore_pass keystore_type limit_max_image_pixels load_models management_address
    max_request_size max_response_size metric_time_interval metrics_address metrics_config
    metrics_mode model_metrics_auto_detect model_server_home model_snapshot model_store models
    netty_client_threads number_of_gpu number_of_netty_threads prefer_direct_buffer
    private_key_file service_envelope system_metrics_cmd token_expiration_min
    ts_header_key_sequence_end ts_header_key_sequence_id ts_header_key_sequence_start
    ts_open_inference_protocol unregister_model_timeout use_env_allowed_urls use_native_io
    workflow_store vmargs plugins_path
    """.split()
)
# TorchServe takes these from its file alone. The other variables are called as its constants are.
_FILE_ONLY = frozenset(
    """
    enable_envvars_config io_ratio metric_time_interval model_snapshot models system_metrics_cmd
    use_env_allowed_urls use_native_io
    """.split()
)
VARIABLES = {f"TS_{key.upper().removeprefix('TS_')}": key for key in CONFIG_KEYS - _FILE_ONLY}
VARIABLES["TS_TOKEN_EXPIRATION_TIME_MIN"] = VARIABLES.pop("TS_TOKEN_EXPIRATION_MIN")
ALIKE = 0.85  # of difflib: a letter or two are wrong
# The first is read by TorchServe's workers, the second is kept from it by TorchServe.start().
_OTHER_VARIABLES = frozenset({"TS_BENCHMARK", "TS_CONFIG_FILE"})


class Address(NamedTuple):
    """A host and port that TorchServe binds."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address for a client on this machine."""
        return str(self._replace(host="127.0.0.1") if self.host == "0.0.0.0" else self)  # noqa: S104

    @property
    def grpc_port(self) -> int:
        """1010 below, as 7070 is to 8080; above if there is no room below."""
        return self.port - 1010 if self.port - 1010 >= 1024 else self.port + 1010


@dataclass(frozen=True)
class Addresses:
    """Where TorchServe listens."""

    inference: Address
    management: Address
    metrics: Address
    grpc_inference: Address
    grpc_management: Address

    def by_purpose(self) -> dict[str, tuple[str, int]]:
        """Host and port of each, under the words in which a message speaks of it."""
        return {
            "predictions (--port)": self.inference,
            "management (--management-port)": self.management,
            "metrics (--metrics-port)": self.metrics,
            "gRPC predictions (follows --port)": self.grpc_inference,
            "gRPC management (follows --management-port)": self.grpc_management,
        }


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the commands need of config.properties, under the environment and the options."""

    model_store: Path
    metrics_config: Path
    addresses: Addresses
    max_request_size: int  # bytes
    max_response_size: int  # bytes
    number_of_gpu: int
    vmargs: tuple[str, ...]
    plugins_path: str
    disable_token_authorization: bool
    enable_envvars_config: bool

    @classmethod
    def load(
        cls,
        host: str | None = None,
        port: int | None = None,
        management_port: int | None = None,
        metrics_port: int | None = None,
        *,
        path: Path = CONFIG,
    ) -> "ServerConfig":
        """Read the file and the environment; the other arguments go over both.

        Paths in the file are relative to it. Raises InvalidSettings.
        """
        properties = read_properties(path)
        metrics_mode = properties.get("metrics_mode", "log")
        if metrics_mode not in ("log", "prometheus", "legacy"):
            raise InvalidSettings(
                f"metrics_mode must be log, prometheus or legacy, got {metrics_mode!r}"
            )
        metrics_config = _path(properties, "metrics_config", path)
        if not metrics_config.is_file():
            raise InvalidSettings(f"metrics_config: {properties['metrics_config']} is not a file")
        inference = _address(properties, "inference", 8080, host, port)
        management = _address(properties, "management", 8081, None, management_port)
        return cls(
            model_store=_path(properties, "model_store", path),
            metrics_config=metrics_config,
            addresses=Addresses(
                inference=inference,
                management=management,
                metrics=_address(properties, "metrics", 8082, None, metrics_port),
                grpc_inference=_grpc_address(properties, "inference", inference),
                grpc_management=_grpc_address(properties, "management", management),
            ),
            max_request_size=_number(properties, "max_request_size", 6_553_500),
            max_response_size=_number(properties, "max_response_size", 6_553_500),
            number_of_gpu=_number(properties, "number_of_gpu", sys.maxsize),
            vmargs=tuple(properties.get("vmargs", "").split()),
            plugins_path=properties.get("plugins_path", ""),
            disable_token_authorization=properties.get("disable_token_authorization") == "true",
            enable_envvars_config=properties.get("enable_envvars_config") == "true",
        )

    def check_start(self) -> None:
        """Raise InvalidSettings for what TorchServe takes and ./scripts/serve cannot work with."""
        for key, reason in (
            ("disable_token_authorization", "the health check sends no token"),
            ("enable_envvars_config", "the options are passed that way"),
        ):
            if not getattr(self, key):
                raise InvalidSettings(f"{key} must be true: {reason}")

    def usable_gpus(self) -> int:
        """GPUs that TorchServe may give to workers; number_of_gpu makes them fewer."""
        return min(count_gpus(), self.number_of_gpu)

    def environment(self) -> dict[str, str]:
        """The variables that tell TorchServe what goes over its file."""
        addresses = self.addresses
        return {
            "TS_INFERENCE_ADDRESS": str(addresses.inference),
            "TS_MANAGEMENT_ADDRESS": str(addresses.management),
            "TS_METRICS_ADDRESS": str(addresses.metrics),
            "TS_GRPC_INFERENCE_PORT": str(addresses.grpc_inference.port),
            "TS_GRPC_MANAGEMENT_PORT": str(addresses.grpc_management.port),
            "TS_METRICS_CONFIG": str(self.metrics_config),
        }


def read_properties(path: Path = CONFIG) -> dict[str, str]:
    """config.properties under the environment's TS_<KEY>, as TorchServe itself reads the two.

    Raises InvalidSettings for a key that TorchServe would ignore, or a variable that is nearly one
    that it reads: other programs have variables TS_… as well.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidSettings(f"{path.name} cannot be read: {exc}") from exc
    properties = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith(("#", "!")):
            continue
        key, _, value = (part.strip() for part in line.partition("="))
        if key not in CONFIG_KEYS:
            raise InvalidSettings(
                f"{path.name}, line {number}: {key!r} is not a TorchServe setting"
            )
        properties[key] = value
    variables = own_variables(os.environ, "TS_")
    for name in variables.keys() - VARIABLES.keys() - _OTHER_VARIABLES:
        for meant in get_close_matches(name.upper(), VARIABLES, n=1, cutoff=ALIKE):
            raise InvalidSettings(f"{name} has no effect: TorchServe reads {meant}")
    return properties | {VARIABLES[n]: text for n, text in variables.items() if n in VARIABLES}


def _path(properties: Mapping[str, str], key: str, file: Path) -> Path:
    if not properties.get(key):
        raise InvalidSettings(f"{file.name} has no {key}")
    return (file.parent / properties[key]).resolve()


def _number(properties: Mapping[str, str], key: str, default: int) -> int:
    value = properties.get(key, str(default))
    if not value.isascii() or not value.isdigit():
        raise InvalidSettings(f"{key} must be a whole number, got {value!r}")
    return int(value)


def _address(
    properties: Mapping[str, str],
    purpose: str,
    default_port: int,
    host: str | None,
    port: int | None,
) -> Address:
    """An address of the file, or TorchServe's default, under what the options say."""
    value = properties.get(f"{purpose}_address", f"http://127.0.0.1:{default_port}")
    match = re.fullmatch(r"http://([^:/]+):(\d{1,5})", value)
    if match is None:
        raise InvalidSettings(f"{purpose}_address must be http://HOST:PORT, got {value!r}")
    return Address(host or match[1], port or int(match[2]))


def _grpc_address(properties: Mapping[str, str], purpose: str, http: Address) -> Address:
    return Address(
        properties.get(f"grpc_{purpose}_address", "127.0.0.1"),
        _number(properties, f"grpc_{purpose}_port", http.grpc_port),
    )

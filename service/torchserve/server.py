"""TorchServe as a process: its settings checked, its Java found, started and stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

import yaml

from handler.errors import InvalidSettings, SetupError
from handler.gpus import VISIBLE, WORKERS_VISIBLE
from handler.machine import available_memory, count_gpus
from handler.model_card import ModelCard
from handler.rules import Rule
from service.processes import Guardian, end
from service.torchserve.java import (
    JAVA_CDS,
    MEMORY_OPTIONS,
    OUT_OF_MEMORY,
    memory_bounds,
    server_command,
    utf8_locale,
)
from service.torchserve.watchdog import Hung, Watchdog

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config.properties"
CONFIG_FILE = "model-config.yaml"  # in an archive
STOP_SECONDS = 15
READ_SECONDS = 5  # for what Java has printed before its end
MAX_FOLDER = 85  # a socket's path has 104 bytes on macOS, and ends in "/.ts.sock.9000"

# Every key that TorchServe 0.12 reads, since it starts happily on a typo (pytorch/serve#86).
# Source: the constants of org.pytorch.serve.util.ConfigManager; the last two are read by the
# launcher (ts/model_server.py), which start() stands in for.
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

# What handler/configs/*.yaml may say, of what org.pytorch.serve.archive.model.ModelConfig reads.
# Not workers and device, which are options, nor clientTimeoutInMills, which leaves clients without
# an answer, nor what is for other kinds of models. TorchServe does not read `handler`: it is ours.
MODEL_CONFIG = dict.fromkeys(
    """
    batchSize maxBatchDelay responseTimeout startupTimeout maxRetryTimeoutInSec jobQueueSize
    """.split(),
    Rule(type=int, low=1),  # TorchServe takes maxBatchDelay 0 for 100 ms
) | {"deviceIds": Rule(type=list[int]), "handler": Rule(type=dict | None)}


@dataclass(frozen=True)
class Address:
    """A host and port that TorchServe binds."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The address for a client on this machine."""
        host = "127.0.0.1" if self.host == "0.0.0.0" else self.host  # noqa: S104
        return f"http://{host}:{self.port}"

    @property
    def pair(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def grpc_port(self) -> int:
        """1010 below, as 7070 is to 8080; above where there is no room below."""
        return self.port - 1010 if self.port - 1010 >= 1024 else self.port + 1010


@dataclass(frozen=True)
class Addresses:
    """Where TorchServe listens."""

    inference: Address
    management: Address
    metrics: Address


def read_config(path: Path = CONFIG) -> dict[str, str]:
    """config.properties under the environment's TS_<KEY>, as TorchServe itself reads the two.

    Raises InvalidSettings for a key that TorchServe would ignore.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidSettings(f"{path.name} cannot be read: {exc}") from exc
    config = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith(("#", "!")):
            continue
        key, _, value = (part.strip() for part in line.partition("="))
        if key not in CONFIG_KEYS:
            raise InvalidSettings(
                f"{path.name}, line {number}: {key!r} is not a TorchServe setting"
            )
        config[key] = value
    variables = {key: os.environ.get(f"TS_{key.upper()}") for key in CONFIG_KEYS}
    return config | {key: value for key, value in variables.items() if value is not None}


def read_path(config: dict[str, str], key: str) -> Path:
    """A path in config.properties, relative to that file. Raises InvalidSettings without one."""
    if not config.get(key):
        raise InvalidSettings(f"{CONFIG.name} has no {key}")
    return (CONFIG.parent / config[key]).resolve()


def read_address(config: dict[str, str], key: str, host: str | None, port: int | None) -> Address:
    """An address of config.properties, or TorchServe's default, under what the options say."""
    defaults = {"inference": 8080, "management": 8081, "metrics": 8082}
    default = f"http://127.0.0.1:{defaults[key]}"
    value = config.get(f"{key}_address", default)
    match = re.fullmatch(r"http://([^:/]+):(\d{1,5})", value)
    if match is None:
        raise InvalidSettings(f"{key}_address must be http://HOST:PORT, got {value!r}")
    return Address(host or match[1], port or int(match[2]))


def read_addresses(config: dict[str, str], options: Namespace) -> Addresses:
    """The addresses of config.properties under the options of ./scripts/serve."""
    return Addresses(
        read_address(config, "inference", options.host, options.port),
        read_address(config, "management", None, options.management_port),
        read_address(config, "metrics", None, options.metrics_port),
    )


def read_number(config: dict[str, str], key: str, default: int) -> int:
    """A number of config.properties. Raises InvalidSettings where it is none."""
    value = config.get(key, str(default))
    if not value.isascii() or not value.isdigit():
        raise InvalidSettings(f"{key} must be a whole number, got {value!r}")
    return int(value)


def usable_gpus(config: dict[str, str]) -> int:
    """GPUs that TorchServe may give to workers; number_of_gpu makes them fewer."""
    return min(count_gpus(), read_number(config, "number_of_gpu", sys.maxsize))


def check_gpus(device: str, gpus: int, environ: Mapping[str, str]) -> str | None:
    """What to tell the operator about the GPUs; `gpus` is how many CUDA finds.

    Raises InvalidSettings where `device` is cuda and a GPU that is named is not there.
    """
    visible = environ.get(VISIBLE)
    names = [name.strip() for name in visible.split(",")] if visible else []
    if "-1" in names:  # ends the list
        names = names[: names.index("-1")]
    message = None
    if len(names) > gpus:
        message = f"{VISIBLE}={visible} names {len(names)} GPUs, and CUDA finds {gpus} of them here"
    elif gpus == 0 and visible is not None:
        message = f"{VISIBLE}={visible} hides every GPU"
    if device == "cuda" and message:
        raise InvalidSettings(f"--device cuda, but {message}")
    return f"warning: {message}" if message and names and device == "auto" else None


def gpu_environment(device: str, gpus: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables with which TorchServe counts the GPUs that torch can use, and no others.

    Java counts the whole numbers in CUDA_VISIBLE_DEVICES and does nothing else with it. A UUID is
    the end of it, and without a value it asks nvidia-smi for all GPUs. So it gets as many numbers
    as there are GPUs, and handler/gpus.py gives the workers back what the user had set.
    """
    if device == "cpu" or gpus == 0:
        return {VISIBLE: "-1", "TS_NUMBER_OF_GPU": "0"}  # to Java, -1 is a GPU like another
    variables = {VISIBLE: ",".join(map(str, range(gpus)))}
    if VISIBLE in environ:
        variables[WORKERS_VISIBLE] = environ[VISIBLE]
    return variables


def make_folder() -> str:
    """A temporary folder for sockets and unpacked archives. Raises SetupError."""
    try:
        folder = tempfile.mkdtemp(prefix="torchserve-")
    except OSError as exc:
        raise SetupError(f"no temporary folder can be made (TMPDIR): {exc}") from exc
    if len(os.fsencode(folder)) > MAX_FOLDER:
        Path(folder).rmdir()
        raise SetupError(
            f"TMPDIR leads to {folder}, too long for the sockets in it: {MAX_FOLDER} bytes fit"
        )
    return folder


def dump_config(config: dict[str, Any]) -> str:
    """A model's configuration as the YAML that an archive holds."""
    return str(yaml.safe_dump(config, sort_keys=False))


def unpack(
    archive: Path, config: dict[str, Any] | None, folder: Path, digest: str | None = None
) -> Path:
    """Lay an archive out in `folder`, with this configuration in place of its own unless None.

    TorchServe takes such a folder as it takes an archive, and does not unpack it again.
    Raises SetupError, also if it was not made from the inputs with this digest.
    """
    try:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
        if config is not None:
            (folder / CONFIG_FILE).write_text(dump_config(config), "utf-8")
    except (OSError, zipfile.BadZipFile) as exc:
        raise SetupError(f"{archive} cannot be unpacked in {folder}: {exc}") from exc
    if digest is not None and ModelCard.read(folder).inputs_sha256 != digest:
        raise SetupError(f"{archive} was replaced by another while this started: start again")
    return folder


class TorchServe:
    """One TorchServe with its workers, in a process group and a folder of their own."""

    def __init__(
        self,
        java: Path,
        config: dict[str, str],
        archives: Mapping[Path, dict[str, Any] | None],
        environ: dict[str, str],
        digests: Mapping[Path, str | None] | None = None,
    ) -> None:
        """`archives` has the configuration of each model, None for the one in the archive;
        `environ` the TS_ variables that go over config.properties; `digests` what the archives
        that were checked had been made from: others are refused."""
        self._java = java
        self._config = config
        self._archives = archives
        self._environ = environ
        self._digests = digests or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None
        self._guardian: Guardian | None = None
        self._watchdog: Watchdog | None = None
        self._folder = ""
        self._out_of_memory: str | None = None  # in Java's words

    def start(self, relay: Callable[[IO[bytes]], None] | None = None) -> None:
        """Start Java as the launcher `torchserve` would.

        `relay` reads its output in a thread of its own until it ends; without one, Java writes to
        our stdout and stderr. The launcher itself is not used: it forwards no signals, allows one
        server per machine (its PID file), and remains as a process.
        """
        self._folder = make_folder()
        self._guardian = Guardian(self._folder)
        # What is served is a copy: no start changes an archive, or is changed by another start.
        store = Path(self._folder, "store")
        models = [
            # Two may have one name.
            unpack(archive, config, store / f"{number}-{archive.stem}", self._digests.get(archive))
            for number, (archive, config) in enumerate(self._archives.items())
        ]
        options = [
            # A file that is missing or of another Java is ignored; newer ones call that an error.
            *(f"-XX:SharedArchiveFile={JAVA_CDS}", "-Xlog:cds=off"),
            "-XX:-UsePerfData",  # a file in /tmp, which kill -9 would leave there
            *MEMORY_OPTIONS,
            *memory_bounds(available_memory()),
            *self._config.get("vmargs", "").split(),
        ]
        plugins = self._config.get("plugins_path", "")
        command = [
            *server_command(self._java, options, Path(self._folder), CONFIG, plugins),
            *("-m", *(model.name for model in models)),  # served under the names in them
        ]
        environ = os.environ | {
            "TEMP": self._folder,
            "TMPDIR": self._folder,
            "LOG_LOCATION": self._folder,
            "METRICS_LOCATION": self._folder,
            "TS_MODEL_STORE": str(store),
            # The handler reads JSON itself; TorchServe's worker would log a traceback for each
            # malformed body. Workers see this variable, not the key of config.properties.
            "TS_DECODE_INPUT_REQUEST": "false",
        }
        environ |= utf8_locale()
        # Either would go over what is passed here, and into the workers.
        for name in ("TS_CONFIG_FILE", "PYTHONPATH"):
            environ.pop(name, None)
        try:
            self._process = self._guardian.start(
                command,
                env=environ | self._environ,
                cwd=self._folder,
                stdout=subprocess.PIPE if relay else None,
                stderr=subprocess.STDOUT if relay else None,
            )
        except OSError as exc:
            raise SetupError(f"{self._java} cannot be run: {exc.strerror}") from exc
        self._watchdog = Watchdog(store, self._process.pid)
        if relay:
            self._reader = Thread(target=relay, args=[self._process.stdout], daemon=True)
            self._reader.start()

    def read(self, line: bytes) -> None:
        """Look at a line that Java has printed; `relay` calls this."""
        if found := OUT_OF_MEMORY.match(line):
            self._out_of_memory = found[1].decode("utf-8", "replace").removesuffix(", aborting")

    def exit_status(self) -> int | None:
        """The status with which Java ended; None while it runs."""
        return self._process.poll() if self._process else None

    def out_of_memory(self) -> str | None:
        """Why Java ran out of memory, in its words, if that is why it ended."""
        if self._reader is not None:
            self._reader.join(READ_SECONDS)
        return self._out_of_memory

    def end_hung_workers(self) -> list[Hung]:
        """Kill the workers that hang and return them; to be called again and again.

        TorchServe starts others in their place.
        """
        return self._watchdog.check() if self._watchdog else []

    def stop(self) -> None:
        """End Java, then whatever is left of its group, and remove the folder."""
        if self._process is not None:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C: it is killed at once
                if not end(self._process, STOP_SECONDS):
                    print("TorchServe did not stop in time and was killed", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it takes no time
        if self._reader is not None:  # its last lines
            self._reader.join(READ_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._guardian is not None:
            self._guardian.dismiss()

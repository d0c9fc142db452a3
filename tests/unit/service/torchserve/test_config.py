"""config.properties: the keys that TorchServe reads, paths, addresses, numbers."""

import re
import struct
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from handler.errors import InvalidSettings
from service.plan import MODEL_CONFIG
from service.torchserve import config as configuration
from service.torchserve.config import (
    CONFIG,
    CONFIG_KEYS,
    VARIABLES,
    Address,
    ServerConfig,
    read_properties,
)
from service.torchserve.java import LOG_CONFIG

READ_BY_THE_LAUNCHER = {"vmargs", "plugins_path"}
OURS = {"handler"}


def constants(name: str) -> set[str]:
    """The strings in a class file of TorchServe's jar (JVM specification, 4.4)."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    jar = Path(spec.origin).parent / "frontend" / "model-server.jar"
    data = zipfile.ZipFile(jar).read(name)
    sizes = {**dict.fromkeys((7, 8, 16, 19, 20), 2), 15: 3, **dict.fromkeys((5, 6), 8)}
    texts, at, index = set(), 10, 1
    (count,) = struct.unpack_from(">H", data, 8)
    while index < count:
        kind = data[at]
        if kind == 1:
            (length,) = struct.unpack_from(">H", data, at + 1)
            texts.add(data[at + 3 : at + 3 + length].decode("utf-8", "replace"))
            at += 3 + length
        else:
            at += 1 + sizes.get(kind, 4)
        index += 2 if kind in (5, 6) else 1  # long and double count twice
    return texts


# --- What TorchServe reads


def test_every_known_key_is_one_that_torchserve_reads() -> None:
    read = constants("org/pytorch/serve/util/ConfigManager.class")
    assert read >= CONFIG_KEYS - READ_BY_THE_LAUNCHER
    assert not READ_BY_THE_LAUNCHER & read


def test_every_known_variable_is_one_that_torchserve_reads() -> None:
    """It looks for variables that are called like its constants."""
    read = constants("org/pytorch/serve/util/ConfigManager.class")
    others = {"TS_CONFIG_FILE", "TS_METRICS"}  # kept from it, and the name of a logger
    assert {name for name in read if re.fullmatch("TS_[A-Z_]+", name)} - others < VARIABLES.keys()
    assert VARIABLES.keys() - read == {f"TS_{key.upper()}" for key in READ_BY_THE_LAUNCHER}


def test_every_known_model_key_is_one_that_torchserve_reads() -> None:
    read = constants("org/pytorch/serve/archive/model/ModelConfig.class")
    assert read >= set(MODEL_CONFIG) - OURS
    assert not OURS & read


# --- config.properties


def written(folder: Path, text: str) -> Path:
    path = folder / "config.properties"
    path.write_text(text, "utf-8")
    return path


def test_our_config_explains_every_line() -> None:
    lines = CONFIG.read_text("utf-8").splitlines()
    settings = [index for index, line in enumerate(lines) if line and not line.startswith("#")]
    assert settings
    for index in settings:
        commented = lines[index - 1].startswith("#")
        assert commented or index - 1 in settings, f"line {index + 1} has no comment"


def test_our_config_can_be_started_with_and_stays_on_this_machine() -> None:
    config = ServerConfig.load()
    config.check_start()
    assert {host for host, _ in config.addresses.by_purpose().values()} == {"127.0.0.1"}
    assert LOG_CONFIG.is_file()


def test_config_as_torchserve_reads_it(tmp_path: Path) -> None:
    text = "# comment\n! comment\n\n  debug = true \nmodel_store=a=b\n\tmetrics_mode=log\nmodels=\n"
    assert read_properties(written(tmp_path, text)) == {
        "debug": "true",
        "model_store": "a=b",
        "metrics_mode": "log",
        "models": "",
    }


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("inference_adress=http://127.0.0.1:1", "inference_adress"),
        ("Debug=true", "Debug"),
        ("nonsense", "nonsense"),
        ("=x", ""),
    ],
)
def test_typo_is_named_with_its_line(tmp_path: Path, line: str, key: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        read_properties(written(tmp_path, f"# comment\n\ndebug=true\n{line}\n"))
    assert str(refused.value) == f"config.properties, line 4: {key!r} is not a TorchServe setting"


def test_environment_goes_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", "/elsewhere")
    monkeypatch.setenv("TS_DEBUG", "")
    monkeypatch.setenv("TS_BENCHMARK", "true")
    monkeypatch.setenv("TS_SERVICE_HOST", "10.0.0.1")  # Kubernetes', of a Service called ts
    monkeypatch.setenv("TS_NODE_PROJECT", "x")  # another program's
    config = read_properties(written(tmp_path, "model_store=here\nmetrics_mode=log\n"))
    assert config == {"model_store": "/elsewhere", "metrics_mode": "log", "debug": ""}


@pytest.mark.parametrize("name", ["TS_MODEL_STROE", "TS_model_store", "TS_MODELSTORE"])
def test_a_mistyped_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TS_AUTHKEY", "of another program")
    monkeypatch.setenv(name, "1")
    with pytest.raises(InvalidSettings, match=f"^{name} has no effect: TorchServe reads TS_MODEL"):
        read_properties(written(tmp_path, "model_store=here\n"))


# --- Values


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ServerConfig]:
    """The config that some lines make, beside the two paths without which there is none."""
    (tmp_path / "metrics.yaml").touch()

    def load(*lines: str, **options: Any) -> ServerConfig:
        text = "\n".join(["model_store=store", "metrics_config=metrics.yaml", *lines])
        return ServerConfig.load(path=written(tmp_path, text), **options)

    return load


Load = Callable[..., ServerConfig]


def test_torchserves_own_values(load: Load, tmp_path: Path) -> None:
    config = load()
    assert config.model_store == tmp_path / "store"
    assert config.metrics_config == tmp_path / "metrics.yaml"
    assert list(config.addresses.by_purpose().values()) == [
        ("127.0.0.1", port) for port in (8080, 8081, 8082, 7070, 7071)
    ]
    assert (config.max_request_size, config.max_response_size) == (6_553_500, 6_553_500)
    assert (config.vmargs, config.plugins_path) == ((), "")


def test_values_of_the_file(load: Load) -> None:
    config = load(
        "max_request_size=5",
        "max_response_size=6",
        "vmargs=-Xmx1g  -XX:+UseSerialGC",
        "plugins_path=/plugins",
        "grpc_inference_address=10.0.0.2",
        "grpc_inference_port=9",
    )
    assert (config.max_request_size, config.max_response_size) == (5, 6)
    assert config.vmargs == ("-Xmx1g", "-XX:+UseSerialGC")
    assert config.plugins_path == "/plugins"
    assert config.addresses.grpc_inference == Address("10.0.0.2", 9)


def test_options_go_over_the_file(load: Load) -> None:
    line = "inference_address=http://10.0.0.1:9000"
    assert load(line).addresses.inference == Address("10.0.0.1", 9000)
    assert load(line, host="0.0.0.0").addresses.inference == Address("0.0.0.0", 9000)
    options = load(line, port=2, management_port=1234, metrics_port=3)
    assert options.addresses.inference == Address("10.0.0.1", 2)
    assert options.addresses.management == Address("127.0.0.1", 1234)
    assert options.addresses.metrics == Address("127.0.0.1", 3)
    assert options.addresses.grpc_management == Address("127.0.0.1", 1234 + 1010)


def test_torchserve_is_told_what_goes_over_its_file(load: Load, tmp_path: Path) -> None:
    assert load(host="0.0.0.0", port=8090).environment() == {
        "TS_INFERENCE_ADDRESS": "http://0.0.0.0:8090",
        "TS_MANAGEMENT_ADDRESS": "http://127.0.0.1:8081",
        "TS_METRICS_ADDRESS": "http://127.0.0.1:8082",
        "TS_GRPC_INFERENCE_PORT": "7080",
        "TS_GRPC_MANAGEMENT_PORT": "7071",
        "TS_METRICS_CONFIG": str(tmp_path / "metrics.yaml"),
    }


ADDRESSES = ["", "127.0.0.1:8080", "https://127.0.0.1:8080", "http://127.0.0.1", "http://:8080"]
ADDRESSES += ["http://127.0.0.1:8080/", "http://[::1]:8080", "http://127.0.0.1:123456"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_request_size=1e6", "max_request_size must be a whole number, got '1e6'"),
        ("number_of_gpu=-1", "number_of_gpu must be a whole number, got '-1'"),
        ("metrics_mode=csv", "metrics_mode must be log, prometheus or legacy, got 'csv'"),
        ("metrics_config=nowhere.yaml", "metrics_config: nowhere.yaml is not a file"),
        ("model_store=", "config.properties has no model_store"),
        *(
            (f"metrics_address={text}", f"metrics_address must be http://HOST:PORT, got {text!r}")
            for text in ADDRESSES
        ),
    ],
)
def test_other_values_are_refused(load: Load, line: str, message: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        load(line)
    assert str(refused.value) == message


@pytest.mark.parametrize("key", ["disable_token_authorization", "enable_envvars_config"])
def test_what_a_start_cannot_do_without(load: Load, key: str) -> None:
    both = {"disable_token_authorization": "true", "enable_envvars_config": "true"}
    load(*(f"{name}={value}" for name, value in both.items())).check_start()
    config = load(*(f"{name}={value}" for name, value in (both | {key: "false"}).items()))
    with pytest.raises(InvalidSettings, match=f"{key} must be true"):
        config.check_start()


def test_number_of_gpu(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "count_gpus", lambda: 4)
    assert load().usable_gpus() == 4
    assert load("number_of_gpu=1").usable_gpus() == 1


@pytest.mark.parametrize(("host", "url_host"), [("0.0.0.0", "127.0.0.1"), ("box", "box")])
def test_url_for_a_client_here(host: str, url_host: str) -> None:
    assert Address(host, 8080).url == f"http://{url_host}:8080"


@pytest.mark.parametrize(("port", "grpc"), [(8080, 7070), (8081, 7071), (2034, 1024), (2033, 3043)])
def test_grpc_port_follows(port: int, grpc: int) -> None:
    assert Address("127.0.0.1", port).grpc_port == grpc

"""Settings: their layers, their rules, and what they say when a rule is broken."""

from dataclasses import fields
from typing import Any

import pytest

from handler.environment import own_variables, platform_variables
from handler.errors import InvalidSettings
from handler.settings import PROFILES, Settings

NAMES = [spec.name for spec in fields(Settings)]
RANGES = [
    ("top_k", 1, 1000),
    ("max_image_bytes", 1, 2**30),
    ("max_image_pixels", 1, 2**30),
    ("max_images", 1, 1024),
    ("max_forward", 0, 1024),
    ("threads", 0, 1024),
    ("cache_bytes", 0, 2**40),
    ("cache_ttl_seconds", 1, 31_536_000),
    ("warmup_batches", 0, 100),
]
CHOICES = [
    ("env", ["development", "staging", "production"]),
    ("device", ["auto", "cpu", "cuda"]),
    ("engine", ["auto", "openvino", "cuda", "torch"]),
    ("precision", ["auto", "fp32", "bf16", "fp16", "int8"]),
    ("decoder", ["auto", "cpu", "gpu"]),
    ("decode", ["exact", "fast"]),
    ("log_level", ["info", "warning", "error"]),
]
SWITCHES = ["allow_untrained", "log_requests"]
ADDRESSES = ["cache_url"]  # tests/unit/handler/test_cache_url.py


def load(section: Any = None, **environ: str) -> Settings:
    return Settings.load(section, environ)


def test_defaults_hold_if_nothing_is_said() -> None:
    assert load() == load({}) == Settings()


def test_every_setting_is_covered_below() -> None:
    covered = [name for name, *_ in RANGES + CHOICES] + SWITCHES + ADDRESSES
    assert sorted(covered) == sorted(NAMES)


def test_environment_goes_over_yaml_over_defaults() -> None:
    settings = load({"top_k": 3, "max_images": 4}, CLASSIFIER_TOP_K="2")
    assert settings == Settings(top_k=2, max_images=4)


def test_profile_goes_over_defaults() -> None:
    settings = load({"env": "production"})
    assert (settings.allow_untrained, settings.warmup_batches) == (False, 3)
    assert settings == Settings(env="production", **PROFILES["production"])


def test_yaml_and_environment_go_over_profile() -> None:
    expected = Settings(env="production", allow_untrained=True, warmup_batches=3)
    assert load({"env": "production", "allow_untrained": True}) == expected
    assert load({"env": "production"}, CLASSIFIER_ALLOW_UNTRAINED="true") == expected


def test_environment_names_the_profile() -> None:
    assert load({"env": "production"}, CLASSIFIER_ENV="staging") == load({"env": "staging"})


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid(profile: str) -> None:
    assert load(CLASSIFIER_ENV=profile).env == profile


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASSIFIER_MAX_IMAGES", "7")
    assert Settings.load().max_images == 7


def test_other_variables_are_not_ours() -> None:
    assert load(PATH="/bin", TOP_K="x", CLASSIFIERS_TOP_K="x", classifier_top_k="x") == Settings()


@pytest.mark.parametrize("name", ["topk", "Top_K", "top_k ", "", 3, None])
def test_unknown_name_in_yaml_is_refused(name: Any) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        load({name: 3})
    assert f"handler.{name} is unknown" in str(refusal.value)
    assert all(known in str(refusal.value) for known in NAMES)


@pytest.mark.parametrize("name", ["CLASSIFIER_TOPK", "CLASSIFIER_", "CLASSIFIER_top_k"])
def test_unknown_name_in_environment_is_refused(name: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        load(**{name: "3"})
    assert f"{name} is unknown" in str(refusal.value)
    assert all(f"CLASSIFIER_{known.upper()}" in str(refusal.value) for known in NAMES)


def service(name: str) -> dict[str, str]:
    """What Kubernetes writes for a Service with a port 8080 called `http` and one for UDP."""
    return {
        f"{name}_SERVICE_HOST": "10.0.0.11",
        f"{name}_SERVICE_PORT": "8080",
        f"{name}_SERVICE_PORT_HTTP": "8080",
        f"{name}_PORT": "tcp://10.0.0.11:8080",
        f"{name}_PORT_8080_TCP": "tcp://10.0.0.11:8080",
        f"{name}_PORT_8080_TCP_PROTO": "tcp",
        f"{name}_PORT_8080_TCP_PORT": "8080",
        f"{name}_PORT_8080_TCP_ADDR": "10.0.0.11",
        f"{name}_PORT_53_UDP": "udp://10.0.0.11:53",
    }


def link(name: str) -> dict[str, str]:
    """What Docker writes for a link."""
    return {
        f"{name}_NAME": "/web/classifier",
        f"{name}_PORT": "tcp://172.17.0.5:8080",
        f"{name}_PORT_8080_TCP": "tcp://172.17.0.5:8080",
        f"{name}_ENV_PATH": "/usr/bin",
        f"{name}_ENV_TOP_K": "3",
    }


@pytest.mark.parametrize("variables", [service, link])
@pytest.mark.parametrize("name", ["CLASSIFIER", "CLASSIFIER_V2", "CLASSIFIER_TOP_K"])
def test_variables_of_the_platform_are_no_settings(variables: Any, name: str) -> None:
    foreign = variables(name)
    ours = {"CLASSIFIER_TOP_K": "7", "CLASSIFIER_ENV": "staging"}
    assert Settings.load(None, foreign | ours) == Settings.load(None, ours)
    assert sorted(platform_variables(foreign | ours, "CLASSIFIER_")) == sorted(foreign)
    assert platform_variables(foreign | ours, "GATEWAY_") == []


@pytest.mark.parametrize(
    "name",
    [
        "CLASSIFIER_PORT",  # a number, not an address
        "CLASSIFIER_PORT_8080",
        "CLASSIFIER_PORT_X_TCP",
        "CLASSIFIER_PORT_8080_TCP_HOST",
        "CLASSIFIER_SERVICE",
        "CLASSIFIER_SERVICE_PORTS",
        "CLASSIFIER_service_host",
        "CLASSIFIER_NAME",
        "CLASSIFIER_ENV_TOP_K",  # without a link
    ],
)
def test_a_typo_that_resembles_the_platform_is_refused(name: str) -> None:
    assert own_variables({name: "8080"}, "CLASSIFIER_") == {name: "8080"}
    with pytest.raises(InvalidSettings, match=f"{name} is unknown"):
        load(**{name: "8080"})


@pytest.mark.parametrize("section", [[], ["top_k"], "top_k", 3, True])
def test_section_must_be_a_mapping(section: Any) -> None:
    with pytest.raises(InvalidSettings, match="handler must be a mapping of settings, got "):
        load(section)


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
def test_edges_of_a_range_are_valid(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(load({name: value}), name) == value
        assert getattr(load(**{f"CLASSIFIER_{name.upper()}": str(value)}), name) == value


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("source", ["yaml", "environment"])
def test_beyond_a_range_is_refused(name: str, low: int, high: int, side: str, source: str) -> None:
    value = low - 1 if side == "below" else high + 1
    variable = f"CLASSIFIER_{name.upper()}"
    section = {name: value} if source == "yaml" else {}
    environ = {variable: str(value)} if source == "environment" else {}
    with pytest.raises(InvalidSettings) as refusal:
        load(section, **environ)
    said = name if source == "yaml" else variable
    assert str(refusal.value) == f"{said} must be {low} to {high}, got {value}"


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_every_choice_is_valid(name: str, choices: list[str]) -> None:
    for choice in choices:
        assert getattr(load({name: choice}), name) == choice


@pytest.mark.parametrize(("name", "choices"), CHOICES)
@pytest.mark.parametrize("value", ["", "CPU", "other"])
def test_another_choice_is_refused(name: str, choices: list[str], value: str) -> None:
    variable = f"CLASSIFIER_{name.upper()}"
    for said, section, environ in ((name, {name: value}, {}), (variable, {}, {variable: value})):
        with pytest.raises(InvalidSettings) as refusal:
            load(section, **environ)
        rule = f"{said} must be one of {', '.join(choices)}"
        assert str(refusal.value) == f"{rule}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("top_k", True, "a whole number"),
        ("top_k", "3", "a whole number"),
        ("top_k", 3.0, "a whole number"),
        ("top_k", None, "a whole number"),
        ("log_requests", 1, "true or false"),
        ("log_requests", "true", "true or false"),
        ("log_requests", None, "true or false"),
        ("device", None, "text"),
        ("env", ["production"], "text"),
    ],
)
def test_wrong_type_in_yaml_is_refused(name: str, value: Any, rule: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        load({name: value})
    assert str(refusal.value) == f"{name} must be {rule}, got {value!r}"


@pytest.mark.parametrize("text", ["", "five", "5.0", "5e1", "true", "0x5", "5 6"])
def test_environment_number_must_be_whole(text: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        load(CLASSIFIER_TOP_K=text)
    assert str(refusal.value) == f"CLASSIFIER_TOP_K must be a whole number, got {text!r}"


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("1", True), ("false", False), ("FALSE", False), ("0", False)],
)
@pytest.mark.parametrize("name", SWITCHES)
def test_environment_switch(name: str, text: str, value: bool) -> None:
    assert getattr(load(**{f"CLASSIFIER_{name.upper()}": text}), name) is value


@pytest.mark.parametrize("text", ["", "yes", "on", "2", "None"])
def test_environment_switch_must_be_true_or_false(text: str) -> None:
    with pytest.raises(InvalidSettings) as refusal:
        load(CLASSIFIER_LOG_REQUESTS=text)
    assert str(refusal.value) == f"CLASSIFIER_LOG_REQUESTS must be true or false, got {text!r}"


def test_rules_hold_without_load_too() -> None:
    with pytest.raises(InvalidSettings, match="top_k must be 1 to 1000, got 0"):
        Settings(top_k=0)

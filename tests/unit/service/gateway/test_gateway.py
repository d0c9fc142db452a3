"""Settings and keys of the gateway: what is refused, and that nothing is nginx's syntax."""

import hashlib
import json
import re
import socket
from itertools import product
from pathlib import Path

import pytest

from handler.errors import InvalidSettings, SetupError
from service.gateway import process as gateway
from service.gateway.config import render
from service.gateway.settings import Client, GatewaySettings, name_ignored, read_keys
from service.logs import Log

DIGEST = hashlib.sha256(b"key").hexdigest()


def load(**variables: str) -> GatewaySettings:
    return GatewaySettings.load({f"GATEWAY_{name.upper()}": v for name, v in variables.items()})


def rendered(tmp_path: Path, **variables: str) -> str:
    return render(load(**variables), tmp_path, "/dev/fd/9", [])


INJECTIONS = ["1; }", "a\nb", 'a"b', "$uri", "a{b", "a b", "'x'", "a;b", "\\", "${model}", "é"]
WITH_DEFAULT = "split tls_certificate tls_key keys".split()  # empty is nothing
WITHOUT_DEFAULT = (
    "host port upstreams management models rate burst max_concurrent max_concurrent_per_client "
    "max_body_bytes client_timeout_seconds response_timeout_seconds metrics_allow".split()
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *product([*WITH_DEFAULT, *WITHOUT_DEFAULT], INJECTIONS),
        *((name, "") for name in WITHOUT_DEFAULT),
    ],
)
def test_nothing_is_nginx_syntax(name: str, value: str) -> None:
    with pytest.raises(InvalidSettings) as error:
        load(**{name: value})
    assert "\n" not in str(error.value)
    assert f"GATEWAY_{name.upper()}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("port", 1, 65535), ("rate", 0, 1_000_000), ("body_timeout_seconds", 1, 3600)],
)
def test_ranges(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(load(**{name: str(value)}), name) == value
    for value in (low - 1, high + 1):
        rule = f"GATEWAY_{name.upper()} must be {low} to {high}, got {value}"
        with pytest.raises(InvalidSettings, match=re.escape(rule)):
            load(**{name: str(value)})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"rate": "1.5"}, ["GATEWAY_RATE", "whole number", "'1.5'"]),
        ({"host": "localhost"}, ["GATEWAY_HOST", "IP address", "'localhost'"]),
        ({"host": "fe80::1%eth0;"}, ["GATEWAY_HOST"]),
        ({"upstreams": "a:1,,b:2"}, ["GATEWAY_UPSTREAMS"]),
        ({"upstreams": "http://a:1"}, ["GATEWAY_UPSTREAMS", "HOST:PORT"]),
        ({"management": "a:70000"}, ["GATEWAY_MANAGEMENT", "'a:70000'"]),
        ({"models": "../m"}, ["GATEWAY_MODELS", "'../m'"]),
        ({"split": "1.0=90,2.0=5"}, ["GATEWAY_SPLIT", "100"]),
        ({"split": "1.0=50,1.0=50"}, ["GATEWAY_SPLIT"]),
        ({"split": "1.0=99.5,2.0=0.5"}, ["GATEWAY_SPLIT", "whole"]),
        ({"tls_certificate": __file__}, ["GATEWAY_TLS_KEY"]),
        ({"keys": "/nowhere"}, ["GATEWAY_KEYS", "'/nowhere'"]),
        ({"metrics_allow": "10.0.0.1/8"}, ["GATEWAY_METRICS_ALLOW"]),
        ({"host": "192.0.2.1"}, ["GATEWAY_KEYS=off", "--new-key", "192.0.2.1"]),
    ],
)
def test_mistakes_are_named(variables: dict[str, str], words: list[str]) -> None:
    with pytest.raises(InvalidSettings) as error:
        load(**variables)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["GATEWAY_PROT", "GATEWAY_port", "GATEWAY_"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidSettings, match=f"{name} is unknown; known: .*GATEWAY_HOST"):
        GatewaySettings.load({name: "1"})


def test_variables_of_kubernetes_are_ignored_and_named_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """GATEWAY_PORT is a setting of ours as well: its value tells which it is."""
    foreign = {"GATEWAY_PORT": "tcp://10.0.0.1:80", "GATEWAY_SERVICE_HOST": "10.0.0.1"}
    assert GatewaySettings.load(foreign) == GatewaySettings()
    assert GatewaySettings.load(foreign | {"GATEWAY_PORT": "9000"}).port == 9000
    name_ignored(
        Log("json"), foreign | {"CLASSIFIER_PORT": "tcp://10.0.0.2:80", "GATEWAY_RATE": "1"}
    )
    line = json.loads(capfd.readouterr().out)
    assert line["event"] == "ignored"
    assert line["message"].startswith("CLASSIFIER_PORT, GATEWAY_PORT, GATEWAY_SERVICE_HOST: ")
    name_ignored(Log("json"), {"GATEWAY_RATE": "1"})
    assert capfd.readouterr().out == ""


def test_other_addresses_need_keys_or_off(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("")
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert load(host=host, keys="off").keys_file is None
        assert load(host=host, keys=str(keys)).keys_file == keys
    for host in ("127.0.0.1", "127.9.9.9", "::1"):
        assert load(host=host).keys_file is None


def test_names_stand_for_all_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (f"10.0.0.{i}", port)) for i in (1, 2, 1)]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    expected = ("10.0.0.1:8080", "10.0.0.2:8080")
    assert load(upstreams="torchserve:8080").addresses("upstreams") == expected


def test_a_name_that_is_not_found() -> None:
    with pytest.raises(SetupError, match=r"GATEWAY_UPSTREAMS: nowhere\.invalid is not found"):
        load(upstreams="nowhere.invalid:1").addresses("upstreams")


def test_nginx_can_read_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers have another user if its master is root, and umask 077 made the checkout."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "www").mkdir(parents=True)
    (source / "www" / "index.html").write_text("page")
    (source / "www" / "index.html").chmod(0o600)
    (source / "www").chmod(0o500)  # a copy of a read-only folder can be removed as well
    monkeypatch.setattr(gateway, "DEPLOY", source)
    gateway.copy_pages(copy)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (copy, *copy.rglob("*"))}
    assert modes == {"copy": 0o755, "www": 0o755, "index.html": 0o644}
    assert (copy / "www" / "index.html").read_text() == "page"


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    other = hashlib.sha256(b"other").hexdigest()
    file.write_text(f"# who\n\nalice {DIGEST} # since May\n  bob\t{other}  disabled\n")
    assert read_keys(file) == [Client("alice", DIGEST), Client("bob", other, disabled=True)]


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice key-in-clear",
        f"alice {DIGEST[:-1]}",
        f"alice {DIGEST.upper()}",
        f"alice {DIGEST} disable",
        f"alice {DIGEST} disabled now",
        f'a"b {DIGEST}',
        f"a;b {DIGEST}",
        f"{'a' * 65} {DIGEST}",
        f"alice {DIGEST}\nbob {DIGEST}",
    ],
)
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# first\n{line}\n")
    with pytest.raises(InvalidSettings, match=r"line [23]") as error:
        read_keys(file)
    assert "key-in-clear" not in str(error.value)
    assert DIGEST not in str(error.value)


def test_shares_of_a_split_add_up_and_versions_without_clients_get_none(tmp_path: Path) -> None:
    config = rendered(tmp_path, models="m", split="1.0=20,2.0=70,3.0=10,4.0=0")
    block = config.partition("split_clients")[2].partition("}")[0]
    assert block.split("{")[1].split() == ["20%", "1.0;", "70%", "2.0;", "*", "3.0;"]


def test_a_second_try_keeps_within_the_time_that_a_request_has(tmp_path: Path) -> None:
    config = rendered(tmp_path)
    for name, seconds in (("_first", 15), ("_second", 45), ("_only", 60)):
        block = config.partition(f'location ~ "^/{name}/')[2]
        assert f"proxy_read_timeout {seconds}s;" in block.partition("header_filter")[0]


def test_a_path_that_nginx_would_take_apart_is_refused(tmp_path: Path) -> None:
    for name in ('a"b', "a$b", "a\nb", "a\\b"):
        with pytest.raises(SetupError, match="a path may not have"):
            rendered(tmp_path / name)


@pytest.mark.parametrize("found", ["", "nginx"])
def test_without_nginx_or_its_module_the_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    if found:
        program = tmp_path / found
        program.write_text("#!/bin/sh\necho --modules-path=/nowhere >&2\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if found else str(tmp_path))
    monkeypatch.setattr(gateway, "PLACES", ())
    with pytest.raises(SetupError, match="apt-get install nginx libnginx-mod-http-lua lua-cjson"):
        gateway.find_nginx()

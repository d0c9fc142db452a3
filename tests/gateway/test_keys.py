"""API keys."""

import hashlib
import time
from pathlib import Path

import pytest
import requests

from tests.gateway.clients import RED, TIMEOUT, check_error, client
from tests.gateway.conftest import Served
from tests.gateway.running import running, settings, variables
from tests.gateway.upstreams import answer_of, torchserve_that
from tests.processes import wait_for

KEYS = {"alice": "alices-key", "bob": "bobs-key", "carol": "carols-key"}


def key_line(name: str, more: str = "") -> str:
    return f"{name} {hashlib.sha256(KEYS[name].encode()).hexdigest()} {more}\n"


def test_keys(gateway: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# clients\n" + key_line("alice") + key_line("carol", "disabled"))
    with running(tmp_path, settings([gateway.server], keys=str(file))) as other:

        def ask(path: str = "/predict", **headers: str) -> requests.Response:
            method = "GET" if path == "/info" else "POST"
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return requests.request(
                method, other.url + path, data=RED, headers=named, timeout=TIMEOUT
            )

        bearer = {"Authorization": f"Bearer {KEYS['alice']}"}
        for path in ("/predict", "/predictions/mobilenet_v2", "/info"):
            for wrong in (
                {},
                {"X_API_Key": "wrong"},
                {"X_API_Key": ""},
                {"Authorization": f"Basic {KEYS['alice']}"},
                {"Authorization": KEYS["alice"]},
                {"Authorization": "Bearer"},
                {"X_API_Key": hashlib.sha256(KEYS["alice"].encode()).hexdigest()},
                {"X_API_Key": KEYS["bob"]},
            ):
                answer = ask(path, **wrong)
                check_error(answer, 401)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                sent = any(wrong.values())
                assert ("is not known" if sent else "is needed") in answer.json()["message"]
            check_error(ask(path, X_API_Key=KEYS["carol"]), 403)
            assert ask(path, **bearer).status_code == 200
            assert ask(path, X_API_Key=KEYS["alice"]).status_code == 200
        for path in ("/health", "/livez", "/metrics"):
            assert requests.get(other.url + path, timeout=TIMEOUT).status_code == 200
        assert requests.get(f"{other.url}/openapi.json", timeout=TIMEOUT).status_code != 401

        # taken in without a restart, and without harm to a connection that is open
        with requests.Session() as session:
            session.headers["X-API-Key"] = KEYS["bob"]
            url = f"{other.url}/predict"
            assert session.post(url, data=RED, timeout=TIMEOUT).status_code == 401
            file.write_text(key_line("bob") + key_line("alice", "disabled"))
            wait_for(lambda: session.post(url, data=RED, timeout=TIMEOUT).status_code == 200)
            wait_for(lambda: ask(**bearer).status_code == 403)

        # a broken file leaves the keys as they were
        file.write_text("bob not-a-digest\n")
        wait_for(lambda: "line 1 must be NAME SHA256" in other.stderr.read_text())
        assert "the keys stay as they were" in other.stderr.read_text()
        assert ask(X_API_Key=KEYS["bob"]).status_code == 200
        file.unlink()
        wait_for(lambda: "cannot be read" in other.stderr.read_text())
        assert ask(X_API_Key=KEYS["bob"]).status_code == 200

        answer = ask(X_API_Key=KEYS["bob"])
        assert other.line(answer.headers["X-Request-ID"])["client"] == "bob"
        assert other.stop() == 0
        printed = other.stdout.read_text() + other.stderr.read_text()
    assert not any(key in printed for key in KEYS.values())
    assert not any(key in gateway.server.text() for key in KEYS.values())


def test_keys_and_other_secrets_do_not_reach_torchserve(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice"))
    seen: list[bytes] = []
    headers = {
        "Authorization": f"Bearer {KEYS['alice']}",
        "X-API-Key": KEYS["alice"],
        "Cookie": "a=b",
        "describe": "True",
        "traceparent": "00-1",
        "X-Request-ID": "mine",
        "Content-Type": "image/png",
    }
    with (
        torchserve_that(answer_of(b"{}"), seen) as upstream,
        running(tmp_path, variables(upstreams=upstream, keys=str(file))) as gateway,
    ):
        url = f"{gateway.url}/predict?top_k=3&key={KEYS['alice']}"
        requests.post(url, data=b"abc", headers=headers, timeout=TIMEOUT)
    [data] = seen
    head, _, body = data.decode().partition("\r\n\r\n")
    request, *lines = head.split("\r\n")
    assert request == "POST /predictions/mobilenet_v2 HTTP/1.1"
    got = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    sent = float(got.pop("x-request-start").removeprefix("t="))
    assert sent == pytest.approx(time.time(), abs=60)
    assert got == {
        "host": "torchserve",
        "content-length": "3",
        "content-type": "application/octet-stream",
        "x-body-type": "image/png",
        "x-top-k": "3",
        "x-request-id": "mine",
        "x-request-timeout": "60.000",
        "traceparent": "00-1",
    }
    assert body == "abc"


def test_limits_are_by_key_and_not_by_address(gateway: Served, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice") + key_line("bob"))
    env = settings([gateway.server], keys=str(file), rate="1", burst="2")
    with running(tmp_path, env) as other:

        def ask(name: str, address: str) -> int:
            headers = {"X-API-Key": KEYS[name]}
            url = f"{other.url}/predict"
            return client(address).post(url, data=RED, headers=headers, timeout=30).status_code

        statuses = [ask("alice", f"127.0.0.{i + 1}") for i in range(8)]
        assert 429 in statuses
        assert ask("bob", "127.0.0.1") == 200

"""Behind a load balancer: who the client is, and who may say so."""

from pathlib import Path

import pytest
import requests

from tests.gateway.clients import SMALL, TIMEOUT
from tests.gateway.running import Gateway, in_front_of, refused, variables
from tests.gateway.upstreams import answer_of

OTHER = "203.0.113.7"


def address_of(gateway: Gateway, forwarded: str) -> str:
    """What the gateway takes for the client's address."""
    answer = requests.post(
        f"{gateway.url}/predict",
        data=SMALL,
        headers={"X-Forwarded-For": forwarded},
        timeout=TIMEOUT,
    )
    address: str = gateway.line(answer.headers["X-Request-ID"])["address"]
    return address


@pytest.mark.parametrize(
    ("trusted", "forwarded", "address"),
    [
        ("", OTHER, "127.0.0.1"),  # anybody could say that
        ("10.0.0.0/8", OTHER, "127.0.0.1"),
        ("127.0.0.1", OTHER, OTHER),
        ("127.0.0.0/8, ::1", OTHER, OTHER),
        ("127.0.0.1", f"198.51.100.1, {OTHER}", OTHER),  # the first one is the client's own word
        ("127.0.0.1,10.0.0.0/8", f"198.51.100.1, {OTHER}, 10.1.2.3", OTHER),
        ("127.0.0.1", "unknown", "127.0.0.1"),
    ],
)
def test_the_client_is_who_a_trusted_proxy_says(
    tmp_path: Path, trusted: str, forwarded: str, address: str
) -> None:
    with in_front_of(tmp_path, answer_of(b"{}"), trusted_proxies=trusted) as (gateway, _):
        assert address_of(gateway, forwarded) == address


def test_limits_are_by_the_clients_behind_a_proxy(tmp_path: Path) -> None:
    limits = {"trusted_proxies": "127.0.0.1", "rate": "1", "burst": "1"}
    with in_front_of(tmp_path, answer_of(b"{}"), **limits) as (gateway, _):

        def ask(client: str) -> int:
            return requests.post(
                f"{gateway.url}/predict",
                data=SMALL,
                headers={"X-Forwarded-For": client},
                timeout=TIMEOUT,
            ).status_code

        assert 429 in [ask(OTHER) for _ in range(8)]
        assert ask("198.51.100.1") == 200


def test_a_proxy_that_is_no_address_is_refused(tmp_path: Path) -> None:
    line = refused(tmp_path, variables(trusted_proxies="balancer.example"))
    assert "GATEWAY_TRUSTED_PROXIES must be addresses or networks" in line

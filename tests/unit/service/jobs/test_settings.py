"""Which addresses are admitted, and which settings are refused."""

from pathlib import Path

import pytest

from handler.errors import InvalidSettings
from service.gateway.settings import GatewaySettings
from service.jobs.settings import JobsSettings, admits

PREFIXES = JobsSettings(
    jobs_sources="https://images.example/public/, http://cdn.example:8080/"
).prefixes("jobs_sources")


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example/public/a.jpg",
        "https://IMAGES.example:443/public/a/b.jpg?size=2&x=/../",
        "https://images.example/public/a%20b.jpg",
        "https://images.example/public/a..b.jpg",
        "http://cdn.example:8080/",
    ],
)
def test_admitted(url: str) -> None:
    assert admits(PREFIXES, url)


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example/public/a.jpg",
        "https://images.example/publicity/a.jpg",
        "https://images.example/public",
        "https://images.example/public/../private/a.jpg",
        "https://images.example/public/%2e%2e/private/a.jpg",
        "https://images.example/public/..%2fprivate/a.jpg",
        "https://images.example/public/%252e%252e/private/a.jpg",
        "https://images.example/public/..;/private/a.jpg",
        "https://images.example/public/..\\private",
        "https://images.example/public/%5c..%5c",
        "https://images.example.evil.example/public/a.jpg",
        "https://images.example@evil.example/public/a.jpg",
        "https://evil.example#@images.example/public/a.jpg",
        "https://evil.example\\@images.example/public/a.jpg",
        "https://images.example:8443/public/a.jpg",
        "https://images.example:99999/public/a.jpg",
        "https://images.example/public/a.jpg\nHost: evil.example",
        "https://images.example/public/a.jpg#fragment",
        " https://images.example/public/a.jpg",
        "//images.example/public/a.jpg",
        "file:///public/a.jpg",
        "http://cdn.example/",
        "https://images.example/public/" + "a" * 2048,
        "",
    ],
)
def test_not_admitted(url: str) -> None:
    assert not admits(PREFIXES, url)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jobs_url", "http://127.0.0.1"),
        ("jobs_sources", "https://images.example/public"),
        ("jobs_sources", "images.example/"),
        ("jobs_sources", "https://images.example/?a=/"),
        ("jobs_sources", ","),
        ("jobs_webhooks", "https://hooks.example/"),  # without a key
        ("jobs_concurrency", 0),
        ("jobs_keep_seconds", 0),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidSettings, match=f"GATEWAY_{name.upper()}"):
        GatewaySettings(**{name: value})  # type: ignore[arg-type]


def test_a_password_is_not_shown() -> None:
    with pytest.raises(InvalidSettings) as error:
        GatewaySettings(jobs_url="http://user:secret@127.0.0.1")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["", "c2VjcmV0", "whsec_c2VjcmV0", "whsec_!", "whsec_é"])
def test_a_key_that_is_none_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(InvalidSettings, match="GATEWAY_JOBS_WEBHOOK_SECRET") as error:
        GatewaySettings(jobs_webhooks="https://h.example/", jobs_webhook_secret=str(file))
    assert not text or text not in str(error.value)

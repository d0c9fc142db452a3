"""The address of the shared cache: what it may be, and that its password is shown nowhere."""

import pytest

from handler.cache_url import shown_url
from handler.errors import InvalidSettings
from handler.settings import Settings

GOOD = {
    "redis://cache": "redis://cache",
    "redis://10.0.0.1:6380/2": "redis://10.0.0.1:6380/2",
    "redis://:s3cret@cache:6379": "redis://cache:6379",
    "rediss://user:s3cret@cache/0?ssl_ca_certs=/ca.pem": "rediss://cache/0",
    "unix:///run/redis.sock?password=s3cret": "unix:///run/redis.sock",
    "unix://user:s3cret@/run/redis.sock": "unix:///run/redis.sock",
    "redis://:s3%2Fcr%40et@[::1]:6379": "redis://[::1]:6379",
}
BAD = [
    "cache:6379",
    "http://:s3cret@cache",
    "redis://",
    "redis://:s3cret@",
    "redis://:s3cret@cache:port",
    "redis://:s3cret@cache:0",
    "redis://:s3cret@cache/name",
    "redis://user:s3cret/rest@cache",
    "redis://s3cret/rest@cache",
    "unix://s3cret",
    "redis://[s3cret",
]


@pytest.mark.parametrize("url", GOOD)
def test_only_the_address_is_shown(url: str) -> None:
    assert shown_url(Settings(cache_url=url).cache_url) == GOOD[url]


@pytest.mark.parametrize("url", BAD)
def test_an_address_that_is_none_stops_the_start_and_is_not_quoted(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^cache_url must be redis://") as raised:
        Settings(cache_url=url)
    assert "s3cret" not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    with pytest.raises(InvalidSettings, match=r"^CLASSIFIER_CACHE_URL must be redis://"):
        Settings.load({}, {"CLASSIFIER_CACHE_URL": url})

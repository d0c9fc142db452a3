"""How the gateway counts what the versions of a rollout answer, in front of a stand-in."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import requests

from service.gateway.rollout import KEY, Share
from tests.gateway.clients import SMALL, TIMEOUT, check_error
from tests.gateway.running import Gateway, running, variables
from tests.gateway.upstreams import answer_of, torchserve_that
from tests.processes import wait_for

LATE = b'{"status":"error","code":504,"type":"DeadlineExceeded","message":"late"}'


def series(gateway: Gateway) -> dict[str, int]:
    """What the new version has done, by the name of the metric without gateway_rollout_."""
    text = requests.get(f"{gateway.url}/metrics", timeout=TIMEOUT).text
    found = re.findall(r'^gateway_rollout_(\w+)_total\{version="2.0"\} (\d+)$', text, re.MULTILINE)
    return {name: int(value) for name, value in found}


@contextmanager
def all_to_the_new_version(folder: Path, answer: bytes) -> Iterator[Gateway]:
    """A gateway that sends every request to version 2.0 first; both versions give this answer."""
    share = Share(model="mobilenet_v2", old="1.0", new="2.0", percent=100, shadow=0, step=1)
    file = folder / "rollout.json"
    file.write_text(json.dumps({KEY: asdict(share)}))
    with torchserve_that(answer) as upstream:
        known = {"upstreams": upstream, "models": "mobilenet_v2", "rollout": str(file)}
        with running(folder, variables(**known)) as gateway:
            file.touch()  # as ./scripts/rollout does all the time
            wait_for(lambda: series(gateway))
            yield gateway


@pytest.mark.parametrize(("asked", "failures"), [(None, 1), ("", 1), ("5", 0)])
def test_a_504_says_something_about_the_version_unless_the_client_set_the_time(
    tmp_path: Path, asked: str | None, failures: int
) -> None:
    """The gateway itself gives every try a time."""
    headers = {} if asked is None else {"X-Request-Timeout": asked}
    with all_to_the_new_version(tmp_path, answer_of(LATE, "504 ")) as gateway:
        url = f"{gateway.url}/predict"
        answer = requests.post(url, data=SMALL, headers=headers, timeout=TIMEOUT)
        check_error(answer, 504, "DeadlineExceeded")
        seen = series(gateway)
        assert {seen[name] for name in ("requests", "errors", "rescued")} == {failures}
        asked_twice = gateway.line(answer.headers["X-Request-ID"])["upstream_status"]
        assert asked_twice.count("504") == 1 + failures

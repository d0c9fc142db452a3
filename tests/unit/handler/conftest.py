"""A handler that is ready, for the tests that ask one."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ts.protocol import otf_message_handler

from handler.accounting import Accounts
from handler.collector import Metrics
from handler.image_classifier import ImageClassifier
from tests.unit.handler.worker import start
from tests.unit.tiny import make_model_dir

Logged = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """What our log says by now, without time and level."""
    caplog.set_level(logging.INFO, "classifier")

    def read() -> list[dict[str, Any]]:
        lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "classifier"]
        return [{key: line[key] for key in line if key not in ("time", "level")} for line in lines]

    return read


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def isolation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[list[object]]:
    """No flushing threads, and TorchServe as it was; gives what would have been started."""
    started: list[object] = []
    monkeypatch.setattr(Metrics, "start", lambda metrics: started.append(metrics))
    monkeypatch.setattr(Accounts, "start", lambda accounts: started.append(accounts))
    read = otf_message_handler._retrieve_buffer
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", read)  # put back in the end
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("ts.metrics.caching_metric")
    caplog.set_level(logging.INFO, logger.name)
    filters = list(logger.filters)
    yield started
    logger.filters[:] = filters


@pytest.fixture
def classifier(model_dir: Path, isolation: list[object]) -> ImageClassifier:
    return start(model_dir)

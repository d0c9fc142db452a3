"""A handler that is ready, for the tests that ask one."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from ts.protocol import otf_message_handler

from handler.accounting import Accounts
from handler.image_classifier import ImageClassifier
from handler.metrics import Metrics
from tests.unit.handler.worker import start
from tests.unit.tiny import make_model_dir


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

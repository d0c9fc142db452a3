"""A handler that is ready, for the tests that ask one."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

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
) -> Iterator[list[Metrics]]:
    """No flushing threads, and the root logger as it was; gives what would have been started."""
    started: list[Metrics] = []
    monkeypatch.setattr(Metrics, "start", lambda metrics: started.append(metrics))
    caplog.set_level(logging.INFO)
    filters = list(logging.getLogger().filters)
    yield started
    logging.getLogger().filters[:] = filters


@pytest.fixture
def classifier(model_dir: Path, isolation: list[Metrics]) -> ImageClassifier:
    return start(model_dir)

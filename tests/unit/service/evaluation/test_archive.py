"""An archive that is evaluated in this process, whose exit status says what was measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import handler.failures
from handler.image_classifier import ImageClassifier
from handler.pulse import Pulse
from scripts.evaluate import main
from tests.drawing import encode, noise
from tests.unit.handler.conftest import isolation  # noqa: F401 - a fixture


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was begun that ends a worker's process with status 1."""
    begun: list[object] = []
    monkeypatch.setattr(Pulse, "start", begun.append)
    monkeypatch.setattr(handler.failures, "_end_worker", begun.append)
    return begun


@pytest.mark.usefixtures("isolation")
def test_a_lost_gpu_is_no_measurement(
    archive: Path,
    tmp_path: Path,
    endings: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 1 would say that the model is worse than the bound."""
    load = ImageClassifier.initialize

    def initialize(worker: ImageClassifier, context: Any) -> None:
        load(worker, context)
        begin, passes = worker.engine.launch, iter(range(9))

        def launch(images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
            if next(passes):  # the first one tells the classes
                raise torch.AcceleratorError("CUDA error: an illegal memory access")
            return begin(images)

        monkeypatch.setattr(worker.engine, "launch", launch)
        monkeypatch.setattr(worker.engine, "is_lost", lambda: True)

    monkeypatch.setattr(ImageClassifier, "initialize", initialize)
    (tmp_path / "images" / "0").mkdir(parents=True)
    (tmp_path / "images" / "0" / "1.png").write_bytes(encode(noise()))
    status = main([str(tmp_path / "images"), "--archive", str(archive), "--min-top1", "0.5"])
    assert status == 2
    assert f"error: {archive}: the GPU failed" in capsys.readouterr().err
    assert endings == []

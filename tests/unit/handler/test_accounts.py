"""When finished requests are counted and logged, and what is kept of them until then."""

import gc
import json
import logging
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from handler import accounting
from handler.accounting import Accounts
from handler.batch import Row
from handler.collector import Metrics
from handler.errors import NoImage
from handler.image_classifier import ImageClassifier
from tests.unit.handler.worker import JPEG, Counted, Fake, ask, log

ROOT = Path(__file__).resolve().parents[3]
ARRIVAL = 1_000_000_000.0


def row(request_id: str, **fields: Any) -> Row:
    return Row(request_id, {}, NoImage("none"), status=400, seconds={"preprocess": 0.1}, **fields)


def faulty(request_id: str) -> Row:
    """Of a bug of ours: it was answered, and its answer has no best class."""
    return row(request_id, results=[{"status": "success", "predictions": []}])


@pytest.fixture
def emitted() -> dict[str, float]:
    return {}


@pytest.fixture
def accounts(emitted: dict[str, float], caplog: pytest.LogCaptureFixture) -> Accounts:
    caplog.set_level(logging.INFO, "classifier")

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        emitted[name] = emitted.get(name, 0) + value

    return Accounts(Metrics(emit, "birds", "1.0"), {"model": "birds"}, log_requests=True)


def ids(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line["request_id"] for line in log(caplog, "request")]


def test_nothing_is_counted_or_logged_before_it_is_settled(
    accounts: Accounts, emitted: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    """Then all of it, once, in the order of the answers, as of the time of the answers."""
    accounts.add([row("a"), row("b")], 0.5, ARRIVAL)
    accounts.add([row("c")], 0.25, ARRIVAL + 1)
    accounts.counts.flush()
    assert ids(caplog) == []
    assert emitted["classifier_requests_total"] == 0
    for _ in range(2):
        accounts.settle()
        accounts.counts.flush()
    assert ids(caplog) == ["a", "b", "c"]
    assert len(caplog.records) == 1
    times = [datetime.fromisoformat(line["time"]) for line in log(caplog, "request")]
    assert [when.timestamp() - ARRIVAL for when in times] == [0.5, 0.5, 1.25]
    assert [line["total_ms"] for line in log(caplog, "request")] == [500, 500, 250]
    assert emitted["classifier_requests_total"] == 3
    assert emitted["classifier_batch_requests_count"] == 2
    assert emitted["classifier_worker_busy_seconds_total"] == 0.75


def test_a_batch_that_cannot_be_counted_takes_no_other_with_it(
    accounts: Accounts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "SETTLE_SECONDS", 0.02)
    accounts.start()

    def wait_for_line(request_id: str) -> None:
        deadline = time.monotonic() + 30
        while request_id not in ids(caplog):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    for one in (row("a"), faulty("b"), row("c")):
        accounts.add([one], 0.5, ARRIVAL)
    wait_for_line("c")
    accounts.add([row("d")], 0.5, ARRIVAL)
    wait_for_line("d")
    assert ids(caplog) == ["a", "c", "d"]
    [failed] = log(caplog, "accounts_failed")
    assert failed["level"] == "ERROR"
    assert "IndexError" in failed["cause"]


class Noting(Fake):
    """Knows what became of the images that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[weakref.ref[Tensor]] = []

    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        self.images += map(weakref.ref, images)
        return super().launch(images)


def test_rows_let_go_of_their_images(classifier: ImageClassifier) -> None:
    """At once, because at full load there are many in a quarter of a second."""
    engine = classifier.engine = Noting()
    counted = Counted(classifier)
    good, cut, bad = (bytes(bytearray(data)) for data in (JPEG, JPEG[:-900], b"bad"))
    before = [sys.getrefcount(data) for data in (good, cut, bad)]
    rows: list[dict[str, Any]] = [{"body": data} for data in (good, good, cut, bad)]
    rows += [{"file": good, "top_k": b"0"}, {"file": good, "file2": bad}]
    ask(classifier, *rows, settle=False)
    rows.clear()
    gc.collect()
    assert [sys.getrefcount(data) for data in (good, cut, bad)] == before
    assert [image() for image in engine.images] == [None]
    classifier.accounts.settle()
    images = {"success": 3, "UnreadableImage": 3, "InvalidTopK": 1}
    assert counted.read("images_total") == images
    assert counted["image_bytes_sum",] == 3 * len(good) + len(cut) + 2 * len(bad)


def test_a_worker_that_ends_in_order_settles_first(model_dir: Path) -> None:
    """As it does when TorchServe's frontend has gone: the log, then the metrics."""
    code = (
        "import logging, pathlib, sys\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s', level=logging.INFO)\n"
        "from handler import accounting\n"
        "from tests.unit.handler.worker import JPEG, ask, start\n"
        "accounting.SETTLE_SECONDS = 3600\n"
        f"classifier = start(pathlib.Path({str(model_dir)!r}))\n"
        "ask(classifier, {'body': JPEG}, settle=False)\n"
        "print('answered')\n"
        "sys.exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=ROOT,
    )
    before, after = done.stdout.split("answered\n")
    assert '"event": "request"' not in before
    line, *counts = after.splitlines()
    assert json.loads(line)["request_id"] == "id-0"
    assert any(
        count.startswith("[METRICS]classifier_requests_total.Count:1|") and "status:200" in count
        for count in counts
    ), after

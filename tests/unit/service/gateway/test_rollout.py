"""What the gateway takes from the file of a rollout, which others may have written."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from service.gateway.rollout import MAX_BYTES, STALE_SECONDS, Share, read_share

SHARE = Share(model="m", old="1.0", new="2.0", percent=5, shadow=10, step=3)


def written(path: Path, **change: Any) -> Path:
    path.write_text(json.dumps({"gateway": asdict(SHARE) | change}))
    return path


def test_a_file_that_is_not_written_any_more_counts_for_nothing(tmp_path: Path) -> None:
    file = written(tmp_path / "rollout.json")
    assert read_share(file) == SHARE
    past = time.time() - STALE_SECONDS - 1
    os.utime(file, (past, past))
    assert read_share(file) is None


@pytest.mark.parametrize(
    "change",
    [
        {"new": "2.0/../x"},
        {"old": "1.0\n"},
        {"model": 'm"} 1'},
        {"percent": 101},
        {"shadow": -1},
        {"percent": float("nan")},
        {"percent": "5"},
        {"step": 0},
        {"step": 1.5},
        {"more": 1},
    ],
)
def test_anything_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        read_share(written(tmp_path / "rollout.json", **change))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "rollout.json").write_text(" " * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="more than"):
        read_share(tmp_path / "rollout.json")

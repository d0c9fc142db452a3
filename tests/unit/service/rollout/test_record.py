from pathlib import Path

import pytest

from handler.errors import SetupError
from service.gateway.rollout import Share, read_share
from service.rollout.record import Record, RecordFile

RECORD = Record(
    model="m", old="1.0", new="2.0", archive="m-2.0.mar", sha256="ab", keep_old=False, slow=[0.1]
)
SHARE = Share(model="m", old="1.0", new="2.0", percent=5, shadow=10, step=3)


def test_the_gateway_reads_its_share_out_of_the_record(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "rollout.json")
    assert file.read() is None
    file.write(RECORD, SHARE)
    assert file.read() == RECORD
    assert read_share(tmp_path / "rollout.json") == SHARE
    file.write(RECORD)
    assert read_share(tmp_path / "rollout.json") is None


def test_one_process_at_a_time_works_on_a_rollout(tmp_path: Path) -> None:
    first, second = RecordFile(tmp_path / "rollout.json"), RecordFile(tmp_path / "rollout.json")
    with first.held() as free, second.held() as also:
        assert (free, also) == (True, False)
    with second.held() as free:
        assert free


def test_a_file_of_others_is_not_taken_for_a_record(tmp_path: Path) -> None:
    path = tmp_path / "rollout.json"
    path.write_text('{"model": "m"}')
    with pytest.raises(SetupError, match="is no record of a rollout"):
        RecordFile(path).read()

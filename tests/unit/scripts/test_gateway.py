"""The part of ./scripts/gateway that needs no nginx."""

import hashlib
from pathlib import Path

import pytest

from scripts.gateway import main
from service.gateway.settings import Client, read_keys


def test_new_key_is_the_line_of_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--new-key", "alice"]) == 0
    key, line = (text.partition(": ")[2].strip() for text in capsys.readouterr().out.splitlines())
    assert len(key) >= 43  # 256 bits
    (tmp_path / "keys").write_text(line)
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert read_keys(tmp_path / "keys") == [Client("alice", digest)]
    assert main(["--new-key", "a b"]) == 2

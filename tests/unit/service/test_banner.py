"""What ./scripts/serve prints when it is ready."""

from pathlib import Path

import pytest

from service.banner import scale_command
from service.torchserve.config import ROOT, ServerConfig


def test_scaling_is_advised_with_what_is_no_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ServerConfig.load("127.0.0.1", 8080, 8081, 8082).addresses
    other = ServerConfig.load("127.0.0.1", 8080, 8091, 8092).addresses
    monkeypatch.chdir(ROOT)
    assert scale_command("birds", 3, usual) == "./scripts/scale birds 3"
    assert scale_command("birds/1.0", 2, other) == (
        "./scripts/scale birds 2 --version 1.0 "
        "--management http://127.0.0.1:8091 --metrics http://127.0.0.1:8092"
    )
    monkeypatch.chdir(tmp_path)
    assert Path(scale_command("birds", 3, usual).split()[0]).samefile(ROOT / "scripts" / "scale")

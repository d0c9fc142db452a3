"""Java's shared classes: written by the real Java, whole or not at all."""

import subprocess
from pathlib import Path

import pytest

from handler.errors import SetupError
from scripts import java_cds
from service.torchserve.java import FRONTEND, find_java
from service.torchserve.java_cds import make_java_cds


def test_java_starts_from_its_shared_classes(tmp_path: Path) -> None:
    file = tmp_path / "java-classes.jsa"
    make_java_cds(find_java(), file)
    assert list(tmp_path.iterdir()) == [file]
    command = [find_java(), "-Xshare:on", f"-XX:SharedArchiveFile={file}", "-cp", FRONTEND]
    shared = [str(word) for word in (*command, "-Xlog:class+load", "-version")]
    done = subprocess.run(shared, capture_output=True, text=True, check=True)
    assert "java.lang.String source: shared objects file" in done.stdout
    assert file.stat().st_size > 20 * 2**20, "TorchServe's own classes are missing"


@pytest.mark.parametrize("java", ["exit 1", "sleep 0.1; exit 0"])
def test_another_java_leaves_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], java: str
) -> None:
    file = tmp_path / "java-classes.jsa"
    file.write_text("last")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text(f"#!/bin/sh\n{java}\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(java_cds, "JAVA_CDS", file)
    assert java_cds.main([]) == 1
    assert capsys.readouterr().err == (
        "warning: Java starts slower, without class data sharing: "
        f"{tmp_path / 'bin' / 'java'} did not start TorchServe\n"
    )
    assert file.read_text() == "last"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="nowhere"):
        make_java_cds(find_java(), tmp_path / "nowhere" / "java-classes.jsa")

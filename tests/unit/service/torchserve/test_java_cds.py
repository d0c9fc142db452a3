"""Java's class archive: made by the real Java, whole or not at all."""

import subprocess
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.torchserve import java_cds as class_archive
from service.torchserve.java import find_java
from service.torchserve.java_cds import main, make_class_archive
from service.torchserve.server import FRONTEND


def test_java_starts_from_its_archive(tmp_path: Path) -> None:
    archive = tmp_path / "java-classes.jsa"
    make_class_archive(find_java(), archive)
    assert list(tmp_path.iterdir()) == [archive]
    command = [find_java(), "-Xshare:on", f"-XX:SharedArchiveFile={archive}", "-cp", FRONTEND]
    shared = [str(word) for word in (*command, "-Xlog:class+load", "-version")]
    done = subprocess.run(shared, capture_output=True, text=True, check=True)
    assert "java.lang.String source: shared objects file" in done.stdout
    assert archive.stat().st_size > 20 * 2**20, "TorchServe's own classes are missing"


@pytest.mark.parametrize("java", ["exit 1", "sleep 0.1; exit 0"])
def test_another_java_leaves_the_last_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], java: str
) -> None:
    archive = tmp_path / "java-classes.jsa"
    archive.write_text("last")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text(f"#!/bin/sh\n{java}\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(class_archive, "CLASS_ARCHIVE", archive)
    assert main([]) == 1
    assert capsys.readouterr().err == (
        "warning: no class archive, Java starts slower: "
        f"{tmp_path / 'bin' / 'java'} did not start TorchServe\n"
    )
    assert archive.read_text() == "last"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="nowhere"):
        make_class_archive(find_java(), tmp_path / "nowhere" / "java-classes.jsa")

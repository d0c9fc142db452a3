"""Model archives as files: damaged, of others, and with another configuration."""

import json
import random
import zipfile
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.archive import mar
from service.archive.mar import configure, read_card


@pytest.mark.parametrize("content", [None, b"", b"no zip at all"])
def test_no_card_of_what_is_no_archive(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.mar").write_bytes(content)
    assert read_card(tmp_path / "x.mar") is None


@pytest.mark.parametrize("card", [None, b"", b"\xff\xfe", b'{"inputs_sha256": "x"}'])
def test_no_card_of_a_foreign_archive(tmp_path: Path, card: bytes | None) -> None:
    with zipfile.ZipFile(tmp_path / "x.mar", "w") as content:
        content.writestr("MAR-INF/MANIFEST.json", "{}")
        if card is not None:
            content.writestr("model.json", card)
    assert read_card(tmp_path / "x.mar") is None


def test_damage_by_chance_is_no_crash(tmp_path: Path) -> None:
    small = tmp_path / "small.mar"
    with zipfile.ZipFile(small, "w") as content:
        content.writestr("model.json", json.dumps({"labels": ["a"]}) * 3)
        content.writestr("weights.safetensors", bytes(100))
    whole = small.read_bytes()
    for seed in range(200):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        small.write_bytes(data)
        assert read_card(small) is None, seed


def test_a_configuration_is_put_into_an_archive(archive: Path, built: Path) -> None:
    configure(archive, {"batchSize": 3})
    with zipfile.ZipFile(archive) as new, zipfile.ZipFile(built) as old:
        assert new.namelist() == old.namelist()
        differ = [name for name in new.namelist() if new.read(name) != old.read(name)]
    assert differ == ["model-config.yaml"]
    assert mar.read_config(archive) == {"batchSize": 3}
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_an_archive_that_cannot_be_written_is_an_error(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(SetupError, match=r"mar cannot be written: no space left"):
        configure(archive, {"batchSize": 3})


def test_an_archive_damaged_in_the_middle_has_no_card(archive: Path) -> None:
    whole = archive.read_bytes()
    middle = len(whole) // 2
    archive.write_bytes(whole[:middle] + bytes(4096) + whole[middle + 4096 :])
    assert read_card(archive) is None

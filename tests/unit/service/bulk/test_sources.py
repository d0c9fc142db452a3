"""Where images are found, and that no archive takes more than its bounds."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.bulk import sources
from service.bulk.sources import Image, expand, read
from tests.unit.conftest import at_most

NOTHING = io.BytesIO()


def files(folder: Path, *names: str) -> list[Path]:
    """Files whose content is their name."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return paths


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_folder_is_searched_for_images_in_order(tmp_path: Path) -> None:
    b, a, upper, *_ = files(
        tmp_path, "b.jpg", "a/z.png", "a/B.JPEG", "a/notes.txt", ".b.jpg", ".git/c.jpg", "a/x.zip"
    )
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert expand([tmp_path], NOTHING) == [b, upper, a]


def test_a_pattern_is_a_file_of_that_name_first(tmp_path: Path) -> None:
    deep, odd, plain = files(tmp_path, "a/b/1.jpg", "[1].jpg", "1.jpg")
    assert set(expand([tmp_path / "**" / "1.jpg"], NOTHING)) == {deep, plain}
    assert expand([tmp_path / "[1].jpg"], NOTHING) == [odd]


@pytest.mark.parametrize("name", ["missing", "missing.jpg", "missing.zip", "*.webp"])
def test_a_path_that_does_not_exist_is_a_mistake(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError) as raised:
        expand([*files(tmp_path, "1.jpg"), tmp_path / name], NOTHING)
    assert str(raised.value) == f"{tmp_path / name} does not exist"


def test_a_path_of_a_list_that_does_not_exist_is_a_problem(tmp_path: Path) -> None:
    [missing] = read(expand([Path("-")], io.BytesIO(f"{tmp_path}/missing.jpg\n".encode())))
    assert missing.problem == ("UnreadableFile", "No such file or directory")


def test_a_list_on_stdin_names_files_and_folders(tmp_path: Path) -> None:
    one, two = files(tmp_path, "1.jpg", "folder/2.jpg")
    text = f"{one}\r\n\n{tmp_path}/folder\n{tmp_path}/\udcff.jpg".encode(errors="surrogateescape")
    found = expand([Path("-")], io.BytesIO(text))
    assert found == [one, two, tmp_path / "\udcff.jpg"]
    assert Image(str(found[2])).label == f"{tmp_path}/\\udcff.jpg"
    with pytest.raises(SetupError, match="a line of the list has more than 4096 bytes"):
        expand([Path("-")], io.BytesIO(b"a" * 5000))


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_PATHS", 2)
    with pytest.raises(SetupError, match="more than 2 files"):
        expand(files(tmp_path, "1.jpg", "2.jpg", "3.jpg"), NOTHING)


MEMBERS = {"d/1.jpg": b"one", "d/notes.txt": b"no", "../2.PNG": b"two", "__MACOSX/._1.jpg": b"no"}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "A.TGZ"])
def test_members_of_an_archive(tmp_path: Path, name: str) -> None:
    """Names that would lead out of a folder are but names: nothing is written."""
    path = tmp_path / name
    if name == "a.zip":
        zipped(path, MEMBERS)
    else:
        tar(path, MEMBERS, "w" if name == "a.tar" else "w:gz")
    assert list(read([path])) == [
        Image(f"{path}/d/1.jpg", b"one"),
        Image(f"{path}/../2.PNG", b"two"),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    link = tarfile.TarInfo("x.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(link)
    assert list(read([tmp_path / "a.tar"])) == []


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_member_that_is_too_large_is_left_out(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 2**20)
    members = {"1.jpg": bytes(2**20 + 1), "2.jpg": b"fits"}
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(path, members)
    else:
        tar(path, members, "w:gz")
    large, fits = read([path])
    assert large.problem == ("ImageTooLarge", "more than 1 MiB")
    assert (large.body, fits.body) == (b"", b"fits")


def problems(path: Path) -> list[str]:
    return [image.problem[1] for image in read([path]) if image.problem]


def test_a_tar_that_grows_too_much_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that are no images must be read as well, to get to the next."""
    monkeypatch.setattr(sources, "ALWAYS_ALLOWED", 2**20)
    path = tar(tmp_path / "a.tgz", {"zeros": bytes(2**24), "1.jpg": b"one"}, "w:gz")
    assert path.stat().st_size * sources.MAX_RATIO < 2**24
    assert problems(path) == [
        "the rest of the archive cannot be read: it grows too much as it is decompressed"
    ]


def test_a_zip_that_grows_too_much_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ALWAYS_ALLOWED", 2**20)
    path = zipped(tmp_path / "a.zip", {f"{n}.jpg": bytes(2**20) for n in range(20)})
    images = list(read([path]))
    assert 1 <= len(images) < 20
    assert images[-1].problem is not None
    assert "grows too much" in images[-1].problem[1]


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    """A name of 1 GB, which tarfile would read at once; a few MB once compressed."""
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**30
    path = tmp_path / "a.tgz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(long.tobuf(tarfile.GNU_FORMAT))
        for _ in range(2**6):
            file.write(bytes(2**24))
    with at_most(2**28):
        assert problems(path) == [
            f"the rest of the archive cannot be read: a header of {2**30} bytes"
        ]


@pytest.mark.parametrize("cut", ["short", "header"])
@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_damaged_tar_says_so_after_its_good_members(tmp_path: Path, cut: str, kind: str) -> None:
    path = tar(tmp_path / "a.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 600, "3.jpg": b"3"})
    content = bytearray(path.read_bytes())
    if cut == "short":
        del content[2600:]
    else:
        content[2 * (512 + 1024) + 10] ^= 1  # in the name, so the checksum is wrong
    path.write_bytes(content)
    if kind == "tgz":
        path = path.with_suffix(".tgz")
        path.write_bytes(gzip.compress(content))
    images = list(read([path]))
    good = [image.body for image in images if not image.problem]
    assert good in ([b"1" * 600], [b"1" * 600, b"2" * 600])
    assert len(problems(path)) == 1


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz"])
@pytest.mark.parametrize("content", [b"", b"no archive", bytes(2000), b"PK\5\6" + bytes(18)])
def test_what_is_no_archive_is_a_problem_or_empty(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert all(image.problem for image in read([path, tmp_path / "missing.zip"]))
    assert problems(tmp_path / "missing.zip")


def test_a_damaged_member_of_a_zip_fails_alone(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"1.jpg": os.urandom(100), "2.jpg": b"two"})
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    bad, good = read([path])
    assert bad.problem is not None
    assert "CRC" in bad.problem[1]
    assert good.body == b"two"

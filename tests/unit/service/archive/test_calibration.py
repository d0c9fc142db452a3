"""The calibration folder: images, labels, and everything that is neither."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handler.errors import InvalidModel
from handler.networks import input_transform
from handler.settings import Settings
from service.archive import calibration
from service.archive.calibration import CalibrationSet, read_calibration
from tests.drawing import noise
from tests.unit.tiny import RECIPE

TRANSFORM = input_transform(RECIPE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("a.png", "b.jpg", "c.png")):
        Image.new("RGB", (40, 30), (80 * index, 0, 0)).save(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    return tmp_path


def read(folder: Path) -> CalibrationSet:
    return read_calibration(folder, TRANSFORM, Settings())


def test_images_in_order_of_their_names(folder: Path) -> None:
    content = read(folder)
    assert content.labels is None
    assert [image.shape for image in content.images] == [(3, 224, 224)] * 3
    assert all(image.dtype == np.uint8 for image in content.images)
    assert [round(image[0].mean(), -1) for image in content.images] == [0, 80, 160]


def test_an_int8_model_does_not_depend_on_how_requests_are_decoded(folder: Path) -> None:
    noise((1100, 1030)).save(folder / "large.jpg")
    [*_, exact] = read(folder).images
    [*_, fast] = read_calibration(folder, TRANSFORM, Settings(decode="fast")).images
    assert (exact == fast).all()


def test_labels_go_with_their_files(folder: Path) -> None:
    (folder / "labels.csv").write_text("label,file,class_id\nx,c.png,7\ny,a.png,0\nz,b.jpg,3\n")
    assert read(folder).labels == (0, 3, 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column class_id and no column file"),
        ("file,label\na.png,tench\n", "no column class_id"),
        ("file,class_id\na.png,tench\n", "line 2: class_id must be a class index, got 'tench'"),
        ("file,class_id\na.png,-1\n", "got '-1'"),
        ("file,class_id\na.png\n", "got ''"),
        ("file,class_id\nz.png,1\n", "no image 'z.png'"),
        ("file,class_id\na.png,1\na.png,2\n", "line 3: a.png has a label already"),
        ("file,class_id\na.png,1\n", r"no label for b.jpg \(2 without\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(folder: Path, text: str, said: str) -> None:
    (folder / "labels.csv").write_text(text)
    with pytest.raises(InvalidModel, match=said):
        read(folder)


def test_labels_that_are_not_text_are_refused(folder: Path) -> None:
    (folder / "labels.csv").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InvalidModel, match=r"labels\.csv cannot be read as CSV"):
        read(folder)


def test_what_is_no_image_is_named(folder: Path) -> None:
    (folder / "tench").mkdir()
    with pytest.raises(InvalidModel, match="tench is no image to calibrate with"):
        read(folder)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InvalidModel, match=r"broken\.png is no image to calibrate with"):
        read(folder)
    with pytest.raises(InvalidModel, match="there is no such folder"):
        read(folder / "missing")


def test_of_too_many_images_evenly_chosen_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MAXIMUM_IMAGES", 2)
    (folder / "labels.csv").write_text("file,class_id\na.png,1\nb.jpg,2\nc.png,3\n")
    content = read(folder)
    assert len(content.images) == 2
    assert content.labels == (1, 3)

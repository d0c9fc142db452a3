"""The images that the load generator sends."""

from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import pytest
import simplejpeg
from PIL import Image

from service.load.images import (
    BOUNDARY,
    ImageRequest,
    as_form,
    draw_jpeg,
    in_forms,
    load_images,
    unique_requests,
)


def test_drawn_images_are_photographs_in_size_and_always_the_same() -> None:
    data = draw_jpeg(3)
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert 480 <= image.width <= 520
    assert 20_000 < len(data) < 200_000
    assert draw_jpeg(3) == data != draw_jpeg(4)


def test_images_of_a_folder(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "b.JPG", "JPEG")
    Image.new("L", (8, 8)).save(tmp_path / "a.jpeg", "JPEG")
    (tmp_path / "labels.csv").write_text("file,class_id,label\nb.JPG,3,shark\n")
    assert [image.name for image in load_images(tmp_path)] == ["a.jpeg", "b.JPG"]


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no \.jpg"):
        load_images(tmp_path)


def test_multipart() -> None:
    images = [ImageRequest("a.jpg", b"first"), ImageRequest("b.jpg", b"second")]
    form = as_form(images, ["file1", "file2"])
    assert (form.name, form.content_type) == ("a.jpg", f"multipart/form-data; boundary={BOUNDARY}")
    head, first, second, end = form.body.split(f"--{BOUNDARY}".encode())
    assert (head, end) == (b"", b"--\r\n")
    assert b'name="file1"' in first
    assert first.endswith(b"\r\n\r\nfirst\r\n")
    assert b'name="file2"' in second
    assert second.endswith(b"\r\n\r\nsecond\r\n")


def test_forms_of_several_images_take_turns() -> None:
    images = [ImageRequest(name, name.encode()) for name in ("a", "b", "c")]
    forms = in_forms(images, 2, "mixed")
    assert [form.name for form in forms] == ["a", "b", "c"]
    assert {form.content_type for form in forms} == {f"multipart/mixed; boundary={BOUNDARY}"}
    assert forms[2].body == as_form([images[2], images[0]], ["file1", "file2"]).body


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0" + b"x" * 300])
def test_unique_requests_show_the_same_pixels_in_other_bytes(exif: bytes) -> None:
    file = BytesIO()
    Image.effect_noise((40, 30), 90).save(file, "JPEG", exif=exif)
    images = [ImageRequest("a.jpg", file.getvalue()), ImageRequest("b.jpg", draw_jpeg(1))]
    found = list(islice(unique_requests(images), 5))
    assert [image.name for image in found] == ["a.jpg", "b.jpg", "a.jpg", "b.jpg", "a.jpg"]
    bodies = {image.body for image in [*found, *islice(unique_requests(images), 5), *images]}
    assert len(bodies) == 12
    for image, original in zip(found, cycle(images), strict=False):
        shown, expected = (Image.open(BytesIO(data.body)) for data in (image, original))
        assert shown.tobytes() == expected.tobytes()
        assert shown.info.get("exif") == expected.info.get("exif")
        assert simplejpeg.decode_jpeg(image.body).shape == (*expected.size[::-1], 3)


def test_unique_requests_with_several_images() -> None:
    images = [ImageRequest(f"{seed}.jpg", draw_jpeg(seed)) for seed in range(3)]
    first, second = islice(unique_requests(images, 2), 2)
    assert (first.name, second.name) == ("0.jpg", "2.jpg")
    assert first.content_type == f"multipart/mixed; boundary={BOUNDARY}"
    assert len(first.body.split(f"--{BOUNDARY}\r\n".encode())) == 3

"""The images of a benchmark."""

from pathlib import Path

from PIL import Image

from benchmarks.images import load_rgb, read_labels


def test_images_in_colour_and_labels(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "b.JPG", "JPEG")
    Image.new("L", (8, 8)).save(tmp_path / "a.jpeg", "JPEG")
    (tmp_path / "labels.csv").write_text("file,class_id,label\nb.JPG,3,shark\n")
    assert [image.name for image in load_rgb(tmp_path)] == ["b.JPG"]
    assert read_labels(tmp_path) == {"b.JPG": "shark"}
    assert read_labels(None) == {}

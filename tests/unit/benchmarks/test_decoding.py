"""The comparison of exact and fast decoding on a user's images."""

from pathlib import Path

import pytest

from benchmarks.decoding import compare_decoding, main
from handler.errors import UnreadableImage
from handler.settings import Settings
from tests.drawing import encode, noise
from tests.unit.tiny import make_model_dir

SETTINGS = Settings(engine="torch", precision="fp32", threads=1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


def test_only_what_fast_scales_down_is_compared(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "small.jpg").write_bytes(encode(noise((300, 200)), "JPEG"))
    found = compare_decoding(model_dir, tmp_path, SETTINGS)
    assert found == {"engine": "torch-fp32", "images": 1, "scaled_down": 0}
    for seed in range(2):
        data = encode(noise((1100, 1030), seed), "JPEG")
        (tmp_path / f"large-{seed}.jpg").write_bytes(data)
    found = compare_decoding(model_dir, tmp_path, SETTINGS)
    assert (found["images"], found["scaled_down"]) == (3, 2)
    assert 0 < found["mean_difference"] <= found["largest_difference"] < 1
    assert found["same_best_class"] in (0, 0.5, 1)
    assert found["exact_cpu_ms"] > 0
    assert found["fast_cpu_ms"] > 0


def test_an_image_that_is_refused_is_named(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(encode(noise((300, 200)), "JPEG")[:900])
    with pytest.raises(UnreadableImage, match=r"broken\.jpg: 900 bytes"):
        compare_decoding(model_dir, tmp_path, SETTINGS)


def test_without_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", str(tmp_path), "--archive", str(tmp_path / "none.mar")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {tmp_path}/none.mar cannot be unpacked")

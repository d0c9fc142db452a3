"""What a long stage says where no bar can be drawn."""

import pytest

from service.archive.progress import stage


@pytest.mark.parametrize(("total", "words"), [(1, "1 image"), (200, "200 images")])
def test_a_stage_without_a_terminal_is_a_line(
    capsys: pytest.CaptureFixture[str], total: int, words: str
) -> None:
    with stage("Reading images", total, "image"):
        assert capsys.readouterr().err == f"Reading images: {words}\n"

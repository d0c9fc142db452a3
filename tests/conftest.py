import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where there is one, and nowhere else is anything to be learnt."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU that torch can use")

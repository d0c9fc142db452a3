import os
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]


def skip(reason: str) -> NoReturn:
    """Skip the test, or fail it if REQUIRE_EVERYTHING says that nothing may be skipped."""
    import pytest  # here: the conformance kit imports this package in environments without it

    if os.environ.get("REQUIRE_EVERYTHING"):
        pytest.fail(reason)
    pytest.skip(reason)

import shutil
from pathlib import Path

import pytest

from service.archive.packaging import package
from tests.unit.service.planning import planned


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of untrained weights, to look at."""
    return package(planned(tmp_path_factory.mktemp("built") / "new" / "store"))


@pytest.fixture
def archive(built: Path, tmp_path: Path) -> Path:
    """A copy to do things to."""
    (tmp_path / "store").mkdir()
    return Path(shutil.copy2(built, tmp_path / "store"))

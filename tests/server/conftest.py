from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ROOT, skip
from tests.server.serving import Server, serving

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Beside servers that keep the cores busy, threads of torch mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, colours: list[str], store: Path
) -> Iterator[Server]:
    """Two workers that know three colours."""
    service = "tcp://10.0.0.1:80"  # as Kubernetes tells of a Service named `classifier`
    env = {"TS_MODEL_STORE": str(store), "CLASSIFIER_PORT": service}
    with serving(tmp_path_factory.mktemp("server"), *colours, env=env) as server:
        yield server


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and labelled images, which lie beside a checkout and are not part of it."""
    if not SHARED.is_dir():
        skip(f"{SHARED.name}/, with real weights and images, is missing beside the checkout")
    return SHARED

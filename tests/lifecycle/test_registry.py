"""Weights of a real MLflow server with SQLite, and of an S3 on loopback."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import requests
import torch
from safetensors.torch import save_file

from handler.errors import InvalidModel, SetupError
from handler.model_card import file_sha256
from service.archive.mar import read_card, seal
from service.options import ModelOptions, parse_package
from service.registry.cache import cache_folder
from service.registry.downloads import download
from service.registry.fetching import Origin, fetch
from service.registry.publishing import log_archive
from service.registry.references import Url
from tests.drawing import encode, noise
from tests.processes import free_port, wait_for
from tests.server.serving import READY_SECONDS, environment, run_script, serving
from tests.unit.tiny import ARCHITECTURE, LABELS, RECIPE, tiny_card, tiny_network

NAME = "birds"


@contextmanager
def running(folder: Path, *command: str, health: str) -> Iterator[None]:
    """A server in a process group of its own, from its first answer until it is ended."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(folder, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}),
            start_new_session=True,
        )

    def answers() -> bool:
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            return requests.get(health, timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wait_for(answers, READY_SECONDS, (folder / "server.log").read_text)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server with its database and its artefacts."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    url = f"http://127.0.0.1:{port}"
    with running(
        folder,
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", str(folder / "artefacts")),
        health=f"{url}/health",
    ):
        yield url


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory, tracking: str) -> Path:
    """A folder with an archive that ./scripts/package has logged as the first version of NAME."""
    folder = tmp_path_factory.mktemp("birds")
    torch.save(tiny_network().state_dict(), folder / "birds.pth")
    (folder / "birds.txt").write_text("\n".join(LABELS))
    done = run_script(
        "package",
        folder,
        *("--model", ARCHITECTURE, "--version", "2.0", "--device", "cpu", "--workers", "1"),
        *("--weights", str(folder / "birds.pth"), "--labels", str(folder / "birds.txt")),
        *("--log-to", f"mlflow:{NAME}"),
        env={"MLFLOW_TRACKING_URI": tracking},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"mlflow:models:/{NAME}/1"
    return folder


@pytest.fixture
def client(tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's own, with an empty cache of ours."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return MlflowClient()


def fetched(*argv: str) -> tuple[ModelOptions, Origin]:
    options, origin = fetch(parse_package(argv))
    assert origin is not None
    return options, origin


def in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file())


def log_run(client: Any, tags: dict[str, str], *names: str) -> str:
    """A run with files of these names, all with the same state dict; its id."""
    run = client.create_run("0", tags=tags).info.run_id
    for name in names:
        if name.endswith(".pth"):
            client.log_text(run, "", f"{name}.made")  # a file of another kind beside it
        folder, _, file = name.rpartition("/")
        path = cache_folder().parent / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, path)
        client.log_artifact(run, str(path), folder or None)
    return str(run)


# --- From an archive into the registry, and back


def test_what_is_logged(client: Any, birds: Path) -> None:
    version = client.get_model_version(NAME, "1")
    archive = birds / "store" / f"{ARCHITECTURE}-2.0.mar"
    card = read_card(archive)
    assert card is not None
    assert version.tags == {
        "architecture": ARCHITECTURE,
        "recipe": str(RECIPE),
        "sha256": card.files["weights.safetensors"],
    }
    files = {Path(file.path).name for file in client.list_artifacts(version.run_id, "model")}
    assert files == {archive.name, "labels.json", "model.json", "weights.safetensors"}
    assert client.get_run(version.run_id).info.status == "FINISHED"


def test_a_served_version_gives_the_answers_of_its_archive(
    client: Any, tracking: str, birds: Path, tmp_path: Path
) -> None:
    """Under an alias; what is recorded is the version."""
    client.set_registered_model_alias(NAME, "champion", "1")
    image = encode(noise((224, 224)), "PNG")
    options = ["--model", ARCHITECTURE, "--weights", f"mlflow:models:/{NAME}@champion"]
    options += ["--archive", str(birds / "store"), "--device", "cpu", "--workers", "1"]
    env = {"MLFLOW_TRACKING_URI": tracking}
    with serving(tmp_path, *options, model=ARCHITECTURE, env=env) as server:
        info = server.info(f"{ARCHITECTURE}/1.0")
        answers = [
            requests.post(f"{server.predictions}/{version}?top_k=3", data=image, timeout=60).json()
            for version in ("1.0", "2.0")
        ]
    card = read_card(birds / "store" / f"{ARCHITECTURE}-2.0.mar")
    assert card is not None
    assert info["weights"] == {
        "name": f"{NAME}/1",
        "trained": True,
        "source": f"mlflow:models:/{NAME}/1",
        "sha256": card.files["weights.safetensors"],
    }
    assert (info["architecture"], info["recipe"]) == (ARCHITECTURE, str(RECIPE))
    assert answers[0]["predictions"] == answers[1]["predictions"]
    assert answers[0]["metadata"]["weights"] == f"{NAME}/1"


def test_an_alias_is_resolved_at_each_start(client: Any, birds: Path) -> None:
    second = log_archive(birds / "store" / f"{ARCHITECTURE}-2.0.mar", NAME)
    assert second == "2"
    for version in ("1", "2"):
        client.set_registered_model_alias(NAME, "newest", version)
        options, origin = fetched("--weights", f"mlflow:models:/{NAME}@newest")
        assert origin == Origin(f"{NAME}/{version}", f"mlflow:models:/{NAME}/{version}")
    assert options.models == (ARCHITECTURE,)
    assert options.recipe == str(RECIPE)
    assert options.labels is not None
    assert tuple(json.loads(Path(options.labels).read_text())) == LABELS


def test_weights_of_a_known_digest_are_not_fetched_again(client: Any, birds: Path) -> None:
    weights = fetched("--weights", f"mlflow:models:/{NAME}/1")[0].weights
    assert weights is not None
    before = Path(weights).stat().st_mtime_ns
    assert fetched("--weights", f"mlflow:models:/{NAME}/1")[0].weights == weights
    assert Path(weights).stat().st_mtime_ns == before


def test_options_go_over_what_the_registry_says(client: Any, birds: Path) -> None:
    given = ["--weights", f"mlflow:models:/{NAME}/1", "--labels", "mine.txt"]
    options, _ = fetched(*given, "--model", ARCHITECTURE, "--recipe", "Mine.V1")
    assert (options.labels, options.recipe) == ("mine.txt", "Mine.V1")
    options, _ = fetched(*given, "--model", "resnet18")  # another's recipe is of no use
    assert (options.models, options.recipe) == (("resnet18",), None)


def test_untrained_weights_are_not_logged(client: Any, tmp_path: Path) -> None:
    archive = tmp_path / "untrained.mar"
    with ZipFile(archive, "w"):
        pass
    seal(archive, tiny_card(trained=False))
    with pytest.raises(InvalidModel, match="is untrained"):
        log_archive(archive, "nothing")
    assert not client.search_registered_models("name = 'nothing'")


# --- Runs, and models of others


def test_a_run_has_one_weights_file(client: Any) -> None:
    tags = {"architecture": ARCHITECTURE}
    run = log_run(client, tags, "best/w.safetensors", "best/labels.txt")
    options, origin = fetched("--weights", f"mlflow:runs:/{run}/best")
    assert origin == Origin("w.safetensors", f"mlflow:runs:/{run}/best")
    assert options.models == (ARCHITECTURE,)
    assert Path(options.labels or "").name == "labels.txt"
    assert fetched("--weights", f"mlflow:runs:/{run}")[1].name == "w.safetensors"


def test_several_weights_are_listed_and_one_can_be_named(client: Any) -> None:
    run = log_run(client, {}, "a/best.pth", "a/last.safetensors", "config.txt")
    with pytest.raises(InvalidModel) as refused:
        fetched("--weights", f"mlflow:runs:/{run}")
    assert "has weights 2 times: a/best.pth, a/last.safetensors" in str(refused.value)
    options, origin = fetched(
        "--model", ARCHITECTURE, "--weights", f"mlflow:runs:/{run}/a/last.safetensors"
    )
    assert origin.name == "last.safetensors"
    assert options.labels is None
    assert in_cache() == ["last.safetensors"]


def test_a_run_without_weights_says_what_it_has(client: Any) -> None:
    run = log_run(client, {}, "config.txt")
    with pytest.raises(InvalidModel, match=r"has no weights .*: it has config\.txt"):
        fetched("--weights", f"mlflow:runs:/{run}")
    with pytest.raises(InvalidModel, match="has no weights"):
        fetched("--weights", f"mlflow:runs:/{run}/w.pth")


def test_a_model_that_does_not_say_what_it_is(client: Any) -> None:
    run = log_run(client, {}, "w.pth")
    with pytest.raises(SetupError, match="give --model NAME"):
        fetched("--weights", f"mlflow:runs:/{run}")


@pytest.mark.parametrize("name", ["../../evil", "ResNet", "a" * 101])
def test_an_architecture_that_is_no_name_is_refused(client: Any, name: str) -> None:
    run = log_run(client, {"architecture": name}, "w.pth")
    with pytest.raises(InvalidModel, match="is no architecture"):
        fetched("--weights", f"mlflow:runs:/{run}")


def test_another_file_than_the_tag_says_is_refused(client: Any, birds: Path) -> None:
    version = client.get_model_version(NAME, "1")
    other = client.create_model_version(
        NAME, version.source, version.run_id, tags={"sha256": "0" * 64}
    )
    with pytest.raises(InvalidModel, match="is damaged or another file"):
        fetched("--weights", f"mlflow:models:/{NAME}/{other.version}")
    assert "weights.safetensors" not in in_cache()
    client.set_model_version_tag(NAME, other.version, "sha256", "none")
    with pytest.raises(InvalidModel, match="must be 64 hexadecimal digits"):
        fetched("--weights", f"mlflow:models:/{NAME}/{other.version}")


@pytest.mark.parametrize(
    "reference",
    [f"models:/{NAME}/999", "models:/nothing/1", f"models:/{NAME}@nobody", "runs:/0a1b/x"],
)
def test_what_the_server_has_not(client: Any, birds: Path, reference: str) -> None:
    with pytest.raises(SetupError, match=r"^MLflow \(MLFLOW_TRACKING_URI\): .*not"):
        fetched("--weights", f"mlflow:{reference}")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SetupError, match=r"^MLflow \(MLFLOW_TRACKING_URI\): ") as refused:
        fetched("--weights", f"mlflow:models:/{NAME}/1")
    assert "secret" not in str(refused.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(SetupError, match="in MLFLOW_TRACKING_URI"):
        fetched("--weights", f"mlflow:models:/{NAME}/1")


# --- S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    url = f"http://127.0.0.1:{port}"
    with running(
        folder, "moto.server", "-H", "127.0.0.1", "-p", str(port), health=f"{url}/moto-api/"
    ):
        yield url


def test_a_file_of_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one piece; another digest, object and bucket are refused."""
    content = bytes(range(256)) * 40_000  # 10 MB
    digest = hashlib.sha256(content).hexdigest()
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TORCH_HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    requests.put(f"{s3}/models", timeout=30).raise_for_status()
    requests.put(f"{s3}/models/a/birds.pth", data=content, timeout=30).raise_for_status()
    path = download(Url("s3://models/a/birds.pth"), digest)
    assert (path.name, file_sha256(path)) == ("birds.pth", digest)
    shutil.rmtree(path.parent)
    with pytest.raises(InvalidModel, match=f"sha256 is {digest}, expected 000"):
        download(Url("s3://models/a/birds.pth"), "0" * 64)
    for url in ("s3://models/b.pth", "s3://others/birds.pth"):
        with pytest.raises(SetupError, match=f"{url} cannot be downloaded: "):
            download(Url(url), digest)
    assert in_cache() == []

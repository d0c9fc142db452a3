"""An archive logged to MLflow, as a version of a registered model that `--weights` takes."""

import json
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

from handler.errors import InvalidModel, SetupError
from handler.model_card import CARD_FILE, WEIGHTS_FILE, ModelCard, file_sha256
from service.archive.mar import read_card
from service.registry.client import mlflow_client
from service.temporary import TemporaryFolder

FOLDER = "model"  # of the run's artefacts
READY_SECONDS = 60  # for the registry to make a version of them


def publish(archive: Path, name: str) -> int:
    """Log an archive, with its version on stdout and what is wrong on stderr; the exit status."""
    try:
        version = log_archive(archive, name)
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"mlflow:models:/{name}/{version}")
    return 0


def log_archive(archive: Path, name: str) -> str:
    """Log an archive's weights, labels and card, and the archive; the version's number.

    A run that fails is marked as failed in MLflow, and no version is made of it.
    Raises SetupError, OSError, and InvalidModel if the weights are untrained.
    """
    card = read_card(archive)
    if card is None:
        raise InvalidModel(f"{archive} is damaged")
    if not card.weights.trained:
        raise InvalidModel(f"{archive} is untrained, and is not logged to MLflow")
    with mlflow_client() as client, TemporaryFolder("registry-") as folder:
        import mlflow
        from mlflow.exceptions import MlflowException

        files = lay_out(archive, card, folder / FOLDER)
        with mlflow.start_run(run_name=f"package {archive.stem}") as run:
            mlflow.log_artifacts(str(files), FOLDER)
            try:
                client.create_registered_model(name)
            except MlflowException as exc:
                if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = client.create_model_version(
                name,
                f"{run.info.artifact_uri}/{FOLDER}",
                run.info.run_id,
                tags=tags_of(card, files / WEIGHTS_FILE),
                await_creation_for=READY_SECONDS,
            )
    return str(version.version)


def lay_out(archive: Path, card: ModelCard, folder: Path) -> Path:
    """The files that are logged, in a new folder. Raises OSError."""
    folder.mkdir()
    with ZipFile(archive) as content:
        for name in (WEIGHTS_FILE, CARD_FILE):
            content.extract(name, folder)
    labels = json.dumps(card.labels, indent=1, ensure_ascii=False)
    (folder / "labels.json").write_text(labels, "utf-8")
    shutil.copy(archive, folder)
    return folder


def tags_of(card: ModelCard, weights: Path) -> dict[str, str]:
    """What the registry says about the model. Raises OSError."""
    from handler.networks import SCALE_INPUT_AGAIN, get_recipe, input_transform

    tags = {
        "architecture": card.architecture,
        "recipe": card.recipe,
        "sha256": file_sha256(weights),
    }
    if card.architecture in SCALE_INPUT_AGAIN:
        again = input_transform(get_recipe(card.architecture, card.recipe), transform_input=True)
        tags["transform_input"] = "on" if card.transform == again else "off"
    return tags

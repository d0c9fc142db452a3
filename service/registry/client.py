"""MLflow's client, imported when it is needed and held to our limits of time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from handler.errors import SetupError
from service.registry.references import one_line

# Ours where the environment says nothing. MLflow's own are 7 attempts of 120 s, a report of its use
# to its makers, a bar that counts files, and addresses on stdout.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def mlflow_client() -> Iterator[Any]:
    """The client of the tracking server that MLFLOW_TRACKING_URI names.

    Everything that MLflow raises inside becomes a SetupError of one line, as is a missing package.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise SetupError("mlflow: needs the tracking server's address in MLFLOW_TRACKING_URI")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient

        yield MlflowClient()
    except SetupError:
        raise
    except ImportError as exc:  # also of a database, or of an artefact store of another kind
        raise SetupError(
            "mlflow: needs the packages of requirements-registry.txt, and those of its artefact "
            f"store or database; {exc.name} is missing"
        ) from exc
    except Exception as exc:  # requests, MLflow and each artefact store have types of their own
        raise SetupError(f"MLflow (MLFLOW_TRACKING_URI): {one_line(exc)}") from exc

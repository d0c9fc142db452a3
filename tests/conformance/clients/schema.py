"""Schemathesis: requests made from the protocol's OpenAPI document, and answers held against it."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.conformance.checks import (
    FAIL,
    NOT_OFFERED,
    REST_SCHEMA,
    Checks,
    Result,
    Subject,
    expect,
)
from tests.conformance.tensors import json_request

DOCUMENT = Path(__file__).parents[1] / "open_inference.yaml"
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
SEED = "16"
EXAMPLES = "25"  # random requests for each path, beside those at the schema's limits
CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"
SECONDS = 500
SETTINGS = "[phases.coverage]\nunexpected-methods = []\n"  # which the protocol says nothing of
CLIENT = f"schemathesis {version('schemathesis')}"


def document(subject: Subject) -> dict[str, Any]:
    """The protocol's document for one model; without the paths of versions if it has none."""
    text = DOCUMENT.read_text("utf-8").replace("MODEL", subject.model)
    made: dict[str, Any] = yaml.safe_load(text.replace("VERSION", subject.version or "VERSION"))
    if subject.version is None:
        paths = made["paths"].items()
        made["paths"] = {path: what for path, what in paths if "VERSION" not in path}
    for operations in made["paths"].values():
        if "post" in operations and subject.inputs:
            content = operations["post"]["requestBody"]["content"]
            content["application/json"]["example"] = json_request(subject)
    return made


def results(subject: Subject) -> Iterator[Result]:
    made = document(subject)
    with TemporaryDirectory() as folder:
        path, report = Path(folder) / "openapi.json", Path(folder) / "junit.xml"
        path.write_text(json.dumps(made), "utf-8")
        (Path(folder) / "schemathesis.toml").write_text(SETTINGS, "utf-8")
        done = subprocess.run(
            [
                *[str(SCHEMATHESIS), "run", str(path), "--url", subject.url, "--checks", CHECKS],
                *["--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES],
                *["--seed", SEED, "--generation-database", "none", "--no-color", "--no-shrink"],
                *["--report", "junit", "--report-junit-path", str(report), "--warnings", "off"],
                *["--continue-on-failure", "--request-timeout", "30"],
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        expect(report.exists(), f"schemathesis failed: {(done.stderr or done.stdout)[-300:]}")
        # The report is our own tool's, and nothing in it names another file.
        cases = ElementTree.parse(report).iter("testcase")  # noqa: S314
        failures = {case.get("name", ""): list(case.iter("failure")) for case in cases}
    for path_name, operations in made["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path_name}"
            about = Result(
                protocol="V2 REST",
                name=f"schema: {operation['operationId']}",
                client=CLIENT,
                states="Answers have the form that the OpenAPI document gives, and are no 5xx.",
                source=REST_SCHEMA,
            )
            if name not in failures:
                yield replace(about, outcome=FAIL, seen=f"{name} is not in the report")
                continue
            said = "\n".join(each.text or "" for each in failures[name])
            yield replace(about, outcome=FAIL if said else about.outcome, seen=summary(said))
    if subject.version is None:
        for operation_id in ("version ready", "version metadata", "infer with a version"):
            yield replace(
                about,
                name=f"schema: {operation_id}",
                outcome=NOT_OFFERED,
                seen="the model's metadata names no versions",
            )


def summary(said: str) -> str:
    """What went wrong and with which request, of the tool's report of it."""
    lines = [line.strip() for line in said.splitlines()]
    wrong = [line[2:] for line in lines if line.startswith("- ST")]
    status = [line.rstrip(":") for line in lines if line.startswith("[")]
    requests = [line for line in lines if line.startswith("curl ")]
    return "; ".join([*wrong[:2], *status[:1], *requests[:1]])[:400]


class Schema(Checks):
    """One run of the tool makes all results."""

    def run(self, subject: Subject) -> Iterator[Result]:
        yield from results(subject)


if __name__ == "__main__":
    sys.exit(Schema(CLIENT).main())

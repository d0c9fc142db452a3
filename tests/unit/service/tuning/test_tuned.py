"""The file between ./scripts/tune and ./scripts/serve."""

from pathlib import Path

import pytest
import yaml

from handler.errors import InvalidSettings, SetupError
from handler.machine import available_cores, cpu_model
from service.options import parse_package
from service.plan import PackagePlan, plan_package
from service.torchserve.config import ServerConfig
from service.tuning import tuned
from service.tuning.tuned import Facts, Tuned, TunedHandler, TunedOptions, read_tuned
from tests.unit.service.planning import MODEL, planned


@pytest.fixture
def content() -> Tuned:
    return Tuned(
        model=MODEL,
        options=TunedOptions(
            device="cpu", precision="fp32", workers=3, batch_size=16, max_batch_delay_ms=5
        ),
        handler=TunedHandler(engine="torch", threads=2, max_forward=8),
        facts=Facts(
            slo_p99_ms=100.0,
            throughput_rps=61.5,
            p99_ms=88.0,
            concurrency=8,
            date="2026-11-23T05:33:12+00:00",
            cpu=cpu_model(),
            cores=available_cores(),
            versions={"torch": "2"},
        ),
    )


@pytest.fixture
def path(content: Tuned, tmp_path: Path) -> Path:
    content.write(tmp_path / "store" / "tuned.yaml")
    return tmp_path / "store" / "tuned.yaml"


def plan(path: Path, *argv: str) -> PackagePlan:
    options = parse_package(["--model", MODEL, "--tuned", str(path), *argv])
    return plan_package(MODEL, options, ServerConfig.load())


def test_round_trip(path: Path, content: Tuned) -> None:
    assert read_tuned(path, MODEL) == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_decides_the_archives_configuration(path: Path) -> None:
    config = plan(path).config
    names = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "deviceType")
    assert [config[name] for name in names] == [3, 3, 16, 5, "cpu"]
    handler = {"device": "cpu", "precision": "fp32", "engine": "torch"}
    assert config["handler"] == handler | {"threads": 2, "max_forward": 8}


def test_options_go_over_the_file_and_it_is_said(path: Path) -> None:
    made = plan(path, "--workers", "1", "--batch-size", "16")
    names = ("minWorkers", "batchSize", "maxBatchDelay")
    assert [made.config[name] for name in names] == [1, 16, 5]
    assert made.notes == (f"warning: --workers 1 goes over {path}, which has 3",)


def test_the_environment_goes_over_the_file_and_it_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_THREADS", "1")
    assert plan(path).notes == (f"warning: CLASSIFIER_THREADS=1 goes over {path}, which has 2",)


@pytest.mark.parametrize(("name", "value"), [("cpu_model", "Z80"), ("available_cores", 1000)])
def test_another_machine_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    assert plan(path).notes == ()
    monkeypatch.setattr(tuned, name, lambda: value)
    (line,) = plan(path).notes
    assert "was tuned on another machine" in line
    assert str(value) in line


def test_the_file_of_each_model_is_in_the_store(content: Tuned, tmp_path: Path) -> None:
    content.write(tmp_path / f"tuned-{MODEL}.yaml")
    assert planned(tmp_path, "--tuned").notes == (
        f"warning: --workers 1 goes over {tmp_path / f'tuned-{MODEL}.yaml'}, which has 3",
    )
    with pytest.raises(InvalidSettings, match=r"tuned-alexnet.yaml is missing: ./scripts/tune"):
        planned(tmp_path, "--tuned", model="alexnet")


REFUSALS = [
    ("", "x", 1, "x is unknown"),
    ("handler", "top_k", 1, "handler.top_k is unknown"),
    ("options", "workers", 0, "options.workers must be 1 to 1024, got 0"),
    ("options", "workers", True, "options.workers must be a whole number, got True"),
    ("options", "max_batch_delay_ms", 10_001, "options.max_batch_delay_ms must be 0 to 10000"),
    ("options", "precision", "fp8", "precision must be one of"),
    ("handler", "engine", "onnx", "engine must be one of"),
    ("handler", "threads", -1, "threads must be 0 to 1024"),
    ("handler", "max_forward", None, "handler.max_forward must be a whole number, got None"),
    ("facts", "versions", [], "facts.versions must be a mapping"),
    ("", "options", 3, "options must be a mapping"),
    ("", "model", "alexnet", "was tuned for alexnet, and the model is squeezenet1_1"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), REFUSALS)
def test_what_is_wrong_in_a_file_is_refused_by_its_name(
    path: Path, section: str, key: str, value: object, message: str
) -> None:
    document = yaml.safe_load(path.read_text())
    (document[section] if section else document)[key] = value
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidSettings) as refused:
        read_tuned(path, MODEL)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the file must be a mapping"),
        (b"- 1", "the file must be a mapping"),
        (b"{", "is not valid YAML"),
        (b"\xff", "is not valid YAML"),
        (b"model: 2001-02-30", "is not valid YAML"),
        (b"model: !!bool x", "is not valid YAML"),
        (b"[" * 600, "is not valid YAML"),
        (b"model: squeezenet1_1", "options is missing"),
    ],
)
def test_a_damaged_file_is_refused(path: Path, text: bytes, message: str) -> None:
    path.write_bytes(text)
    with pytest.raises(InvalidSettings, match=message) as refused:
        read_tuned(path, MODEL)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"x.yaml is missing: ./scripts/tune writes it"):
        read_tuned(tmp_path / "x.yaml", MODEL)
    with pytest.raises(InvalidSettings, match="cannot be read"):
        read_tuned(tmp_path, MODEL)


def test_a_file_that_cannot_be_written(content: Tuned, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        content.write(tmp_path / "file" / "tuned.yaml")

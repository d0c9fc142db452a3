"""./scripts/tune, the command."""

import pytest

from scripts.tune import main

MODEL = "squeezenet1_1"


@pytest.mark.parametrize("name", ["ENGINE", "PRECISION", "THREADS", "MAX_FORWARD"])
def test_a_variable_that_decides_what_is_tried_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"CLASSIFIER_{name}", "1")
    assert main(["--model", MODEL, "--slo-p99-ms", "100"]) == 2
    assert f"error: CLASSIFIER_{name} is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["--slo-p99-ms", "0"], ["--seconds", "x"], ["--model", "alexnet"], ["--tuned"]],
    ids=" ".join,
)
def test_mistakes_in_options(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", MODEL, "--slo-p99-ms", "100", *argv])
    assert ended.value.code == 2

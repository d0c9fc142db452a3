"""Command-line options: defaults, ranges, combinations, and one line for each mistake."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import options
from service.options import ModelOptions, ServeOptions, parse_package, parse_serve, to_argv

Parse = Callable[[list[str]], Any]


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str], parse: Parse = parse_serve) -> str:
    """The mistake in the one line that is printed; the exit status is 2."""
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    message, see, _ = line.partition("; see ./scripts/")
    assert see
    return message


def test_nothing_is_decided_without_options() -> None:
    assert parse_serve([]) == ServeOptions(models=("mobilenet_v2",))
    assert parse_package([]) == ModelOptions(models=("mobilenet_v2",))
    assert parse_serve(["--workers", "auto"]).workers is None


def test_every_model_option() -> None:
    argv = "--model resnet18 --weights w.pth --recipe R --labels l.txt --device cuda "
    argv += "--precision bf16 --workers 3 --batch-size 16 --max-batch-delay-ms 7 --tuned t.yaml "
    argv += "--device-ids 0,2 --workers-per-gpu 2 --calibration photos --minimum-agreement 0.9 "
    argv += "--weights-prefix ema --version 2024-05-01_b --sign key.pem"
    assert parse_package(argv.split()) == ModelOptions(
        models=("resnet18",),
        version="2024-05-01_b",
        weights="w.pth",
        weights_prefix="ema",
        recipe="R",
        labels="l.txt",
        device="cuda",
        device_ids=(0, 2),
        precision="bf16",
        calibration="photos",
        minimum_agreement=0.9,
        workers=3,
        workers_per_gpu=2,
        batch_size=16,
        max_batch_delay_ms=7,
        tuned="t.yaml",
        sign="key.pem",
    )


def test_every_server_option() -> None:
    argv = "--host 0.0.0.0 --port 1 --management-port 2 --metrics-port 65535 --torch cpu "
    argv += "--log-format text --gateway --gateway-port 4 --archive a.mar --archive b.mar "
    argv += "--require-signed public.pem"
    assert parse_serve(argv.split()) == ServeOptions(
        archives=("a.mar", "b.mar"),
        host="0.0.0.0",
        port=1,
        management_port=2,
        metrics_port=65535,
        log_format="text",
        gateway=True,
        gateway_port=4,
        require_signed="public.pem",
        torch="cpu",
    )


def test_models_are_repeatable_and_stay_in_order() -> None:
    argv = "--model resnet50 --model alexnet --model resnet50 --weights pretrained --tuned"
    given = parse_serve(argv.split())
    assert given.models == ("resnet50", "alexnet")
    assert (given.weights, given.tuned) == ("pretrained", "auto")
    assert parse_serve("--model a --model a --labels x".split()).models == ("a",)


def test_given_archives_take_the_place_of_the_default_model() -> None:
    given = parse_serve("--archive a.mar --model resnet50 --weights w.pth".split())
    assert (given.models, given.archives) == (("resnet50",), ("a.mar",))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model a --model b --weights x", "--recipe and --labels go with one --model"),
        ("--model a --model b --recipe x", "--recipe and --labels go with one --model"),
        ("--model a --model b --labels x", "--recipe and --labels go with one --model"),
        ("--model a --model b --tuned x", "a file after --tuned goes with one --model"),
        ("--device=cpu --device-ids=0", "are for GPUs, and --device is cpu"),
        ("--device=cpu --workers-per-gpu=2", "are for GPUs, and --device is cpu"),
        ("--weights-prefix model", "are for a file given as --weights"),
        ("--weights pretrained --weights-prefix=", "are for a file given as --weights"),
        ("--model googlenet --transform-input on", "are for a file given as --weights"),
        ("--weights w.pth --transform-input on", "is for googlenet and inception_v3"),
        ("--archive a.mar --weights w.pth", "--weights is for making an archive"),
        ("--weights https://h/w.pth", "https://h/w.pth needs --weights-sha256 HEX"),
        ("--weights w.pth --weights-sha256 " + 64 * "0", "is for --weights of a URL or of mlflow:"),
        ("--gateway-port 1", "--gateway-port goes with --gateway"),
        ("--device gpu", "invalid choice: 'gpu'"),
        ("--mod resnet50", "unrecognized arguments: --mod"),
    ],
)
def test_what_does_not_go_together(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(argv.split(), capsys)


@pytest.mark.parametrize("option", ["--port", "--host", "--torch"])
def test_packaging_knows_no_server(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments" in mistake([option, "1"], capsys, parse_package)


@pytest.mark.parametrize(
    ("option", "low", "high"),
    [
        ("--port", 1, 65535),
        ("--batch-size", 1, 1024),
        ("--max-batch-delay-ms", 0, 10_000),
        ("--workers", 1, 1024),
    ],
)
def test_edges_of_a_range(
    option: str, low: int, high: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (low, high):
        given = parse_serve([option, str(value)])
        assert getattr(given, option.strip("-").replace("-", "_")) == value
    for value in (low - 1, high + 1):
        message = mistake([option, str(value)], capsys)
        assert message.endswith(f"argument {option}: must be {low} to {high}, got '{value}'")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "box.example.org"])
def test_host(host: str) -> None:
    assert parse_serve(["--host", host]).host == host


@pytest.mark.parametrize(
    ("option", "texts", "message"),
    [
        ("--workers", ["", "x", "1.0", "+1", " 1", "1_0", "٣", "²", "0x1", "1e2"], "1 to 1024"),
        ("--device-ids", ["", "x", "0,", "0 1", "-1", "0,0", "GPU-1", "٣"], "numbers like 0,1"),
        ("--minimum-agreement", ["", "x", "nan", "-0.1", "1.1"], "must be 0 to 1"),
        ("--host", ["", "::1", "http://x", "x:8080", "x/y"], "a host name or an IPv4 address"),
        ("--version", ["", "1/0", "..", "a b", "é", "a" * 33], "must be at most 32 letters"),
        ("--log-to", ["", "birds", "mlflow:", "mlflow:a/1", "mlflow:a b"], "must be mlflow:NAME"),
        ("--weights-sha256", ["", "0", "A" * 64, "0" * 65], "must be 64 digits of 0-9 and a-f"),
    ],
)
def test_values_of_another_form(
    option: str, texts: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse: Parse = parse_package if option in ("--version", "--log-to") else parse_serve
    for text in texts:
        said = mistake([f"{option}={text}"], capsys, parse)
        assert message in said
        assert said.endswith(f", got {text!r}")


@pytest.mark.parametrize("parse", [parse_serve, parse_package], ids=["serve", "package"])
def test_help_shows_every_option_with_its_default(
    parse: Parse, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out.partition("show this help")[2]
    entries = [f"--{entry}" for entry in re.split(r"\n  --", text)[1:]]
    without = [entry.split()[0] for entry in entries if "(default: " not in entry]
    # packaging has options of its own; for serving they are always the default
    assert len(entries) == len(vars(parse([]))) - len(options.NOT_SERVED) * (parse is parse_serve)
    assert without == []


def test_help_needs_no_set_up() -> None:
    """Before .venv exists there is the standard library only."""
    root = Path(options.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); "
        "from service.options import parse_serve; parse_serve(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--management-port" in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--model resnet18 --model alexnet --workers 3 --device cpu --precision bf16",
        "--model resnet18 --tuned",
        "--device-ids 1,0 --workers-per-gpu 3",
        "--weights w.pth --weights-prefix model_ema --model googlenet --transform-input off",
        "--weights w.pth --weights-prefix=",
        "--weights=-odd.pth --labels l.txt --recipe R --batch-size 3 --max-batch-delay-ms 7",
    ],
)
def test_options_are_said_again_as_arguments(argv: str) -> None:
    options = parse_serve(argv.split())
    assert parse_serve(to_argv(options)) == options

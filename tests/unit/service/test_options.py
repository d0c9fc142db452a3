"""Command-line options: defaults, ranges, combinations, and one line for each mistake."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import options
from service.options import parse_package, parse_serve, to_argv

Parse = Callable[[list[str]], Any]
BOTH = pytest.mark.parametrize("parse", [parse_serve, parse_package], ids=["serve", "package"])
MODEL_DEFAULTS = {
    "models": ("mobilenet_v2",),
    "weights": None,
    "weights_prefix": None,
    "transform_input": None,
    "recipe": None,
    "labels": None,
    "device": "auto",
    "device_ids": None,
    "precision": "auto",
    "calibration": None,
    "minimum_agreement": 0.97,
    "workers": None,
    "workers_per_gpu": None,
    "batch_size": None,
    "max_batch_delay_ms": None,
    "tuned": None,
    "version": "1.0",
}
SERVER_DEFAULTS: dict[str, Any] = {
    "host": None,
    "port": None,
    "management_port": None,
    "metrics_port": None,
    "log_format": None,
    "gateway": False,
    "gateway_port": None,
    "archives": (),
    "torch": "auto",
}


def mistake(parse: Parse, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed below the usage; the exit status is 2."""
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_defaults_of_serve() -> None:
    assert vars(parse_serve([])) == MODEL_DEFAULTS | SERVER_DEFAULTS


def test_defaults_of_package() -> None:
    assert vars(parse_package([])) == MODEL_DEFAULTS


@BOTH
def test_every_model_option(parse: Parse) -> None:
    argv = "--model resnet18 --weights w.pth --recipe R --labels l.txt --device cuda".split()
    argv += "--precision bf16 --workers 3 --batch-size 16 --max-batch-delay-ms 7".split()
    argv += ["--tuned", "t.yaml", "--device-ids", "0,2", "--workers-per-gpu", "2"]
    argv += "--calibration photos --minimum-agreement 0.9 --weights-prefix ema".split()
    given = vars(parse(argv))
    assert {name: given[name] for name in MODEL_DEFAULTS} == {
        "models": ("resnet18",),
        "weights": "w.pth",
        "weights_prefix": "ema",
        "transform_input": None,
        "recipe": "R",
        "labels": "l.txt",
        "device": "cuda",
        "device_ids": (0, 2),
        "precision": "bf16",
        "workers": 3,
        "workers_per_gpu": 2,
        "batch_size": 16,
        "max_batch_delay_ms": 7,
        "calibration": "photos",
        "minimum_agreement": 0.9,
        "tuned": "t.yaml",
        "version": "1.0",
    }


def test_every_server_option() -> None:
    argv = "--host 0.0.0.0 --port 1 --management-port 2 --metrics-port 65535 --torch cpu".split()
    argv += ["--log-format", "text"]
    argv += "--gateway --gateway-port 4 --archive a.mar --archive b.mar".split()
    given = vars(parse_serve(argv))
    assert {name: given[name] for name in SERVER_DEFAULTS} == {
        "host": "0.0.0.0",
        "port": 1,
        "management_port": 2,
        "metrics_port": 65535,
        "log_format": "text",
        "gateway": True,
        "gateway_port": 4,
        "archives": ("a.mar", "b.mar"),
        "torch": "cpu",
    }


@BOTH
def test_models_are_repeatable_and_stay_in_order(parse: Parse) -> None:
    argv = ["--model", "resnet50", "--model", "alexnet", "--model", "resnet50"]
    assert parse(argv).models == ("resnet50", "alexnet")


@BOTH
@pytest.mark.parametrize("weights", ["pretrained", "untrained"])
def test_what_several_models_can_share(parse: Parse, weights: str) -> None:
    args = parse(["--model", "a", "--model", "b", "--weights", weights, "--batch-size", "2"])
    assert (args.models, args.weights) == (("a", "b"), weights)


@BOTH
@pytest.mark.parametrize("option", ["--weights", "--recipe", "--labels"])
def test_what_goes_with_one_model(
    parse: Parse, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = mistake(parse, ["--model", "a", "--model", "b", option, "x"], capsys)
    assert "a weights file, --recipe and --labels go with one --model" in message


@BOTH
def test_a_tuned_file_goes_with_one_model(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--model", "a", "--model", "b", "--tuned"]
    assert parse(both).tuned == "auto"  # each model's own file
    assert "a file after --tuned goes with one --model" in mistake(parse, [*both, "x"], capsys)


@BOTH
@pytest.mark.parametrize("ids", ["", "x", "0,", "0 1", "-1", "0,0", "GPU-1", "٣"])
def test_what_are_no_device_ids(parse: Parse, ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(parse, [f"--device-ids={ids}"], capsys)
    assert message.endswith(f"must be numbers like 0,1, each once, got {ids!r}")


@BOTH
@pytest.mark.parametrize("option", ["--device-ids=0", "--workers-per-gpu=2"])
def test_what_is_for_gpus(parse: Parse, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "are for GPUs, and --device is cpu" in mistake(parse, ["--device=cpu", option], capsys)


@BOTH
def test_the_same_model_twice_is_one(parse: Parse) -> None:
    assert parse(["--model", "a", "--model", "a", "--labels", "x"]).models == ("a",)


PORTS = [("--port", 1, 65535), ("--management-port", 1, 65535), ("--metrics-port", 1, 65535)]
NUMBERS = [("--batch-size", 1, 1024), ("--max-batch-delay-ms", 1, 10_000), ("--workers", 1, 1024)]


@pytest.mark.parametrize(("option", "low", "high"), PORTS + NUMBERS)
def test_edges_of_a_range(option: str, low: int, high: int) -> None:
    name = option.strip("-").replace("-", "_")
    assert getattr(parse_serve([option, str(low)]), name) == low
    assert getattr(parse_serve([option, str(high)]), name) == high


@pytest.mark.parametrize(("option", "low", "high"), PORTS + NUMBERS)
def test_beyond_a_range(
    option: str, low: int, high: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (low - 1, high + 1):
        message = mistake(parse_serve, [option, str(value)], capsys)
        assert message.endswith(f"argument {option}: must be {low} to {high}, got '{value}'")


@pytest.mark.parametrize("text", ["", "x", "1.0", "-1", "+1", " 1", "1_0", "٣", "²", "0x1", "1e2"])
@pytest.mark.parametrize("option", ["--port", "--workers", "--batch-size"])
def test_what_is_no_whole_number(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repr(text) in mistake(parse_serve, [f"{option}={text}"], capsys)


def test_workers_may_be_left_to_us() -> None:
    assert parse_serve(["--workers", "auto"]).workers is None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "box.example.org"])
def test_host(host: str) -> None:
    assert parse_serve(["--host", host]).host == host


@pytest.mark.parametrize("host", ["", "::1", "[::1]", "http://x", "x:8080", "x/y"])
def test_what_is_no_host(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(parse_serve, [f"--host={host}"], capsys)
    assert "must be a host name or an IPv4 address" in message
    assert repr(host) in message


@BOTH
@pytest.mark.parametrize(
    "argv",
    [
        ["--device", "gpu"],
        ["--precision", "fp8"],
        ["--mod", "resnet50"],
        ["--unknown"],
        ["resnet50"],
        ["--model"],
    ],
    ids=" ".join,
)
def test_other_mistakes(parse: Parse, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: " in mistake(parse, argv, capsys)


@pytest.mark.parametrize("option", ["--port", "--host", "--torch"])
def test_packaging_knows_no_server(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments" in mistake(parse_package, [option, "1"], capsys)


@BOTH
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
    # packaging has --version; for serving it is always the default
    assert len(entries) == len(vars(parse([]))) - (parse is parse_serve)
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
        "--model resnet18 --tuned=t.yaml",
        "--weights w.pth --weights-prefix model_ema --model googlenet --transform-input off",
        "--weights w.pth --weights-prefix=",
        "--weights=-odd.pth --labels l.txt --recipe R --batch-size 3 --max-batch-delay-ms 7",
    ],
)
def test_options_are_said_again_as_arguments(argv: str) -> None:
    options = parse_serve(argv.split())
    assert parse_serve(to_argv(options)) == options


def test_given_archives_take_the_place_of_the_default_model() -> None:
    assert parse_serve(["--archive", "a.mar", "--archive", "b"]).models == ()
    given = parse_serve(["--archive", "a.mar", "--model", "resnet50", "--weights", "w.pth"])
    assert (given.models, given.archives) == (("resnet50",), ("a.mar",))


def test_a_given_archive_is_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_serve(["--archive", "a.mar", "--weights", "w.pth"])
    assert "--weights is for making an archive" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["2.0", "2024-05-01_b", "a" * 32])
def test_version_of_an_archive(version: str) -> None:
    assert parse_package(["--version", version]).version == version


@pytest.mark.parametrize("version", ["", "1/0", "..", "a b", "é", "a" * 33])
def test_a_version_that_is_no_name(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert repr(version) in mistake(parse_package, ["--version", version], capsys)


def test_the_gateways_port_goes_with_the_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--gateway" in mistake(parse_serve, ["--gateway-port", "1"], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--weights-prefix model", "are for a file given as --weights"),
        ("--weights pretrained --weights-prefix=", "are for a file given as --weights"),
        ("--model googlenet --transform-input on", "are for a file given as --weights"),
        ("--weights w.pth --transform-input on", "is for googlenet and inception_v3"),
    ],
)
def test_choices_among_weights_go_with_a_file(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(parse_package, argv.split(), capsys)

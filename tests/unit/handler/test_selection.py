"""Settings, hardware and archive to device, engine and precision."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from handler.errors import InvalidModel, InvalidSettings
from handler.selection import Hardware, Selection, select
from handler.settings import Settings

ROOT = Path(__file__).resolve().parents[3]

PLAIN = Hardware()
WITH_BF16 = Hardware(cpu_bf16=True)
TURING = Hardware(gpu=0, capability=(7, 5))
HOPPER = Hardware(gpu=3, capability=(9, 0), cpu_bf16=True)


def choose(
    hardware: Hardware, *, converted: bool = True, int8: bool = False, **settings: Any
) -> Selection:
    return select(Settings(**settings), hardware, converted=converted, int8=int8)


@pytest.mark.parametrize(
    ("hardware", "archive", "chosen"),
    [
        (PLAIN, {}, ("cpu", "openvino", ("fp32",))),
        (WITH_BF16, {}, ("cpu", "openvino", ("bf16", "fp32"))),
        (WITH_BF16, {"int8": True}, ("cpu", "openvino", ("int8", "bf16", "fp32"))),
        (WITH_BF16, {"converted": False}, ("cpu", "torch", ("fp32",))),
        (TURING, {}, ("cuda:0", "cuda", ("fp16", "fp32"))),
        (HOPPER, {"int8": True}, ("cuda:3", "cuda", ("fp16", "bf16", "fp32"))),
    ],
)
def test_auto_takes_the_fastest_first(
    hardware: Hardware, archive: dict[str, bool], chosen: tuple[str, str, tuple[str, ...]]
) -> None:
    assert choose(hardware, **archive) == Selection(*chosen)


@pytest.mark.parametrize(
    ("hardware", "settings", "chosen"),
    [
        (HOPPER, {"device": "cpu"}, ("cpu", "openvino", ("bf16", "fp32"))),
        (HOPPER, {"device": "cuda"}, ("cuda:3", "cuda", ("fp16", "bf16", "fp32"))),
        (HOPPER, {"engine": "torch"}, ("cuda:3", "torch", ("fp32",))),
        (HOPPER, {"precision": "fp16"}, ("cuda:3", "cuda", ("fp16",))),
        (TURING, {"precision": "fp32"}, ("cuda:0", "cuda", ("fp32",))),
        (TURING, {"engine": "torch", "precision": "bf16"}, ("cuda:0", "torch", ("bf16",))),
        (WITH_BF16, {"precision": "fp32"}, ("cpu", "openvino", ("fp32",))),
        (WITH_BF16, {"engine": "torch"}, ("cpu", "torch", ("fp32",))),
        (PLAIN, {"engine": "torch", "precision": "bf16"}, ("cpu", "torch", ("bf16",))),
    ],
)
def test_settings_go_before_auto(
    hardware: Hardware, settings: dict[str, Any], chosen: tuple[str, str, tuple[str, ...]]
) -> None:
    assert choose(hardware, **settings) == Selection(*chosen)


def test_a_precision_of_the_settings_goes_before_an_int8_model() -> None:
    assert choose(PLAIN, int8=True, precision="int8").precision == "int8"
    assert choose(PLAIN, int8=True, precision="fp32").precision == "fp32"


@pytest.mark.parametrize(
    ("hardware", "settings", "message"),
    [
        (PLAIN, {"device": "cuda"}, "device is cuda, and torch sees no GPU here"),
        (PLAIN, {"engine": "cuda"}, "engine is cuda, which runs on a GPU, and device is cpu"),
        (HOPPER, {"engine": "cuda", "device": "cpu"}, "and device is cpu"),
        (HOPPER, {"engine": "openvino"}, "which runs on a CPU, and device is cuda:3"),
        (PLAIN, {"precision": "fp16"}, "precision is fp16, which only GPUs compute in"),
        (PLAIN, {"precision": "fp16", "engine": "torch"}, "which only GPUs compute in"),
        (HOPPER, {"precision": "int8"}, "which only the engine openvino has, on a CPU"),
        (PLAIN, {"precision": "int8", "engine": "torch"}, "which only the engine openvino has"),
        (PLAIN, {"precision": "int8"}, "no int8 model: package it with --calibration DIR"),
        (PLAIN, {"precision": "bf16"}, "this CPU does not compute in bf16"),
        (TURING, {"precision": "bf16"}, "this GPU does not compute in bf16"),
    ],
)
def test_what_does_not_go_together_is_refused(
    hardware: Hardware, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSettings, match=message):
        choose(hardware, **settings)


def test_openvino_needs_a_model_for_it() -> None:
    with pytest.raises(InvalidModel, match="was packaged for torch alone"):
        choose(PLAIN, converted=False, engine="openvino")


def test_the_launcher_can_ask_without_an_inference_library() -> None:
    code = (
        "import sys, handler.selection\n"
        "assert not {'torch', 'openvino', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)

"""Which engine runs a model, on what device and in what precision.

One rule for packaging, serving, tuning and the worker itself. It imports no inference library, so
that the launcher, which must stay small, can ask it too.
"""

from dataclasses import dataclass

from handler.errors import InvalidModel, InvalidSettings
from handler.settings import Settings

AMPERE = (8, 0)  # the first compute capability with bf16


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a worker can compute on. The defaults are what every machine has."""

    gpu: int | None = None  # torch's number of the worker's GPU; None: there is none
    capability: tuple[int, int] = (0, 0)  # compute capability of that GPU
    cpu_bf16: bool = False  # whether the CPU computes in bf16 itself


@dataclass(frozen=True)
class Selection:
    """How a model is run."""

    device: str  # "cpu" or "cuda:0"
    engine: str  # "openvino", "cuda" or "torch"
    # "fp32", "bf16", "fp16" or "int8": several if nobody asked for one, each to be taken only if
    # those before it do not give the network's own answers (handler/golden.py)
    precisions: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The one that is expected to be taken."""
        return self.precisions[0]


def select(settings: Settings, hardware: Hardware, *, converted: bool, int8: bool) -> Selection:
    """The engine, device and precisions that the settings ask for; `auto` takes the fastest.

    `converted` and `int8` say whether the archive holds a model for OpenVINO and one in int8.
    Raises InvalidSettings if the settings ask for what hardware or archive do not have, and
    InvalidModel if they ask for OpenVINO and the archive holds no model for it.
    """
    device = "cpu"
    if settings.device != "cpu" and hardware.gpu is not None:
        device = f"cuda:{hardware.gpu}"
    elif settings.device == "cuda":
        raise InvalidSettings("device is cuda, and torch sees no GPU here")
    engine = settings.engine
    if engine == "auto":
        engine = "cuda" if device != "cpu" else "openvino" if converted else "torch"
    if engine == "cuda" and device == "cpu":
        raise InvalidSettings("engine is cuda, which runs on a GPU, and device is cpu")
    if engine == "openvino" and device != "cpu":
        raise InvalidSettings(f"engine is openvino, which runs on a CPU, and device is {device}")
    if settings.precision == "fp16" and device == "cpu":
        raise InvalidSettings("precision is fp16, which only GPUs compute in")
    if settings.precision == "int8" and engine != "openvino":
        raise InvalidSettings("precision is int8, which only the engine openvino has, on a CPU")
    if engine == "openvino" and not converted:
        raise InvalidModel("the archive was packaged for torch alone: package it for openvino")
    if settings.precision == "int8" and not int8:
        raise InvalidSettings(
            "precision is int8, and the archive has no int8 model: package it with "
            "--calibration DIR"
        )
    if settings.precision == "bf16":
        if engine == "openvino" and not hardware.cpu_bf16:
            raise InvalidSettings("precision is bf16, and this CPU does not compute in bf16")
        if engine == "cuda" and hardware.capability < AMPERE:
            raise InvalidSettings("precision is bf16, and this GPU does not compute in bf16")
    if settings.precision == "auto":
        return Selection(device, engine, _fastest_first(engine, hardware, int8))
    return Selection(device, engine, (settings.precision,))


def _fastest_first(engine: str, hardware: Hardware, int8: bool) -> tuple[str, ...]:
    if engine == "torch":
        return ("fp32",)  # the reference
    if engine == "cuda":  # fp16 is as fast as bf16 and has finer steps, but a smaller range
        return ("fp16", "bf16", "fp32") if hardware.capability >= AMPERE else ("fp16", "fp32")
    floats = ("bf16", "fp32") if hardware.cpu_bf16 else ("fp32",)
    return ("int8", *floats) if int8 else floats

"""The GPUs that TorchServe hands out: as many as torch can use, and no others."""

from collections.abc import Mapping

from handler.errors import InvalidSettings
from handler.gpus import VISIBLE, WORKERS_VISIBLE


def check_gpus(device: str, gpus: int, environ: Mapping[str, str]) -> str | None:
    """What to tell the operator about the GPUs; `gpus` is how many CUDA finds.

    Raises InvalidSettings if `device` is cuda and a GPU that is named is not there.
    """
    visible = environ.get(VISIBLE)
    names = [name.strip() for name in visible.split(",")] if visible else []
    if "-1" in names:  # ends the list
        names = names[: names.index("-1")]
    message = None
    if len(names) > gpus:
        message = f"{VISIBLE}={visible} names {len(names)} GPUs, and CUDA finds {gpus} of them here"
    elif gpus == 0 and visible is not None:
        message = f"{VISIBLE}={visible} hides every GPU"
    if device == "cuda" and message:
        raise InvalidSettings(f"--device cuda, but {message}")
    return f"warning: {message}" if message and names and device == "auto" else None


def gpu_environment(device: str, gpus: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables with which TorchServe counts the GPUs that torch can use, and no others.

    Java counts the whole numbers in CUDA_VISIBLE_DEVICES and does nothing else with it. It stops
    counting at a UUID, and without a value it asks nvidia-smi for all GPUs. So it gets as many
    numbers as there are GPUs, and handler/gpus.py gives the workers what the user had set.
    """
    if device == "cpu" or gpus == 0:
        return {VISIBLE: "-1", "TS_NUMBER_OF_GPU": "0"}  # to Java, -1 is a GPU like another
    variables = {VISIBLE: ",".join(map(str, range(gpus)))}
    if VISIBLE in environ:
        variables[WORKERS_VISIBLE] = environ[VISIBLE]
    return variables

"""The engine that settings, machine and archive ask for, with the archive's weights."""

from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from handler.engine import Engine, Sameness
from handler.errors import InvalidModel
from handler.golden import Golden, limit_of
from handler.machine import available_cores
from handler.model_card import INT8_FILE, OPENVINO_FILE, WEIGHTS_FILE, ModelCard
from handler.openvino_engine import OpenVino, has_bf16
from handler.selection import Hardware, Selection, select
from handler.settings import Settings
from handler.torch_engine import TorchEager

# Images in one forward pass if the settings do not say. On a CPU a few images run some percent
# faster together than one by one, and more leave its caches again. On a GPU an image costs the less
# the more there are. Smaller passes would overlap with the decoding of the same batch, but the
# other workers fill that gap.
MAX_FORWARD = {"cpu": 2, "cuda": 64}
LARGE_MODEL = 64 * 2**20  # bytes: a second compiled copy takes as much again, and gains nothing


def find_hardware(gpu_id: int | None = None) -> Hardware:
    """What this machine computes on; `gpu_id` is the GPU that TorchServe gave the worker."""
    if not torch.cuda.is_available():
        return Hardware(cpu_bf16=has_bf16())
    gpu = gpu_id or 0
    return Hardware(gpu=gpu, capability=torch.cuda.get_device_capability(gpu), cpu_bf16=has_bf16())


def share_of_cores(settings: Settings, workers: int) -> int:
    """CPU threads of each of `workers` processes, to decode and, on a CPU, to run the model."""
    return settings.threads or max(1, available_cores() // max(1, workers))


def load_engine(
    card: ModelCard, model_dir: Path, settings: Settings, gpu_id: int | None, workers: int
) -> Engine:
    """The engine that the settings ask for, with the archive's weights.

    `auto` takes the first precision in which it gives the reference's answers to the golden images.
    `gpu_id` is the GPU that TorchServe gave this worker, and `workers` the number of processes that
    share the cores. Raises InvalidSettings; InvalidModel, with the stage at fault if the engine
    gives other answers in fp32; RuntimeError if the archive's tensors do not fit its architecture
    (packaging checked that).
    """
    converted = (model_dir / OPENVINO_FILE).exists()
    chosen = select(
        settings, find_hardware(gpu_id), converted=converted, int8=card.int8 is not None
    )
    threads = share_of_cores(settings, workers)
    # On a GPU torch only copies images here. With one thread for that and not its share, 4 workers
    # on an H100 were a tenth faster, and took 2.2 cores less.
    torch.set_num_threads(threads if chosen.device == "cpu" else 1)
    golden = Golden.read(model_dir)
    if golden:
        golden.check_labels(card.labels)
    refused: dict[str, Sameness] = {}
    for precision in chosen.precisions:
        engine = _load(card, model_dir, chosen, precision, settings.max_forward, threads)
        engine.refused = refused
        if golden is None:
            return engine
        engine.sameness = found = golden.compare(engine)
        last = precision == chosen.precisions[-1]
        asked = last and precision != "fp32"  # by name: it is kept if it gives numbers at all
        if found.fits(limit_of(precision)) or (asked and isfinite(found.error)):
            return engine
        refused = refused | {engine.name: found}
        if asked:
            fault = f"precision: {engine.name} gives no numbers for the golden images"
        elif last:
            from handler.diagnosis import engine_fault

            fault = engine_fault(golden, card, engine, lambda: _load_network(card, model_dir))
            fault = f"{fault} ({engine.name}: {found.describe()})"
        del engine  # its memory is the next one's
    raise InvalidModel(fault)


def _load(
    card: ModelCard,
    model_dir: Path,
    chosen: Selection,
    precision: str,
    max_forward: int,
    threads: int,
) -> Engine:
    """The engine that was chosen, in one of its precisions."""
    if chosen.engine == "openvino":
        model_file = model_dir / (INT8_FILE if precision == "int8" else OPENVINO_FILE)
        large = model_file.with_suffix(".bin").stat().st_size > LARGE_MODEL
        max_forward = max_forward or (1 if large else MAX_FORWARD["cpu"])
        return OpenVino(model_file, precision, threads, max_forward)
    max_forward = max_forward or MAX_FORWARD[chosen.device.partition(":")[0]]
    network = _load_network(card, model_dir)
    if chosen.engine == "cuda":
        from handler.cuda import Cuda  # what it imports only GPUs need

        return Cuda(network, card.transform, precision, chosen.device, max_forward)
    return TorchEager(network, card.transform, precision, chosen.device, max_forward)


def _load_network(card: ModelCard, model_dir: Path) -> nn.Module:
    # torchvision takes 1.5 s and 170 MB to import, and OpenVINO does not need it.
    from handler.networks import empty_network, get_recipe, load_state

    # Built without memory and given the file's tensors, so no random weights are drawn first.
    recipe = get_recipe(card.architecture, card.recipe)
    network = empty_network(recipe, card.architecture, len(card.labels))
    load_state(network, load_file(model_dir / WEIGHTS_FILE))
    return network

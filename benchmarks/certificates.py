"""Which architectures and precisions of this machine the certificate accepts, and how near it is.

    python -m benchmarks.certificates [ARCHITECTURE ...]

Each architecture has seeded random weights, and is loaded as a worker loads it, in each precision
that the machine has. Some networks with random weights amplify every rounding until it decides the
answer; that is measured in fp64, and makes a refusal right. Exit status 1 for any other refusal.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from openvino import save_model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from handler.certificate import certify
from handler.decoders import choose_decoder
from handler.diagnosis import plain_image
from handler.engines import find_hardware, load_engine
from handler.errors import SetupError
from handler.golden import limit_of
from handler.model_card import OPENVINO_FILE, WEIGHTS_FILE, ModelCard
from handler.networks import build_network, get_recipe, input_transform
from handler.settings import Settings
from handler.torch_engine import DTYPES
from service.archive.conversion import to_openvino
from service.archive.digest import untrained_facts
from service.archive.golden import make_golden, reference_logits
from service.load.report import machine

ARCHITECTURES = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3
    maxvit_t mnasnet1_0 mobilenet_v2 mobilenet_v3_large regnet_y_400mf resnet18 resnet50
    resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1 swin_t vgg11_bn vit_b_16
""".split()
SPREAD = 10  # by which the errors of two computations, rounded in other places, may differ
RIGHTLY, WRONGLY = "rightly", "wrongly"


def main(argv: Sequence[str] | None = None) -> int:
    architectures = (sys.argv[1:] if argv is None else argv) or ARCHITECTURES
    rows = []
    for architecture in architectures:
        for row in certificates(architecture):
            rows.append(row)
            print(
                f"{row['architecture']:20} {row['engine']:14} error {row['logits_error']:.5f} "
                f"(by rounding {row['rounding']:.5f}) "
                f"agreement {row['class_agreement']:4.0%} decode {row['decode_difference']:.4f} "
                f"{1000 * row['seconds']:5.0f} ms  "
                + (f"refused, {row['verdict']}: {row['refused']}" if row["refused"] else "fits"),
                flush=True,
            )
    print(json.dumps({"rows": rows, "machine": machine()}))
    return int(any(row["verdict"] == WRONGLY for row in rows))


def certificates(architecture: str) -> Iterator[dict[str, Any]]:
    """What a worker says of an architecture, in each precision."""
    recipe = get_recipe(architecture)
    transform, labels = input_transform(recipe), tuple(recipe.meta["categories"])
    torch.manual_seed(0)
    network = settle(build_network(recipe, architecture, len(labels)), transform.crop_size)
    card = ModelCard(
        architecture=architecture,
        recipe=str(recipe),
        transform=transform,
        labels=labels,
        parameters={},
        weights=untrained_facts(architecture),
        int8=None,
        inputs_sha256="",
        code_sha256=("", ""),
        packaged_with={},
        files={},
    )
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder)
        preset = recipe.transforms()
        golden = make_golden(network, preset, labels)
        golden.write(model_dir)
        save_model(
            to_openvino(network, transform), model_dir / OPENVINO_FILE, compress_to_fp16=False
        )
        save_file(network.state_dict(), model_dir / WEIGHTS_FILE)
        images = [plain_image(data) for data in golden.files.values()]
        exact = reference_logits(network.double(), lambda image: preset(image).double(), images)
        fp32_error = golden.judge(exact.softmax(dim=1)).error
        for settings in every_precision():
            row = certificate(card, model_dir, settings)
            step = torch.finfo(DTYPES[settings.precision]).eps / torch.finfo(torch.float32).eps
            row |= {"architecture": architecture, "rounding": fp32_error * step}
            expected = SPREAD * row["rounding"] > limit_of(settings.precision)
            yield row | {"verdict": (RIGHTLY if expected else WRONGLY) if row["refused"] else None}


@torch.no_grad()
def settle(network: nn.Module, size: int) -> nn.Module:
    """Batch norms with the statistics of some images; else random weights see no image in some."""
    images = torch.rand(4, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 4 - 2
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # the average of what was seen, which is once
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)  # ViT's last layer begins with zeros
    network(functional.interpolate(images, size=size, mode="bilinear"))
    return network.eval()


def every_precision() -> Iterator[Settings]:
    """Each engine and precision that this machine has; int8 would need photos."""
    hardware = find_hardware()
    yield Settings(device="cpu", engine="torch", precision="fp32")
    yield Settings(device="cpu", engine="openvino", precision="fp32")
    if hardware.cpu_bf16:
        yield Settings(device="cpu", engine="openvino", precision="bf16")
    if hardware.gpu is not None:
        for precision in ("fp32", "fp16", "bf16"):
            yield Settings(device="cuda", engine="cuda", precision=precision)


def certificate(card: ModelCard, model_dir: Path, settings: Settings) -> dict[str, Any]:
    """The certificate of one, and why it is refused, if it is."""
    try:
        engine = load_engine(card, model_dir, settings, gpu_id=0, workers=1)
        decoder, _ = choose_decoder(card.transform, settings, engine.device, threads=1)
        found, _, _ = certify(card, model_dir, settings, engine, decoder, threads=1)
    except SetupError as exc:
        return {
            "engine": f"{settings.engine}-{settings.precision}",
            "logits_error": float("nan"),
            "class_agreement": 0,
            "decode_difference": float("nan"),
            "seconds": 0,
            "refused": str(exc),
        }
    fits = engine.sameness and engine.sameness.fits(limit_of(engine.precision))
    refused = None if fits else "auto would take another precision"
    return (asdict(found) if found else {}) | {"refused": refused}


if __name__ == "__main__":
    sys.exit(main())

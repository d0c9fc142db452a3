"""Ways to decode and to compute, side by side on one core; the handler uses the best of them.

    python -m benchmarks.candidates decoders --images DIR --weights FILE --recipe ENTRY
    python -m benchmarks.candidates engines  --images DIR --weights FILE --recipe ENTRY

Prints a Markdown table, and the conditions as one JSON line last. Candidates take turns, so that a
machine that changes its speed changes it for all; a figure is the median of its turns.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino
import simplejpeg
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F  # noqa: N812
from torchvision.transforms.functional import InterpolationMode

from benchmarks.environments import prepare
from benchmarks.images import load_rgb
from handler.engines import OpenVino, PixelsToProbabilities, TorchEager, has_bf16
from handler.images import decode_image, to_input
from handler.model_card import InputTransform
from handler.networks import build_network, get_recipe, input_transform
from handler.settings import Settings
from service.archive.conversion import to_openvino
from service.load.report import machine
from service.tables import Row, markdown_table

Decode = Callable[[bytes], Tensor]  # JPEG bytes -> uint8 [3, H, W]
Compute = Callable[[Tensor], Any]  # uint8 [B, 3, H, W] -> probabilities [B, C]

LARGE = (4000, 3000)  # pixels of a phone's photograph


def time_in_turn(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each task, all of them once a round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for counted in (False, *[True] * rounds):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if counted:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def decoders(transform: InputTransform) -> dict[str, Decode]:
    mode = InterpolationMode(transform.interpolation)

    def pillow(data: bytes, draft: bool = False) -> Tensor:
        """As the recipe's own transforms do it; `draft` lets libjpeg scale by 2, 4 or 8."""
        image = Image.open(BytesIO(data))
        if draft:
            image.draft("RGB", (transform.resize_size, transform.resize_size))
        image = F.resize(image.convert("RGB"), [transform.resize_size], mode, antialias=True)
        return F.pil_to_tensor(F.center_crop(image, [transform.crop_size]))

    def pillow_torch(data: bytes) -> Tensor:
        return to_input(np.array(Image.open(BytesIO(data)).convert("RGB")), transform)

    def torchvision_io(data: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return to_input(pixels.permute(1, 2, 0).numpy(), transform)

    def scaled(data: bytes) -> Tensor:
        side = transform.resize_size
        exact = {"fastdct": False, "fastupsample": False}
        pixels = simplejpeg.decode_jpeg(data, min_height=side, min_width=side, **exact)
        return to_input(pixels, transform)

    def handler(data: bytes) -> Tensor:
        return to_input(decode_image(data, Settings()), transform)

    return {
        "Pillow: the recipe's own transforms": pillow,
        "Pillow, scaled decoding": lambda data: pillow(data, draft=True),
        "Pillow, torch's uint8 resize": pillow_torch,
        "torchvision.io, torch's uint8 resize": torchvision_io,
        "simplejpeg, scaled decoding, torch's uint8 resize": scaled,
        "**simplejpeg, torch's uint8 resize: the handler, its checks included**": handler,
    }


def compare_decoders(
    jpegs: list[bytes], network: nn.Module, transform: InputTransform, rounds: int
) -> Iterator[Row]:
    candidates = decoders(transform)
    large = [enlarged(data) for data in jpegs[:4]]
    first = next(iter(candidates.values()))
    engine = TorchEager(network, transform, "fp32", "cpu")
    yield (
        "decoder",
        "ms an image",
        f"ms at {LARGE[0]}x{LARGE[1]}",
        "mean difference of pixels",
        "the same, scaled images",
        "largest difference of a probability",
    )

    def all_of(images: list[bytes], decode: Decode) -> Callable[[], Any]:
        return lambda: [decode(data) for data in images]

    times = time_in_turn({name: all_of(jpegs, d) for name, d in candidates.items()}, rounds)
    slow = time_in_turn({name: all_of(large, d) for name, d in candidates.items()}, 3)
    for name, decode in candidates.items():
        differences, of_large, worst = [], [], 0.0
        for data in jpegs:
            expected, actual = first(data), decode(data)
            differences.append((expected.float() - actual.float()).abs().mean().item())
            pair = engine.probabilities(torch.stack([expected, actual]))
            worst = max(worst, (pair[0] - pair[1]).abs().max().item())
        for data in large:
            of_large.append((first(data).float() - decode(data).float()).abs().mean().item())
            pair = engine.probabilities(torch.stack([first(data), decode(data)]))
            worst = max(worst, (pair[0] - pair[1]).abs().max().item())
        yield (
            name,
            1000 * times[name] / len(jpegs),
            1000 * slow[name] / len(large),
            f"{sum(differences) / len(differences):.4f}",
            f"{sum(of_large) / len(of_large):.4f}",
            f"{worst:.4f}",
        )


def enlarged(data: bytes) -> bytes:
    """The same picture in a photograph's size."""
    file = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").resize(LARGE).save(file, "JPEG", quality=90)
    return file.getvalue()


def compare_engines(
    jpegs: list[bytes], network: nn.Module, transform: InputTransform, rounds: int
) -> Iterator[Row]:
    pixels = [to_input(decode_image(data, Settings()), transform) for data in jpegs]
    one, four = pixels[0][None], torch.stack((pixels * 4)[:4])
    with engines(network, transform, pixels) as candidates:
        tasks = {}
        for name, compute in candidates.items():
            tasks[f"{name} 1"] = lambda compute=compute: compute(one)
            tasks[f"{name} 4"] = lambda compute=compute: compute(four)
        times = time_in_turn(tasks, rounds)
        expected = torch.cat(
            [torch.as_tensor(candidates["torch eager, fp32"](p[None])) for p in pixels]
        )
        yield (
            "engine",
            "ms, 1 image",
            "ms an image, of 4",
            "same best class",
            "largest difference",
        )
        for name, compute in candidates.items():
            actual = torch.cat([torch.as_tensor(compute(p[None])) for p in pixels]).float()
            same = (actual.argmax(1) == expected.argmax(1)).float().mean().item()
            yield (
                name,
                1000 * times[f"{name} 1"],
                1000 * times[f"{name} 4"] / 4,
                f"{same:.1%}",
                f"{(actual - expected).abs().max().item():.4f}",
            )


@contextmanager
def engines(
    network: nn.Module, transform: InputTransform, pixels: list[Tensor]
) -> Iterator[dict[str, Compute]]:
    """Every engine with one thread. int8 is calibrated with the first half of the images."""
    import nncf
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    half = pixels[: max(1, len(pixels) // 2)]
    model = PixelsToProbabilities(network, transform, torch.float32).eval().requires_grad_(False)
    found: dict[str, Compute] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["torch eager, fp32"] = model
        last = PixelsToProbabilities(network, transform, torch.float32).eval()
        last = last.to(memory_format=torch.channels_last)
        found["torch eager, fp32, channels last"] = lambda images: last(
            images.contiguous(memory_format=torch.channels_last)
        )
        torch._inductor.config.freezing = True
        found["torch.compile, inductor, fp32, frozen"] = torch.compile(model)
        frozen = torch.jit.freeze(torch.jit.trace(model, pixels[0][None]))  # type: ignore[no-untyped-call]
        found["TorchScript, fp32, frozen"] = torch.jit.optimize_for_inference(frozen)

        fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
        torch.onnx.export(
            model,
            (pixels[0][None],),
            str(fp32),
            dynamo=False,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
        )

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._left = iter(half)

            def get_next(self) -> dict[str, Any] | None:
                image = next(self._left, None)
                return None if image is None else {"images": image[None].numpy()}

        quantize_static(
            fp32,
            int8,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        for label, path in (("fp32", fp32), ("int8", int8)):
            found[f"onnxruntime, {label}"] = run_onnx(
                onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            )

        converted = to_openvino(network, transform)
        openvino.save_model(converted, folder / "fp32.xml", compress_to_fp16=False)
        quantized = nncf.quantize(
            converted, nncf.Dataset([image[None].numpy() for image in half]), subset_size=len(half)
        )
        openvino.save_model(quantized, folder / "int8.xml", compress_to_fp16=False)
        for precision in ("fp32", *(["bf16"] if has_bf16() else []), "int8"):
            path = folder / ("int8.xml" if precision == "int8" else "fp32.xml")
            engine = OpenVino(path, precision, max_forward=4)
            found[f"**OpenVINO, {precision}**"] = engine.probabilities
        yield found


def run_onnx(session: Any) -> Compute:
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates", description=__doc__)
    parser.add_argument("what", choices=["decoders", "engines"])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict (None: random)")
    parser.add_argument("--recipe", metavar="ENTRY")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs (None: drawn)")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    if args.what == "engines" and not find_spec("onnxruntime"):
        words = sys.argv[1:] if argv is None else argv
        python = str(prepare("engines"))
        os.execv(python, [python, "-m", "benchmarks.candidates", *words])
    torch.set_num_threads(1)
    recipe = get_recipe(args.model, args.recipe)
    torch.manual_seed(0)
    network = build_network(recipe, args.model, len(recipe.meta["categories"]))
    if args.weights:
        network.load_state_dict(torch.load(args.weights, weights_only=True))
    jpegs = [picture.body for picture in load_rgb(args.images)]
    transform = input_transform(recipe)
    if args.what == "decoders":
        rows = compare_decoders(jpegs, network, transform, args.rounds)
    else:
        rows = compare_engines(jpegs, network, transform, args.rounds)
    headings, *cells = rows
    print("\n".join(markdown_table(headings, cells, digits=2)))
    print(json.dumps({"model": args.model, "images": len(jpegs), **machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

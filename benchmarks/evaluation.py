"""Whether ./scripts/evaluate gives the figures of plain torchvision, on your own labelled images.

    python -m benchmarks.evaluation IMAGES --weights FILE.pth --recipe ENTRY [--target FILE.mar]

Plain torchvision opens each image with Pillow, transforms it as the recipe says and runs the
weights of the file in fp32, one image after the other; nothing of it is this project's code. The
target is measured in fp32 with `decode: exact`; a URL as its server is configured. Prints a table;
the last line is one JSON object. The exit status is 1 if top-1 or top-5 differ.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image

from benchmarks.conditions import LIBRARIES
from benchmarks.subjects import ROOT
from handler.errors import SetupError
from service.archive.progress import stage
from service.evaluation.evaluation import evaluate
from service.evaluation.run import Run
from service.evaluation.targets import BEST, Asking
from service.load.report import machine
from service.tables import text_table

ARCHIVE = ROOT / "model_store" / "mobilenet_v2.mar"
EXACT = {"CLASSIFIER_PRECISION": "fp32", "CLASSIFIER_DECODE": "exact"}


def classify_plainly(
    paths: Sequence[Path], weights: Path, recipe: str
) -> dict[Path, tuple[list[int], float]]:
    """The best classes of each image, best first, and the probability of the first."""
    entry = torchvision.models.get_weight(recipe)
    builder = type(entry).__name__.removesuffix("_Weights").lower()
    state = torch.load(weights, weights_only=True)
    network = torchvision.models.get_model(builder, num_classes=len(entry.meta["categories"]))
    network.load_state_dict(state)
    network.eval()
    transform = entry.transforms()
    answers = {}
    with torch.inference_mode(), stage("torchvision", len(paths), "image") as done:
        for path in paths:
            with Image.open(path) as image:
                logits = network(transform(image.convert("RGB"))[None])
            best = logits.softmax(dim=1).topk(BEST)
            answers[path] = best.indices[0].tolist(), best.values[0, 0].item()
            done()
    return answers


def compare(run: Run, plain: Mapping[Path, tuple[list[int], float]]) -> dict[str, Any]:
    """Right answers of both, and how many images they answer otherwise."""
    outcomes = run.outcomes
    return {
        "images": len(outcomes),
        "model": ", ".join(run.models),
        "top1": sum(one.is_right for one in outcomes),
        "top1_torchvision": sum(plain[one.path][0][0] == one.truth for one in outcomes),
        "top5": sum(one.truth in one.classes for one in outcomes),
        "top5_torchvision": sum(one.truth in plain[one.path][0] for one in outcomes),
        "other_best_class": sum(one.classes[:1] != (plain[one.path][0][0],) for one in outcomes),
        "other_five": sum([*one.classes] != plain[one.path][0] for one in outcomes),
        "largest_difference": max(abs(one.confidence - plain[one.path][1]) for one in outcomes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("images", type=Path, metavar="IMAGES", help="as ./scripts/evaluate has it")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE.pth")
    parser.add_argument("--recipe", required=True, metavar="ENTRY")
    parser.add_argument("--target", default=str(ARCHIVE), metavar="URL|FILE.mar")
    args = parser.parse_args(argv)
    os.environ.update(EXACT)
    try:
        _, [run] = evaluate(
            args.images, [args.target], "mobilenet_v2", Asking(options={}), without_failed=False
        )
        plain = classify_plainly([one.path for one in run.outcomes], args.weights, args.recipe)
    except (OSError, SetupError, ValueError, RuntimeError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    found = compare(run, plain)
    rows = [
        (name, found[key], found[f"{key}_torchvision"])
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
    ]
    print("\n".join(text_table([f"right of {found['images']}", args.target, "torchvision"], rows)))
    print(f"other best class: {found['other_best_class']} images; other five: ", end="")
    print(f"{found['other_five']}; confidence differs by {found['largest_difference']:.6f} at most")
    versions = {name: version(name) for name in LIBRARIES}
    print(json.dumps(found | {"machine": machine(), "versions": versions}))
    same = all(found[key] == found[f"{key}_torchvision"] for key in ("top1", "top5"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""What `decode: fast` does to a model's answers, and what it saves, on your own images.

    python -m benchmarks.decoding --images DIR

Each JPEG of the folder is decoded exactly and fast, and both go through the packaged model with the
settings in force, on the CPU. Prints a table; the last line is one JSON object. Images that `fast`
does not scale down are the same in both ways, and are only counted.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gpu_parts import compare, in_passes
from benchmarks.subjects import ROOT
from handler.engines import load_engine
from handler.errors import RequestError, SetupError
from handler.images import read_picture
from handler.model_card import ModelCard
from handler.settings import Settings
from service.archive.mar import unpack
from service.load.images import load_images

ARCHIVE = ROOT / "model_store" / "mobilenet_v2.mar"
WAYS = ("exact", "fast")


def compare_decoding(model_dir: Path, images: Path, settings: Settings) -> dict[str, Any]:
    """Both ways side by side, on the JPEGs of a folder.

    The differences are those of each image's most different class. The CPU time is that from bytes
    to the model's input. Raises OSError if the folder has no JPEG, SetupError if the model does not
    run here, and RequestError with the name of an image that is refused.
    """
    files = load_images(images)
    card = ModelCard.read(model_dir)
    engine = load_engine(card, model_dir, settings, gpu_id=None, workers=1)
    pixels: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for file in files:
        pictures, took = {}, {}
        for way in WAYS:  # one after the other, so that a busy machine slows both
            started = time.process_time()
            try:
                picture = read_picture(file.body, card.transform, replace(settings, decode=way))
            except RequestError as exc:
                raise type(exc)(f"{file.name}: {exc}") from exc
            pictures[way], took[way] = picture, time.process_time() - started
        if pictures["fast"].decode == "fast":
            for way in WAYS:
                pixels[way].append(pictures[way].pixels)
                seconds[way] += took[way]
    scaled = len(pixels["fast"])
    found = {"engine": engine.name, "images": len(files), "scaled_down": scaled}
    if not scaled:
        return found
    return (
        found
        | compare(*(in_passes(engine, pixels[way]) for way in WAYS))
        | {f"{way}_cpu_ms": 1000 * seconds[way] / scaled for way in WAYS}
    )


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [f"images                    {found['images']}, scaled down: {found['scaled_down']}"]
    if found["scaled_down"]:
        lines += [
            f"same top-1 class          {found['same_best_class']:.1%} ({found['engine']})",
            f"probabilities differ by   {found['mean_difference']:.4f} on average, "
            f"{found['largest_difference']:.4f} at most",
            f"CPU ms to decode one      exact {found['exact_cpu_ms']:.1f}, "
            f"fast {found['fast_cpu_ms']:.1f}",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="your JPEGs")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, metavar="FILE.mar")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model_dir = unpack(args.archive, None, Path(folder, "model"))
            found = compare_decoding(model_dir, args.images, Settings.load())
    except (OSError, SetupError, RequestError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(describe(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

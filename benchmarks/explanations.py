"""Whether explanations point at the object: your own images, shrunk and pasted at known places.

    python -m benchmarks.explanations --images DIR

Each labelled image of the folder (labels.csv: file, class_id) becomes an object on grey, at a
random place of the model's input; the map is that of its own class. It hits if its highest position
lies in the object. Beside it stands what chance would give: the object's share of the input, as
positions fall into it. Prints a table; the last line is one JSON object.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.subjects import ROOT
from handler.engine import Engine
from handler.engines import load_engine
from handler.errors import SetupError
from handler.explanations import activation_map
from handler.model_card import ModelCard
from handler.settings import Settings
from service.archive.mar import unpack

ARCHIVE = ROOT / "model_store" / "mobilenet_v2.mar"
SHARES = (0.5, 0.35)  # of the input's side
GREY = (124, 116, 104)  # the mean of ImageNet


def measure(engine: Engine, size: int, labelled: Sequence[tuple[Path, int]]) -> dict[str, Any]:
    """Hits by the object's share of the input's side; `size` is that side in pixels."""
    rng = random.Random(0)  # noqa: S311 places, no secret
    found: dict[str, Any] = {"engine": engine.name, "images": len(labelled)}
    for share in SHARES:
        side = round(share * size)
        hits, chances, known, known_hits = 0, 0.0, 0, 0
        for path, class_id in labelled:
            left, top = rng.randrange(size - side + 1), rng.randrange(size - side + 1)
            canvas = Image.new("RGB", (size, size), GREY)
            with Image.open(path) as image:
                canvas.paste(ImageOps.fit(image.convert("RGB"), (side, side)), (left, top))
            seen = engine.inspect(torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None])
            values = activation_map(seen, class_id)
            inside = [
                (start <= (np.arange(len(values)) + 0.5) * size / len(values))
                & ((np.arange(len(values)) + 0.5) * size / len(values) < start + side)
                for start in (top, left)
            ]
            within = np.outer(*inside)
            hit = bool(within[np.unravel_index(values.argmax(), values.shape)])
            hits += hit
            chances += within.mean()
            if int(seen.probabilities.argmax()) == class_id:
                known, known_hits = known + 1, known_hits + hit
        found[f"{share:.0%}"] = {
            "hits": hits,
            "by_chance": round(chances / len(labelled), 4),
            "recognised": known,
            "hits_of_recognised": known_hits,
        }
    return found


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [f"{found['images']} images, {found['engine']}"]
    for share in SHARES:
        one = found[f"{share:.0%}"]
        lines.append(
            f"object of {share:.0%} of the side   hits {one['hits']}, by chance "
            f"{one['by_chance']:.1%} of the images; of {one['recognised']} that were recognised "
            f"{one['hits_of_recognised']}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explanations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="with labels.csv")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, metavar="FILE.mar")
    args = parser.parse_args(argv)
    try:
        with (args.images / "labels.csv").open(encoding="utf-8", newline="") as file:
            labelled = [
                (args.images / row["file"], int(row["class_id"])) for row in csv.DictReader(file)
            ]
        with tempfile.TemporaryDirectory() as folder:
            model_dir = unpack(args.archive, None, Path(folder, "model"))
            card = ModelCard.read(model_dir)
            engine = load_engine(card, model_dir, Settings.load(), gpu_id=None, workers=1)
            if not engine.inspectable:
                raise SetupError(f"answers of {card.architecture} cannot be explained")
            found = measure(engine, card.transform.crop_size, labelled)
    except (OSError, KeyError, ValueError, SetupError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(describe(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The archive of a campaign: the model of three colours, with a switch that makes it hang."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from handler.errors import SetupError
from handler.model_card import CARD_FILE, ModelCard
from service.archive.mar import seal
from service.chaos.colours import LABELS, LABELS_FILE, WEIGHTS, encoded
from service.chaos.requests import Mixture, Picture
from service.torchserve.config import ROOT

MODEL = "mobilenet_v2"
MAKE_WEIGHTS = """
import sys
from pathlib import Path
from service.chaos.colours import make_weights
make_weights(Path(sys.argv[1]))
"""
LARGE = (6000, 4000)  # pixels
SWITCH = "CHAOS_HANG"  # names a file; while it is there, no forward pass returns

# Native code that has released Python's lock and does not return looks the same from outside.
HANG = f"""

import os
import time

_load_engine = load_engine


def load_engine(*args, **kwargs):
    engine = _load_engine(*args, **kwargs)
    launch = engine.launch

    def hang(images):
        while os.path.exists(os.environ["{SWITCH}"]):
            time.sleep(0.1)
        return launch(images)

    engine.launch = hang
    return engine
"""


def make_archive(folder: Path, more: str = HANG) -> Path:
    """Package the model, with more code for its engine; the archive's path. Raises SetupError."""
    environ = os.environ | {"TS_MODEL_STORE": str(folder / "packaged"), "PYTHONPATH": str(ROOT)}
    # In a process of its own, with which its memory for torch ends.
    subprocess.run([sys.executable, "-c", MAKE_WEIGHTS, str(folder)], env=environ, check=True)
    weights, labels = folder / WEIGHTS, folder / LABELS_FILE
    package = [sys.executable, str(ROOT / "scripts" / "package.py"), "--model", MODEL]
    package += ["--weights", str(weights), "--labels", str(labels), "--device", "cpu"]
    done = subprocess.run(package, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"packaging failed: {(done.stderr.splitlines() or ['no reason'])[-1]}")
    made, archive = folder / "packaged" / f"{MODEL}.mar", folder / f"{MODEL}.mar"
    copy_with(made, archive, more)
    return archive


def copy_with(made: Path, archive: Path, more: str) -> None:
    """Copy an archive, with more code at the end of the module that loads the engine."""
    with ZipFile(made) as old, ZipFile(archive, "w") as new:
        for item in old.infolist():
            added = more if item.filename == "handler/engines.py" else ""
            if item.filename != CARD_FILE:
                new.writestr(item, old.read(item) + added.encode())
        card = ModelCard.from_json(old.read(CARD_FILE))
    seal(archive, card)


def can_hang(archive: Path) -> bool:
    """Whether an archive has the switch."""
    with ZipFile(archive) as file:
        return SWITCH.encode() in file.read("handler/engines.py")


def coloured_mixture() -> Mixture:
    """Pictures of each colour in each format."""
    pictures = [
        Picture(encoded(label, image_format), label)
        for label in LABELS
        for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    ]
    return Mixture(MODEL, pictures, Picture(encoded(LABELS[0], size=LARGE), LABELS[0]))

"""Build the image with buildah, on a base that mmdebstrap makes."""

import os
import re
import shutil
import sys
import time
import urllib.request
from pathlib import Path

from container_test.commands import ROOT, run, say

CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"


def build(
    folder: Path, image: str, weights: str, recipe: str, labels: str, torch: str
) -> dict[str, object]:
    """Make a base of Debian's packages, since there is no registry, and the image on it."""
    started = time.monotonic()
    base = folder / "base.tar"
    run("mmdebstrap", "--variant=minbase", "--include=ca-certificates,python3", "bookworm", base)
    container = run("buildah", "from", "scratch")
    run("buildah", "add", "--quiet", container, base, "/")
    run("buildah", "commit", "--quiet", "--rm", container, f"{image}-base")
    base.unlink()
    say("base", f"Debian 12 in {time.monotonic() - started:.0f} s")

    started = time.monotonic()
    if torch == "auto":
        torch = "cpu" if answers(CPU_INDEX) else "cuda"
        if torch == "cuda":
            say("torch", "CUDA's build, because PyTorch's CPU index does not answer")
    context = folder / "context"
    shutil.copytree(
        ROOT, context, ignore=shutil.ignore_patterns(".git", ".venv", "*.mar", "weights")
    )
    values = {"BASE": f"{image}-base", "TORCH": torch}
    for name, value in (("WEIGHTS", weights), ("LABELS", labels), ("RECIPE", recipe)):
        if Path(value).is_file():
            (context / "weights").mkdir(exist_ok=True)
            value = f"weights/{Path(shutil.copy(value, context / 'weights')).name}"
        if value:
            values[name] = value
    run(
        *("buildah", "bud", "--isolation", "chroot", "--format", "docker", "--pull-never"),
        *(word for item in values.items() for word in ("--build-arg", "=".join(item))),
        *(word for path in pip_mounts(folder) for word in ("--volume", path)),
        *("--tag", image, context),
        show=True,
    )
    shutil.rmtree(context)
    say("build", f"{time.monotonic() - started:.0f} s")
    return {"torch": torch, "build_seconds": round(time.monotonic() - started)}


def pip_mounts(folder: Path) -> list[str]:
    """This machine's pip configuration, and the files and folders that it names, as volumes."""
    listed = run(sys.executable, "-m", "pip", "config", "list", check=False)
    settings: dict[str, dict[str, None]] = {}
    for line in listed.splitlines():
        if match := re.fullmatch(r"(?:global|:env:)\.([\w-]+)='(.*)'", line):
            words = match[2].replace("\\n", " ").split()
            settings.setdefault(match[1].lstrip("."), {}).update(dict.fromkeys(words))
    paths = dict.fromkeys(
        [os.environ.get("SSL_CERT_FILE", "")]
        + [word for words in settings.values() for word in words]
    )
    mounts = []
    for name in paths:
        path = Path(name.removeprefix("file://"))
        # The files of an index are beside its pages.
        path = path.parent if name.startswith("file://") else path
        if path.is_absolute() and path.exists():
            mounts.append(f"{path}:{path}:ro")
    conf = folder / "pip.conf"
    lines = [f"{key} = {' '.join(words)}" for key, words in settings.items()]
    conf.write_text("\n".join(["[global]", *lines, ""]))
    return [*dict.fromkeys(mounts), f"{conf}:/etc/pip.conf:ro"]


def answers(url: str) -> bool:
    """Whether anything but an error comes from there within ten seconds."""
    try:
        with urllib.request.urlopen(url, timeout=10):  # noqa: S310 - our own https URL
            return True
    except OSError:
        return False

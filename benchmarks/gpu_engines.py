"""Ways to run a network on a GPU, side by side: the forward pass alone, from pixels on the GPU.

    python -m benchmarks.gpu_engines --model resnet50 --weights FILE --recipe ENTRY

Each way builds the network in a process of its own and runs it as a CUDA graph, with and without
cuDNN's search for the fastest kernels. Prints a row as soon as it is measured; the last line is one
JSON object. A way that fails, hangs or is not installed is a row with the reason. Untrained weights
give all classes much the same probability, so that the differences say little.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import device_facts
from benchmarks.servers import say
from benchmarks.subjects import ROOT
from handler.cuda import blobs, capture
from handler.fusion import FusedConvolution, fold_batch_norms, fuse_relus
from handler.model_card import InputTransform
from handler.networks import empty_network, get_recipe, input_transform, load_state
from handler.torch_engine import DTYPES, PixelsToProbabilities, exact_fp32
from service.archive.fitting import fit_checkpoint
from service.archive.weights import find_weights, read_weights
from service.load.report import machine
from service.tables import text_line

BATCHES = (1, 8, 32, 64)
WIDTHS = (16, 26, 15)  # of model, way and cuDNN's search; figures take 9
REPLAYS = 10  # between two looks at the clock, so that waiting for the GPU costs little

Build = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


def as_it_is(model: nn.Module, _: Tensor) -> Callable[[Tensor], Tensor]:
    return model


def compiled(model: nn.Module, _: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, dynamic=False)


def autotuned(model: nn.Module, _: Tensor) -> Callable[[Tensor], Tensor]:
    mode = "max-autotune-no-cudagraphs"  # the graph is ours
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)


def ahead_of_time(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (images,))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.pt2"))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        return torch._inductor.aoti_load_package(path)


def tensorrt(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The network alone; normalisation and softmax stay torch's, as the input is uint8."""
    import torch_tensorrt  # optional

    network = model.get_submodule("network")
    like = images.to(next(network.parameters()).dtype)
    program = torch.export.export(network, (like,))
    engine = torch_tensorrt.dynamo.compile(program, inputs=[like], use_explicit_typing=True)
    model.network = engine
    return model


@dataclass(frozen=True)
class Way:
    """How the network is run; `fused` by handler/fusion.py."""

    build: Build
    fused: bool = False
    searches: bool = True  # whether cuDNN's search for the fastest kernels makes a difference


WAYS = {
    "folded": Way(as_it_is),
    "fused": Way(as_it_is, fused=True),
    "torch.compile": Way(compiled),
    "torch.compile, autotuned": Way(autotuned, searches=False),
    "AOTInductor": Way(ahead_of_time, searches=False),
    "TensorRT": Way(tensorrt, searches=False),
}


# --- In a process of its own


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One way: a row for each batch size, the largest first, with what is special about it."""
    way, device = WAYS[args.ways[0]], "cuda:0" if args.device == "cuda" else "cpu"
    torch.backends.cudnn.benchmark = args.search
    exact_fp32(device)
    network, transform = load_network(args.model[0], args.weights, args.recipe)
    pixels = blobs(max(args.batches), transform.crop_size).to(device)
    with torch.inference_mode():
        exact = PixelsToProbabilities(network, transform, torch.float32).to(device)
        expected = torch.cat([exact(some) for some in torch.split(pixels, 8)]).cpu()
    network.cpu()
    for batch in sorted(args.batches, reverse=True):
        began = time.perf_counter()
        images = pixels[:batch]
        # Anew for each size: TensorRT puts its engine into the model.
        model = prepare(network, transform, way, args.precision).to(device)
        model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        run = capture(way.build(model, images), images)  # type: ignore[arg-type]
        with torch.no_grad():  # as in `rate`, or torch.compile on a CPU would compile once more
            difference = (run().cpu() - expected[:batch]).abs().max().item()
        built = time.perf_counter() - began
        refused = sum(getattr(module, "refusal", None) is not None for module in model.modules())
        yield {
            "batch": batch,
            "images_per_second": batch * rate(run, args.seconds, images),
            "build_seconds": built,
            "largest_difference": difference,
            "note": f"{refused} convolutions refused by cuDNN" if refused else "",
        }


def load_network(
    architecture: str, weights: str, entry: str | None
) -> tuple[nn.Module, InputTransform]:
    recipe = get_recipe(architecture, entry)
    checkpoint = read_weights(find_weights(weights, recipe, architecture), recipe, architecture)
    network = empty_network(recipe, architecture, len(recipe.meta["categories"]))
    load_state(network, fit_checkpoint(checkpoint, recipe, architecture).state)
    return network.eval(), input_transform(recipe)


def prepare(network: nn.Module, transform: InputTransform, way: Way, precision: str) -> nn.Module:
    """The folded network, which is a copy, or the fused one. Raises ValueError if that fails."""
    rewritten = fold_batch_norms(network, transform)
    if way.fused:
        rewritten = fuse_relus(rewritten, transform)
        if not any(isinstance(module, FusedConvolution) for module in rewritten.modules()):
            raise ValueError("there is nothing to fuse")
    return PixelsToProbabilities(rewritten, transform, DTYPES[precision])


@torch.no_grad()
def rate(run: Callable[[], Tensor], seconds: float, images: Tensor) -> float:
    """Calls a second."""
    replays = 1 if images.is_cpu else REPLAYS
    calls, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        for _ in range(replays):
            run()
        if not images.is_cpu:
            torch.cuda.synchronize()
        calls += replays
    return calls / (now - begin)


def child(args: argparse.Namespace) -> int:
    try:
        for row in measure(args):
            say(json.dumps(row))
    except Exception as exc:  # whatever a library raises is the reason that the row gives
        said = str(exc).strip().splitlines() or [""]
        say(json.dumps({"reason": f"{type(exc).__name__}: {said[0]}"}))
        return 1
    return 0


# --- The table


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way in turn, printed as they are measured."""
    headings = ("model", "way", "cuDNN's search", *(f"{batch}" for batch in args.batches))
    widths = [*WIDTHS, *[9] * len(args.batches), 7, 10]
    left = (0, 1, 2)
    say(f"images/s in {args.precision} on {args.device}, by batch size")
    say(text_line((*headings, "build s", "difference"), widths, left=left))
    rows = []
    for model in args.model:
        for name in args.ways:
            for search in (False, True) if WAYS[name].searches else (False,):
                row = {"model": model, "way": name, "search": search}
                row |= run_way(args, model, name, search)
                rates = [row["images_per_second"].get(batch) for batch in args.batches]
                cells = (model, name, "yes" if search else "no", *rates, row["build_seconds"])
                off = row["largest_difference"]
                off = None if off is None else f"{off:.5f}"
                line = text_line((*cells, off), widths, left=left)
                say("  ".join([line, *row["notes"]]))
                rows.append(row)
    return rows


def run_way(args: argparse.Namespace, model: str, name: str, search: bool) -> dict[str, Any]:
    """Measure in a process, which is ended with all its own at the limit."""
    command = [sys.executable, "-m", "benchmarks.gpu_engines", "--child"]
    command += ["--model", model, "--ways", name, "--weights", args.weights]
    command += ["--precision", args.precision, "--device", args.device]
    command += ["--seconds", str(args.seconds), "--batches", *map(str, args.batches)]
    command += ["--recipe", args.recipe] if args.recipe else []
    command += ["--search"] if search else []
    late = False
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # Without the compiler's caches, or only the first run would show how long it builds.
        environ = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=ROOT, env=environ, start_new_session=True
        )
        try:
            process.wait(args.limit_seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):  # compilers have processes, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        said = [line for line in out.read().decode(errors="replace").splitlines() if line]
        complaints = err.read().decode(errors="replace").split("\n")
    found = [json.loads(line) for line in said if line.startswith(('{"batch"', '{"reason"'))]
    reasons = [row["reason"] for row in found if "reason" in row]
    if late:
        reasons = [f"not finished after {args.limit_seconds:g} s"]
    elif process.returncode and not reasons:
        last = next((line for line in reversed(complaints) if line.strip()), "")
        reasons = [f"ended with status {process.returncode}: {last}"]
    return summary([row for row in found if "batch" in row], reasons)


def summary(batches: Sequence[Mapping[str, Any]], reasons: Sequence[str]) -> dict[str, Any]:
    """One row of the table from what the process said."""
    seconds = [row["build_seconds"] for row in batches]
    differences = [row["largest_difference"] for row in batches]
    return {
        "images_per_second": {row["batch"]: row["images_per_second"] for row in batches},
        "build_seconds": sum(seconds) if seconds else None,
        "largest_difference": max(differences) if differences else None,
        "notes": [*dict.fromkeys(row["note"] for row in batches if row["note"]), *reasons],
        "failed": bool(reasons),
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_engines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet50"], metavar="NAME")
    add("--weights", default="untrained", metavar="untrained|FILE")
    add("--recipe", metavar="ENTRY", help="as for ./scripts/serve")
    add("--precision", choices=list(DTYPES), default="fp16")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add("--batches", nargs="+", type=int, default=list(BATCHES))
    add("--seconds", type=float, default=1, help="of each measurement (1)")
    add("--limit-seconds", type=float, default=60, help="for all batch sizes of a way (60)")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--search", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.child:
        return child(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --device cpu tries the same without", file=sys.stderr)
        return 2
    args.weights = (
        args.weights if args.weights == "untrained" else str(Path(args.weights).resolve())
    )
    facts = machine() | device_facts(args.device) | {"torch": torch.__version__}
    rows = compare(args)
    options = {"precision": args.precision, "weights": args.weights, "seconds": args.seconds}
    print(json.dumps({"conditions": facts | options, "rows": rows}))
    ours = [row for row in rows if row["way"] in ("folded", "fused")]
    return 1 if any(row["failed"] for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Set up what a command needs, then run it in .venv; start.sh runs this with any Python."""

from __future__ import annotations  # so that an old Python gets as far as the message for it

import os
import platform
import subprocess
import sys

from service.bootstrap import PYTHON, ROOT, set_up

REQUIREMENTS = {  # of the commands that need more than requirements.txt
    "test": "requirements-dev.txt",
    "benchmark": "requirements-benchmark.txt",
    "generate": "requirements-dev.txt",  # every command's options, and the .proto's compiler
    "rehearse": "requirements-benchmark.txt",
    "evaluate": "requirements-evaluate.txt",
    "tune": "requirements-benchmark.txt",
}


def main(argv: list[str]) -> int:
    if sys.version_info < (3, 10):
        return _fail(
            f"Python 3.10 or newer is needed, {sys.executable} is {platform.python_version()}; "
            "name another with PYTHON=/path/to/python3"
        )
    command, *rest = argv
    if command == "conformance":  # for anybody's server: no torch, and environments of its own
        os.execv(sys.executable, [sys.executable, str(ROOT / "scripts" / "conformance.py"), *rest])
    torch_build, signatures, elsewhere = "auto", False, False
    if command in ("serve", "package"):  # their mistakes and --help need no set-up
        from service import options  # after the version check: newer syntax
        from service.registry.references import parse_reference

        model: options.ModelOptions
        if command == "serve":
            model = serve = options.parse_serve(rest)
            torch_build, signatures = serve.torch, serve.require_signed not in (None, "off")
        else:
            model = options.parse_package(rest)
            signatures = model.sign is not None
        elsewhere = model.log_to is not None or parse_reference(model.weights) is not None
    requirements = [REQUIREMENTS.get(command, "requirements.txt")]
    if any(word.partition("=")[0] == "--calibration" for word in rest):
        requirements.append("requirements-int8.txt")
    if any(word.partition("=")[0] == "--calibrate" for word in rest):
        requirements.append("requirements-confidence.txt")
    if signatures:
        requirements.append("requirements-signing.txt")
    if elsewhere:
        requirements.append("requirements-registry.txt")
    if command in ("serve", "gateway") and os.environ.get("GATEWAY_GRPC_PORT", "0") != "0":
        requirements.append("requirements-grpc.txt")
    if command in ("serve", "gateway") and os.environ.get("GATEWAY_JOBS_URL"):
        requirements.append("requirements-jobs.txt")
    if command == "serve" and os.environ.get("CLASSIFIER_CACHE_URL"):
        requirements.append("requirements-cache.txt")
    if command == "predict" and any(word.endswith("parquet") for word in rest):
        requirements.append("requirements-bulk.txt")
    try:
        set_up(requirements, torch_build)
    except subprocess.CalledProcessError as exc:
        return _fail(f"the set-up failed: {' '.join(map(str, exc.cmd))}")
    except OSError as exc:
        return _fail(f"the set-up failed: {exc}")
    except KeyboardInterrupt:
        return 130
    if command != "test":
        os.execv(PYTHON, [str(PYTHON), str(ROOT / "scripts" / f"{command}.py"), *rest])
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

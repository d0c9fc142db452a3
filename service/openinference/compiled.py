"""inference_pb2.py and inference_pb2.pyi, which ./scripts/generate makes from inference.proto."""

import tempfile
from pathlib import Path

from handler.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("inference.proto")
MODULES = ("inference_pb2.py", "inference_pb2.pyi")


def outdated() -> dict[Path, str]:
    """The new text of each module that is not as the compiler would make it now.

    Raises SetupError if the compiler is missing, or refuses the file.
    """
    try:
        from grpc_tools import protoc
    except ImportError as exc:
        raise SetupError("the .proto's compiler is in requirements-dev.txt") from exc
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        arguments = [f"-I{ROOT}", f"--python_out={made}", f"--pyi_out={made}", str(SOURCE)]
        if protoc.main(["protoc", *arguments]) != 0:
            raise SetupError(f"{SOURCE.name} could not be compiled; the cause is above")
        folder = made / SOURCE.relative_to(ROOT).parent
        texts = {SOURCE.with_name(each): (folder / each).read_text("utf-8") for each in MODULES}
    return {path: text for path, text in texts.items() if path.read_text("utf-8") != text}

"""TorchServe's BaseHandler, without imports that we do not need, and with every part of a form.

ts/torch_handler/base_handler.py imports the modules in _UNUSED if they are installed. They load all
of torch.compile into every worker, which takes 1.5 s and 170 MB, and this handler calls OpenVINO
itself.

ts/service.py makes a dict of a form's parts, which keeps only the last part of each name.
"""

import sys
from collections import Counter
from types import ModuleType
from typing import Any, cast

from handler.forms import REPEATED
from handler.gpus import restore_visible

restore_visible()  # the imports below ask CUDA for its devices, and CUDA reads the variable once

_UNUSED = {"openvino.torch", "onnxruntime", "torch_tensorrt"} - set(sys.modules)

# A module that is None in sys.modules cannot be imported (documented in importlib).
sys.modules.update(dict.fromkeys(_UNUSED, cast(ModuleType, None)))
try:
    from ts.service import Service
    from ts.torch_handler.base_handler import BaseHandler
finally:
    for _name in _UNUSED:
        del sys.modules[_name]

_retrieve = Service.retrieve_data_for_inference


def keep_every_part(batch: list[dict[str, Any]] | None) -> Any:
    """A batch as TorchServe reads it; parts of the same name are numbered, so that none is lost."""
    for request in batch or ():
        seen: Counter[str] = Counter()
        for parameter in request["parameters"]:
            name = parameter["name"]
            if seen[name]:
                parameter["name"] = f"{name}{REPEATED}{seen[name]}"
            seen[name] += 1
    return _retrieve(batch)


Service.retrieve_data_for_inference = staticmethod(keep_every_part)

__all__ = ["BaseHandler"]

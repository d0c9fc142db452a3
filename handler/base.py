"""TorchServe's BaseHandler, without what it imports for uses of its own and without what it loses.

ts/torch_handler/base_handler.py tries to import these where they are installed. They bring the
whole of torch.compile into every worker, 1.5 s and 170 MB, for nothing that this handler does: it
calls OpenVINO itself.

ts/service.py makes a dict of a form's parts, in which the last of each name is left.
"""

import sys
from collections import Counter
from types import ModuleType
from typing import Any, cast

from handler.forms import REPEATED
from handler.gpus import restore_visible

restore_visible()  # what follows asks CUDA for its devices already, and CUDA reads them once

_UNUSED = {"openvino.torch", "onnxruntime", "torch_tensorrt"} - set(sys.modules)

# None in the place of a module makes its import fail (importlib's documented way to forbid one).
sys.modules.update(dict.fromkeys(_UNUSED, cast(ModuleType, None)))
try:
    from ts.service import Service
    from ts.torch_handler.base_handler import BaseHandler
finally:
    for _name in _UNUSED:
        del sys.modules[_name]

_retrieve = Service.retrieve_data_for_inference


def keep_every_part(batch: list[dict[str, Any]] | None) -> Any:
    """What TorchServe makes of a batch; parts of one name are numbered, so that none is lost."""
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

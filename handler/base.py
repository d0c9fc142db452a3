"""TorchServe's BaseHandler, without what it imports for uses of its own.

ts/torch_handler/base_handler.py tries to import these where they are installed. They bring the
whole of torch.compile into every worker, 1.5 s and 170 MB, for nothing that this handler does: it
calls OpenVINO itself.
"""

import sys
from types import ModuleType
from typing import cast

from handler.gpus import restore_visible

restore_visible()  # what follows asks CUDA for its devices already, and CUDA reads them once

_UNUSED = {"openvino.torch", "onnxruntime", "torch_tensorrt"} - set(sys.modules)

# None in the place of a module makes its import fail (importlib's documented way to forbid one).
sys.modules.update(dict.fromkeys(_UNUSED, cast(ModuleType, None)))
try:
    from ts.torch_handler.base_handler import BaseHandler
finally:
    for _name in _UNUSED:
        del sys.modules[_name]

__all__ = ["BaseHandler"]

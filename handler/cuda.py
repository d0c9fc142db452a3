"""The model on a GPU: CUDA graphs of a few fixed sizes, to which batches are padded.

A graph is a whole forward pass that the CPU starts with one call. It is for one batch size and for
tensors that stay where they are, so there is one graph for each size, all with the same input.

The same code runs on the CPU, where a plain call takes the place of a graph, so that it can be
tested without a GPU.
"""

from collections.abc import Callable, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from handler.engine import Engine
from handler.errors import InvalidModel, InvalidSettings
from handler.fusion import FusedConvolution, difference, fold_batch_norms, fuse_relus
from handler.inspection import Inspection, inspect
from handler.logs import log_line
from handler.model_card import InputTransform
from handler.torch_engine import DTYPES, PixelsToProbabilities, exact_fp32

# Before a capture, because libraries choose their algorithms, and allocate, at first use.
WARM_UP_PASSES = 3
# Of a graph from the network without fusions, in the same precision; see `difference`. In 16 bits,
# a sum that is rounded once differs from one that is rounded three times.
MAX_DIFFERENCE = {"fp32": 0.01, "fp16": 0.02, "bf16": 0.1}


class Cuda(Engine):
    """A network in graphs of 1, 2, 4, … `max_forward` images, folded and fused, channels last.

    Everything runs in order on one stream, so that a pass may write to the input while the pass
    before it is still under way. It may be used by one thread at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: InputTransform,
        precision: str,
        device: str,
        max_forward: int,
    ) -> None:
        """Captures every size. Raises InvalidSettings if the GPU lacks the memory."""
        super().__init__("cuda", precision, device, max_forward)
        self.sizes = fixed_sizes(max_forward)
        self._on_gpu = torch.device(device).type == "cuda"
        exact_fp32(device)
        folded = fold_batch_norms(network.eval(), transform)
        # The gain was measured in 16 bits; exact fp32 excludes every kernel that uses tensor cores.
        fused = folded if precision == "fp32" else fuse_relus(folded, transform)
        try:
            if self._on_gpu:
                torch.cuda.set_device(device)
            # Something to compare passes with, until there are images.
            self._input = blobs(max_forward, transform.crop_size).to(device)
            plain = self._ready(folded, transform)
            if fused is folded or not self._capture_fused(self._ready(fused, transform), plain):
                self._capture(plain, plain)
        except torch.OutOfMemoryError:
            free, total = (memory // 2**20 for memory in torch.cuda.mem_get_info(device))
            raise InvalidSettings(
                f"max_forward is {max_forward}, for which the memory of {device} does not suffice: "
                f"{free} of {total} MiB are free; set max_forward lower, or start fewer workers"
            ) from None

    def _ready(self, network: nn.Module, transform: InputTransform) -> nn.Module:
        model = PixelsToProbabilities(network, transform, DTYPES[self.precision]).to(self.device)
        return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def _capture_fused(self, model: nn.Module, plain: nn.Module) -> bool:
        """Capture the fused model, unless it fails or computes something else than the plain one.

        Then the reason is logged. A GPU without memory for it is an error as always.
        """
        try:
            self._capture(model, plain)
        except torch.OutOfMemoryError:
            raise
        except (InvalidModel, RuntimeError) as exc:
            log_line(WARNING, "not_fused", reason=str(exc))
            return False
        fusions = [module for module in model.modules() if isinstance(module, FusedConvolution)]
        refusals = [fusion.refusal for fusion in fusions if fusion.refusal is not None]
        facts = {"reason": refusals[0]} if refusals else {}
        level = WARNING if refusals else INFO
        log_line(level, "fused", convolutions=len(fusions), refused=len(refusals), **facts)
        return True

    @torch.inference_mode()
    def _capture(self, model: nn.Module, plain: nn.Module) -> None:
        """Make a pass of every size from `model`.

        Raises InvalidModel if a graph computes something other than `plain` does.
        """
        pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        # The largest first: the others then find their memory in the pool that it made.
        passes = {size: capture(model, self._input[:size], pool) for size in reversed(self.sizes)}
        # After all of them, and twice, for then their memory holds what other passes left there: a
        # fused convolution takes its own uninitialised result as a residual, times zero.
        for size in self.sizes * 2:
            moved = difference(plain(self._input[:size]), passes[size]())
            if not moved <= MAX_DIFFERENCE[self.precision]:
                raise InvalidModel(
                    f"a CUDA graph of {size} images moves {moved:.4f} of the probability to other "
                    "classes than the model; engine: torch does without"
                )
        if self._on_gpu:
            torch.cuda.empty_cache()  # what the passes without a graph took; others can use it
        self._passes = passes
        self._model = model  # the graphs read its weights, which would be freed with it

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> float32 [B, C] on the CPU."""
        return torch.from_numpy(self.launch(list(images))())

    @torch.inference_mode()
    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        """Images may lie on the CPU or on the GPU; the caller goes on while the pass runs."""
        count = len(images)
        size = next(size for size in self.sizes if size >= count)
        self._stage(images, self._input[:count])
        output = self._passes[size]()[:count]
        result = torch.empty(output.shape, dtype=output.dtype, pin_memory=self._on_gpu)
        result.copy_(output, non_blocking=True)
        if not self._on_gpu:
            return result.numpy
        # A blocking event sleeps while it waits: decoding needs the core.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()

        def wait() -> NDArray[np.float32]:
            done.synchronize()
            return result.numpy()

        return wait

    def _stage(self, images: Sequence[Tensor], slots: Tensor) -> None:
        """Copy the images there, in one call for those on the CPU and one for those on the GPU."""
        on_cpu = [image for image in images if image.is_cpu]
        if on_cpu:
            # torch caches pinned memory, and reuses a piece only once its copy is over.
            shape = (len(on_cpu), *slots.shape[1:])
            staged = torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_gpu)
            torch.stack(on_cpu, out=staged)
            if len(on_cpu) == len(images):
                slots.copy_(staged, non_blocking=True)
                return
            moved = iter(staged.to(self.device, non_blocking=True))
            images = [next(moved) if image.is_cpu else image for image in images]
        torch.stack(list(images), out=slots)

    def _prepare_inspection(self) -> None:
        self.inspect(self._input[:1])

    def inspect(self, images: Tensor) -> Inspection:
        """A pass without a graph. Images may lie on the CPU or on the GPU."""
        return inspect(self._model, images.to(self.device))

    def is_lost(self) -> bool:
        """A CUDA error that stays: whatever is asked of the device fails from now on."""
        if not self._on_gpu:
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False


@torch.inference_mode()
def capture(model: nn.Module, images: Tensor, pool: Any = None) -> Callable[[], Tensor]:
    """What computes the images that lie in this tensor when it is called, in one call of the CPU.

    The next call overwrites its result, and the model's weights have to stay. `pool` is memory that
    the graph shares with others, of `torch.cuda.graph_pool_handle`. On the CPU there is no graph.
    """
    if images.is_cpu:
        return lambda: model(images)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_PASSES):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = model(images)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def fixed_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, …, and the largest itself."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


def blobs(count: int, size: int) -> Tensor:
    """Coloured blobs, the same each time and each image different: uint8 [count, 3, size, size]."""
    coarse = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(255 * coarse, size=size, mode="bilinear").to(torch.uint8)

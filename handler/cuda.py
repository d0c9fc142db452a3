"""The model on a GPU: CUDA graphs of a few fixed sizes, to which batches are padded.

A graph is a whole forward pass that the CPU starts with one call. It is for one batch size and for
tensors that stay where they are, so there is one graph for each size, all with the same input.

The same code runs on the CPU, where a plain call takes the place of a graph, so that it can be
tested without a GPU.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from handler.engine import Engine
from handler.errors import InvalidModel, InvalidSettings
from handler.model_card import InputTransform
from handler.torch_engine import DTYPES, PixelsToProbabilities, exact_fp32

# Before a capture, because libraries choose their algorithms, and allocate, at first use.
WARM_UP_PASSES = 3
MAX_DIFFERENCE = 1e-3  # of any probability after folding; float32 differs by some 1e-6
MAX_GRAPH_DIFFERENCE = 1e-2  # the same after capturing; 16 bits may round differently


class Cuda(Engine):
    """A network in graphs of 1, 2, 4, … `max_forward` images, batch norms folded, channels last.

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
        size = transform.crop_size
        try:
            if self._on_gpu:
                torch.cuda.set_device(device)
                self._pool = torch.cuda.graph_pool_handle()
            model = PixelsToProbabilities(folded, transform, DTYPES[precision])
            model = model.to(device).to(memory_format=torch.channels_last)
            self._model = model.eval().requires_grad_(False)
            self._input = torch.zeros(max_forward, 3, size, size, dtype=torch.uint8, device=device)
            # The largest first: the others then find their memory in the pool that it made.
            self._passes = {size: self._prepare(size) for size in reversed(self.sizes)}
        except torch.OutOfMemoryError:
            free, total = (memory // 2**20 for memory in torch.cuda.mem_get_info(device))
            raise InvalidSettings(
                f"max_forward is {max_forward}, for which the memory of {device} does not suffice: "
                f"{free} of {total} MiB are free; set max_forward lower, or start fewer workers"
            ) from None

    @torch.inference_mode()
    def _prepare(self, size: int) -> Callable[[], Tensor]:
        """What computes the first `size` images of the input: float32 [size, C] on the device.

        Its result is overwritten by the next call. Raises InvalidModel if a graph computes
        something other than the network that it was captured from.
        """
        images = self._input[:size]
        if not self._on_gpu:
            return lambda: self._model(images)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                expected = self._model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._model(images)

        def replay() -> Tensor:
            graph.replay()
            return output

        difference = (replay() - expected).abs().max().item()
        if not difference <= MAX_GRAPH_DIFFERENCE:
            raise InvalidModel(
                f"a CUDA graph of {size} images differs from the model by {difference:.4f}; "
                "engine: torch does without"
            )
        return replay

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> float32 [B, C] on the CPU."""
        return torch.from_numpy(self.launch(list(images))())

    @torch.inference_mode()
    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        """Images may lie on the CPU or on the GPU; the caller goes on while the pass runs."""
        count = len(images)
        size = next(size for size in self.sizes if size >= count)
        # torch caches pinned memory, and reuses a piece only once its copy is over.
        slots = self._input[:count]
        staged = torch.empty(slots.shape, dtype=torch.uint8, pin_memory=self._on_gpu)
        on_cpu = [place for place, image in enumerate(images) if image.is_cpu]
        for place in on_cpu:
            staged[place] = images[place]
        if on_cpu:
            slots.copy_(staged, non_blocking=True)
        for place in set(range(count)).difference(on_cpu):
            slots[place] = images[place]
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

    def is_lost(self) -> bool:
        """A CUDA error that stays: whatever is asked of the device fails from now on."""
        if not self._on_gpu:
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False


def fixed_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, …, and the largest itself."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


@torch.no_grad()  # not inference_mode, which would mark the folded weights for good
def fold_batch_norms(network: nn.Module, transform: InputTransform) -> nn.Module:
    """The network with each batch norm folded into the convolution before it.

    A network that cannot be traced, or whose probabilities would change, is returned as it is.
    """
    with suppress(fx.proxy.TraceError, RuntimeError, TypeError, ValueError):
        folded = fuse(network)
        size = transform.crop_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, size, size, generator=generator)
        difference = network(images).softmax(1) - folded(images).softmax(1)
        if difference.abs().max().item() <= MAX_DIFFERENCE:
            return folded
    return network

"""nvImageCodec, NVIDIA's image decoders, called like torchvision's nvJPEG; an optional requirement.

Source: nvidia.nvimgcodec's docstrings, docs.nvidia.com/cuda/nvimagecodec/codec_options.html, and
for its streams src/image_generic_codec.h of NVIDIA/nvImageCodec.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

# nvJPEG repeats chroma by default; libjpeg interpolates it, and so does nvJPEG with this option.
OPTIONS = ":fancy_upsampling=1"

NO_SYNC = -1  # DLPack's word for a consumer that needs no event


def nvimgcodec(device: str, threads: int) -> Callable[[list[Tensor]], list[Tensor | None]]:
    """JPEGs uint8 [n] each -> uint8 RGB [3, H, W] each on the device; None for a refused one.

    The GPU alone decodes, with its JPEG engines if it has some: what it refuses is not decoded by
    nvImageCodec on the CPU, which takes damaged images for sound ones. On the device `cpu`, which
    is for tests, libjpeg-turbo decodes. Raises ImportError if nvImageCodec is not installed.
    """
    # A worker's log has no line for each damaged image, nor for the formats that are not installed.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    from nvidia import nvimgcodec as library

    kinds = library.BackendKind
    if device == "cpu":
        number, backends = library.NVIMGCODEC_DEVICE_CPU_ONLY, [kinds.CPU_ONLY]
    else:
        number = torch.device(device).index or 0
        backends = [kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU]
    decoder = library.Decoder(
        device_id=number,
        max_num_cpu_threads=threads,
        backends=[library.Backend(kind) for kind in backends],
        options=OPTIONS,
    )
    params = library.DecodeParams(
        apply_exif_orientation=False,  # we turn images ourselves, while they are resized
        color_spec=library.ColorSpec.SRGB,
        sample_format=library.SampleFormat.I_RGB,
    )

    def decode_jpegs(files: list[Tensor]) -> list[Tensor | None]:
        # Its own streams begin after what is queued on this one, which then waits for them. This
        # one allocates and frees the pixels, so that they are in order with all that reads them.
        stream = torch.cuda.current_stream(device).cuda_stream if device != "cpu" else 0
        sources = [library.CodeStream(file.numpy()) for file in files]
        images = decoder.decode(sources, params=params, cuda_stream=stream)
        return [
            None if image is None else from_dlpack(image.to_dlpack(NO_SYNC)).permute(2, 0, 1)
            for image in images
        ]

    return decode_jpegs

"""The certificate of sameness: a worker classifies the golden images before it is READY.

Each stage is held against the reference by itself: labels by their names and the engine by the
logits that it gives for the reference's pixels (both in load_engine), decoder and resize by their
pixels; if these are others, as `decode: fast` has them, decoder and engine together. What may be
chosen, and does not fit, is replaced by what does; else the worker does not start, and the error
names the stage.
"""

import logging
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from handler.decoders import CpuDecoder, Decoder
from handler.engine import Engine
from handler.errors import InvalidModel, RequestError
from handler.golden import MAX_ERROR, Golden
from handler.images import open_image
from handler.logs import log_line
from handler.model_card import ModelCard
from handler.settings import Settings

# Mean levels of 255 by which the pixels of an image may differ. The resize of handler/resize.py
# differs by 0.003 at most; another version of libjpeg may round a few pixels otherwise.
MAX_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Certificate:
    """How far a worker is from the reference that was packaged."""

    images: int
    logits_error: float | None  # see Golden.judge; None: an answer is not a number
    class_agreement: float  # share of the images
    decode_difference: float  # mean levels of 255, of the image for which it is the largest
    engine: str
    precision: str
    decoder: str
    decode: str  # "exact" or "fast"
    seconds: float  # that all this took, without the loading of the engine


def certify(
    card: ModelCard,
    model_dir: Path,
    settings: Settings,
    engine: Engine,
    decoder: Decoder,
    threads: int,
) -> tuple[Certificate | None, Decoder, Settings]:
    """The certificate, with decoder and settings as they have to be for it.

    Of the settings only `decode` may be another. Without golden images there is no certificate.
    Raises InvalidModel with the stage that differs.
    """
    started = perf_counter()
    golden = Golden.read(model_dir)
    if golden is None or engine.sameness is None:
        return None, decoder, settings
    pixels = decode(golden, decoder, settings)
    differences = (pixels.float() - golden.pixels.float()).abs().mean(dim=(1, 2, 3))
    sameness, difference = engine.sameness, differences.max().item()
    if not difference <= MAX_DIFFERENCE:
        if decoder.name == "cpu" and settings.decode == "exact":
            from handler.diagnosis import pixel_fault

            raise InvalidModel(pixel_fault(golden, card, pixels))
        # Other pixels are what `fast`, or the GPU, was asked for: what counts is what comes of it.
        sameness = golden.compare(engine, pixels)
        if not sameness.fits(MAX_ERROR):
            reason = f"{decoder.name}, {settings.decode}: {sameness.describe()}"
            log_line(logging.WARNING, "decoder_chosen", decoder="cpu", reason=reason)
            exact, cpu = replace(settings, decode="exact"), CpuDecoder(card.transform, threads)
            return certify(card, model_dir, exact, engine, cpu, threads)
    certificate = Certificate(
        images=len(golden.files),
        logits_error=sameness.error if isfinite(sameness.error) else None,
        class_agreement=sameness.agreement,
        decode_difference=difference,
        engine=engine.name,
        precision=engine.precision,
        decoder=decoder.name,
        decode=settings.decode,
        seconds=perf_counter() - started + engine.sameness.seconds,
    )
    return certificate, decoder, settings


def decode(golden: Golden, decoder: Decoder, settings: Settings) -> Tensor:
    """The golden images as the worker decodes them: uint8 RGB [N, 3, H, W] on the CPU.

    Raises InvalidModel for one that it refuses. The limits for requests are not for these.
    """
    unlimited = replace(settings, max_image_bytes=2**30, max_image_pixels=2**30)
    decodings = []
    for name, data in golden.files.items():
        try:
            decodings.append(decoder.start(open_image(data, unlimited)))
        except RequestError as exc:
            raise InvalidModel(f"decoder: it refuses the golden image {name}: {exc}") from None
    for _ in decoder.finish(decodings):
        pass
    pixels = []
    for name, decoding in zip(golden.files, decodings, strict=True):
        if decoding.picture is None:
            raise InvalidModel(f"decoder: it refuses the golden image {name}: {decoding.error}")
        pixels.append(decoding.picture.pixels.cpu())
    return torch.stack(pixels)

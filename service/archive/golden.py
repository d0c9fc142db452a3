"""Golden images of an archive: drawn here or given, with what the reference makes of them.

The reference is plain Pillow and torchvision: the recipe's own preset and the network, in fp32, on
a CPU. It shares no code with the worker, which is held against it (handler/certificate.py).
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from handler.diagnosis import plain_image
from handler.errors import InvalidModel
from handler.golden import Golden

MAX_PIXELS = 2**22  # of an image of --golden

# Name: width and height in units of the resize size, and how it is encoded. Each sampling that a
# GPU may decode; landscape, portrait and enlarged; one that the setting `decode: fast` scales down.
# With a slash, which no file's name has.
DRAWN: Mapping[str, tuple[float, float, dict[str, object]]] = {
    "drawn/420.jpg": (1.96, 1.46, {"subsampling": "4:2:0"}),
    "drawn/420-progressive.jpg": (1.36, 2.35, {"subsampling": "4:2:0", "progressive": True}),
    "drawn/422.jpg": (2.3, 1.55, {"subsampling": "4:2:2"}),
    "drawn/422-progressive.jpg": (1.5, 2.1, {"subsampling": "4:2:2", "progressive": True}),
    "drawn/444.jpg": (1.36, 2.35, {"subsampling": "4:4:4"}),
    "drawn/444-progressive.jpg": (2.2, 1.7, {"subsampling": "4:4:4", "progressive": True}),
    "drawn/small.png": (0.81, 0.62, {}),
    "drawn/large.jpg": (4.1, 5.3, {"subsampling": "4:2:0"}),
}


def draw_images(unit: int) -> dict[str, bytes]:
    """DRAWN by name, always the same for the same resize size."""
    return {
        name: _encode(_draw((round(wide * unit), round(high * unit)), seed), name, options)
        for seed, (name, (wide, high, options)) in enumerate(DRAWN.items())
    }


def _draw(size: tuple[int, int], seed: int) -> Image.Image:
    """Blobs of colour under shapes and strokes as fine as letters.

    Each channel has its own, so that another order shows; fine strokes show another resize.
    """
    rng = random.Random(seed)  # noqa: S311 a picture, not a secret
    width, height = size

    def colour() -> tuple[int, ...]:
        return tuple(rng.randbytes(3))

    image = Image.new("RGB", size, colour())
    for cells, share in ((4, 0.8), (16, 0.4), (64, 0.2)):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(cells * cells * 3))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), share)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(width), rng.randrange(height)
        radius = rng.randrange(8, max(9, min(size) // 5))
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((x - radius, y - radius, x + radius, y + radius), fill=colour())
    draw.text((width // 8, height // 3), "golden 0123456789\n" * 3, fill=colour())
    for x in range(width // 4, width // 2, 3):
        draw.line((x, height // 2, x + width // 9, height * 3 // 4), fill=colour())
    return image


def _encode(image: Image.Image, name: str, options: Mapping[str, object]) -> bytes:
    file = BytesIO()
    if name.endswith(".png"):
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def make_golden(
    network: nn.Module,
    preset: ImageClassification,
    labels: Sequence[str],
    files: Mapping[str, bytes] | None = None,
) -> Golden:
    """Drawn images, and those of `files`, with what the reference makes of them.

    Raises InvalidModel for a file that is no image, and if the network's answers are no numbers: no
    worker would ever start.
    """
    [unit] = preset.resize_size
    encoded = draw_images(unit) | dict(files or {})
    images = {name: _open(name, data) for name, data in encoded.items()}
    pixels = torch.stack([reference_pixels(image, preset) for image in images.values()])
    logits = reference_logits(network, preset, images.values())
    if not logits.isfinite().all():
        raise InvalidModel(
            "its answers are NaN, although each weight is a number: the training diverged or the "
            "file is damaged; take an earlier checkpoint"
        )
    names = tuple(labels[best] for best in logits.argmax(dim=1))
    return Golden(encoded, pixels, logits, names)


def _open(name: str, data: bytes) -> Image.Image:
    try:
        width, height = Image.open(BytesIO(data)).size
        if width * height <= MAX_PIXELS or name in DRAWN:
            return plain_image(data)
    except Exception as exc:  # as Pillow's errors are
        raise InvalidModel(f"--golden: {name} cannot be read as an image") from exc
    raise InvalidModel(f"--golden: {name} has {width}x{height} pixels, {MAX_PIXELS} are allowed")


def reference_pixels(image: Image.Image, preset: ImageClassification) -> Tensor:
    """RGB -> uint8 [3, crop, crop]: the preset as far as its crop."""
    resized = functional.resize(
        image, preset.resize_size, preset.interpolation, antialias=preset.antialias
    )
    return functional.pil_to_tensor(functional.center_crop(resized, preset.crop_size))


@torch.inference_mode()
def reference_logits(
    network: nn.Module, prepare: Callable[[Image.Image], Tensor], images: Iterable[Image.Image]
) -> Tensor:
    """RGB images -> float32 [N, C]; one by one, because they need the memory of a pass each."""
    network.eval()
    return torch.cat([network(prepare(image)[None]).float() for image in images])

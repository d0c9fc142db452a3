"""The images that a load generator sends: the JPEGs of a folder, or ones that it draws itself."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

SUFFIXES = (".jpg", ".jpeg")
DRAWN_IMAGES = 16
BOUNDARY = "benchmark-0c9f0f7a5d"


@dataclass(frozen=True)
class ImageRequest:
    """The body of a request with an image in it, as it is sent; `name` says which image."""

    name: str
    body: bytes
    content_type: str = "image/jpeg"


def load_images(folder: Path | None) -> list[ImageRequest]:
    """The JPEGs of a folder by name, or drawn ones, each as a body of its own.

    Raises FileNotFoundError if the folder has none.
    """
    if folder is None:
        return [ImageRequest(f"drawn-{seed}.jpg", draw_jpeg(seed)) for seed in range(DRAWN_IMAGES)]
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{folder} has no {' or '.join(SUFFIXES)} files")
    return [ImageRequest(path.name, path.read_bytes()) for path in paths]


def as_form(images: Sequence[ImageRequest], parts: Sequence[str] = ("file",)) -> ImageRequest:
    """Images in one multipart form, under the names `parts`; it has the name of the first."""
    form = [
        f"--{BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{part}"; filename="image.jpg"\r\n'
        f"Content-Type: {image.content_type}\r\n\r\n".encode()
        + image.body
        + b"\r\n"
        for part, image in zip(parts, images, strict=True)
    ]
    body = b"".join([*form, f"--{BOUNDARY}--\r\n".encode()])
    return ImageRequest(images[0].name, body, f"multipart/form-data; boundary={BOUNDARY}")


def draw_jpeg(seed: int) -> bytes:
    """About the size and bytes of a photograph in ImageNet; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 an image, not a secret
    size = (500 + rng.randint(-20, 20), 375 + rng.randint(-20, 20))
    image = Image.new("RGB", size)
    for cells, share in ((4, 1.0), (16, 0.5), (64, 0.3), (256, 0.15)):  # coarse to fine
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(cells * cells * 3))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), share)
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()

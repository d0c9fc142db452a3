"""The images that a load generator sends: the JPEGs of a folder, or ones that it draws itself."""

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

SUFFIXES = (".jpg", ".jpeg")
DRAWN_IMAGES = 16
BOUNDARY = "benchmark-0c9f0f7a5d"
COMMENT = b"\xff\xfe\x00\x12"  # a JPEG comment of 16 bytes


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


def as_form(
    images: Sequence[ImageRequest], parts: Sequence[str] = ("file",), subtype: str = "form-data"
) -> ImageRequest:
    """Images in one multipart form, under the names `parts`; it has the name of the first.

    With the subtype "mixed" the body is the same, and TorchServe leaves it to the handler.
    """
    form = [
        f"--{BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{part}"; filename="image.jpg"\r\n'
        f"Content-Type: {image.content_type}\r\n\r\n".encode()
        + image.body
        + b"\r\n"
        for part, image in zip(parts, images, strict=True)
    ]
    body = b"".join([*form, f"--{BOUNDARY}--\r\n".encode()])
    return ImageRequest(images[0].name, body, f"multipart/{subtype}; boundary={BOUNDARY}")


def in_forms(images: Sequence[ImageRequest], count: int, subtype: str) -> list[ImageRequest]:
    """A form for each image, with it and those that follow: `count` images in each."""
    names = [f"file{number}" for number in range(1, count + 1)]
    return [
        as_form(list(islice(cycle(images), start, start + count)), names, subtype)
        for start in range(len(images))
    ]


def unique_requests(
    images: Sequence[ImageRequest], count: int = 1, subtype: str = "mixed"
) -> Iterator[ImageRequest]:
    """Requests with `count` JPEGs without end, of which no two have the same bytes of an image.

    A comment in each JPEG makes the difference, so that a service that knows an image by its bytes
    has to decode every one. The pixels, and the names, are those of the images given.
    """
    source = os.urandom(8)  # no other process sends the same
    places = [comment_place(image.body) for image in images]
    numbers = itertools.count()

    def fresh() -> Iterator[ImageRequest]:
        for image, place in cycle(zip(images, places, strict=True)):
            comment = COMMENT + source + next(numbers).to_bytes(8, "big")
            yield replace(image, body=b"".join((image.body[:place], comment, image.body[place:])))

    jpegs = fresh()
    names = [f"file{number}" for number in range(1, count + 1)]
    while True:
        group = list(islice(jpegs, count))
        yield group[0] if count == 1 else as_form(group, names, subtype)


def comment_place(jpeg: bytes) -> int:
    """Where a JPEG may have a comment: after the segments of applications, which come first."""
    place = 2
    while jpeg[place] == 0xFF and 0xE0 <= jpeg[place + 1] <= 0xEF:
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return place


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

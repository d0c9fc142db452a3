"""Images of no class, drawn: noise, drawings and text; and others, harder to tell."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do"
).split()
QUALITIES = 70, 95  # of JPEG, which every other image is


def draw(kind: str, count: int) -> list[bytes]:
    """Images of a kind of KINDS as files, always the same ones: by turns PNG and JPEG."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        image, file = KINDS[kind](rng, *map(int, rng.integers(200, 700, 2))), BytesIO()
        if number % 2:
            image.save(file, "JPEG", quality=int(rng.integers(*QUALITIES)))
        else:
            image.save(file, "PNG")
        files.append(file.getvalue())
    return files


def _uniform(rng: Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _gaussian(rng: Generator, width: int, height: int) -> Image.Image:
    return _image(rng.normal(128, rng.uniform(20, 90), (height, width, 3)))


def _drawing(rng: Generator, width: int, height: int) -> Image.Image:
    """Three to eleven rectangles, ellipses, triangles and lines of one colour each."""
    image = Image.new("RGB", (width, height), _colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 12)):
        across, down = sorted(rng.integers(0, width, 2)), sorted(rng.integers(0, height, 2))
        box = [int(across[0]), int(down[0]), int(across[1]), int(down[1])]
        match int(rng.integers(4)):
            case 0:
                draw.rectangle(box, fill=_colour(rng))
            case 1:
                draw.ellipse(box, fill=_colour(rng))
            case 2:
                corners = rng.integers(0, (width, height), (3, 2))
                draw.polygon([(int(x), int(y)) for x, y in corners], fill=_colour(rng))
            case 3:
                draw.line(box, fill=_colour(rng), width=int(rng.integers(2, 20)))
    return image


def _text(rng: Generator, width: int, height: int) -> Image.Image:
    """Lines of words, dark on white or the other way round."""
    paper, ink = [((255,) * 3, (0,) * 3), ((20,) * 3, (230,) * 3)][int(rng.random() < 0.3)]
    image = Image.new("RGB", (width, height), paper)
    size = int(rng.integers(12, 40))
    for y in range(10, height, int(size * 1.3)):
        line = " ".join(rng.choice(WORDS, 30))
        ImageDraw.Draw(image).text((10, y), line, font=ImageFont.load_default(size), fill=ink)
    return image


def _clouds(rng: Generator, width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude over frequency."""
    across, down = np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))
    frequency = np.maximum(np.hypot(across, down), 1 / max(width, height))
    noise = np.fft.fft2(rng.normal(size=(3, height, width)))
    levels = np.fft.ifft2(noise / frequency).real.transpose(1, 2, 0)
    return _image(128 + 50 * (levels - levels.mean()) / levels.std())


def _gradient(rng: Generator, width: int, height: int) -> Image.Image:
    way = np.linspace(0, 1, width)[None, :, None]
    levels = way * _colour(rng) + (1 - way) * _colour(rng)
    return _image(np.broadcast_to(levels, (height, width, 3)))


def _colour(rng: Generator) -> tuple[int, ...]:
    return tuple(int(level) for level in rng.integers(0, 256, 3))


def _image(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


KINDS: dict[str, Callable[[Generator, int, int], Image.Image]] = {
    "uniform noise": _uniform,
    "gaussian noise": _gaussian,
    "drawings": _drawing,
    "text": _text,
    "clouds": _clouds,
    "gradients": _gradient,
}

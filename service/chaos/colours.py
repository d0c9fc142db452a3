"""A model that can be checked without downloads: red, green or blue, "fine-tuned" in seconds.

MobileNetV2 with random features and a last layer solved for: its answers are sure and right.
"""

import random
from io import BytesIO
from pathlib import Path

from PIL import Image

LABELS = ("red", "green", "blue")
WEIGHTS, LABELS_FILE = "colours.pth", "colours.txt"
RGB = ((220, 30, 30), (30, 200, 40), (40, 50, 220))


def picture(label: str, size: tuple[int, int] = (320, 240)) -> Image.Image:
    return Image.new("RGB", size, RGB[LABELS.index(label)])


def encoded(label: str, format: str = "JPEG", size: tuple[int, int] = (320, 240)) -> bytes:
    file = BytesIO()
    picture(label, size).save(file, format)
    return file.getvalue()


def make_weights(folder: Path) -> tuple[Path, Path]:
    """A state dict file and a labels file."""
    import torch  # seconds, which a campaign that is given its archive does not need
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(num_classes=len(LABELS)).eval()
    transform = torchvision.models.MobileNet_V2_Weights.DEFAULT.transforms()
    rng = random.Random(0)  # noqa: S311 no secret
    shades = [
        tuple(min(255, max(0, value + rng.randint(-30, 30))) for value in rgb)
        for rgb in RGB
        for _ in range(16)
    ]
    expected = 10.0 * torch.eye(3, dtype=torch.float64).repeat_interleave(16, dim=0)
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.new("RGB", (64, 64), shade)) for shade in shades])
        features = network.features(inputs).mean(dim=(2, 3)).double()
        head = torch.linalg.lstsq(features, expected, driver="gelsd").solution
        network.classifier[1].weight.copy_(head.T)
        network.classifier[1].bias.zero_()
    weights, labels = folder / WEIGHTS, folder / LABELS_FILE
    torch.save(network.state_dict(), weights)
    labels.write_text("\n".join(LABELS) + "\n")
    return weights, labels

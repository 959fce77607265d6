"""Learned perceptual distance of picture pairs (Zhang et al. 2018, version 0.1, AlexNet).

torchmetrics has it with backbones that torchvision downloads; here the backbone's weights come from a file. The linear
heads are those that torchmetrics includes. Shapes: B pairs of pictures, H, W pixels.
"""

from pathlib import Path

import torch
import torchmetrics.functional.image
from torch import Tensor, nn

from diffattn.metrics.extractors import read_tensors, weights_hash

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
MIN_SIDE = 31  # pixels, below it nothing is left for the second pooling
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in -1..1, as the heads were trained
HEADS = Path(torchmetrics.functional.image.__path__[0]) / "lpips_models" / "alex.pth"


def alexnet() -> nn.Sequential:
    """The convolutions of AlexNet, numbered as in torchvision, random weights."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


class Lpips:
    """`lpips(a, b)`: distance of every pair.

    Attributes:
        hash: sha256 of the backbone's weights.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        """Reads torchvision's AlexNet, a safetensors file or the `.pth` that torchvision downloads.

        Raises:
            ValueError: not such a file; the message says where to get it.
        """
        try:
            found = read_tensors(weights)
            features = {key.removeprefix("features."): x for key, x in found.items() if key.startswith("features.")}
            self.backbone = alexnet()
            self.backbone.load_state_dict(features)
            heads = read_tensors(HEADS)
        except (ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"LPIPS needs the weights of torchvision's AlexNet: {why}; get {ALEXNET_URL}") from error
        self.backbone = self.backbone.eval().requires_grad_(False).to(device)
        self.heads = [heads[f"lin{i}.model.1.weight"].to(device) for i in range(5)]
        self.device, self.hash = torch.device(device), weights_hash(self.backbone)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS [B] on the CPU, 0 if identical, of pictures [B, 3, H, W] in 0..1.

        Raises:
            ValueError: unequal shapes; pictures of fewer than 31 pixels a side; a network that gives NaN.
        """
        if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < MIN_SIDE:
            raise ValueError(f"LPIPS needs pairs of pictures [B, 3, H, W] of {MIN_SIDE} pixels a side or more, "
                             f"got {list(a.shape)} and {list(b.shape)}")  # fmt: skip
        with torch.inference_mode():
            pairs = zip(self.heads, self._stages(a), self._stages(b), strict=True)
            found = sum((head * (x - y).square()).sum(dim=1).mean(dim=(1, 2)) for head, x, y in pairs)
        distances = torch.as_tensor(found).float().cpu().clone()
        if not torch.isfinite(distances).all():
            raise ValueError("the LPIPS network gave values that are NaN or infinite: check its weights")
        return distances

    def _stages(self, x: Tensor) -> list[Tensor]:
        """Features after every rectifier, of unit length along the channels."""
        shift, scale = (x.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = ((2 * x - 1 - shift) / scale).float().to(self.device), []
        for layer in self.backbone:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt())
        return found

"""A small residual CNN for pictures of one domain. Its pooled features serve FID and KID offline.

Shapes: B pictures, S side of the pictures inside the model, d features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Classifier(ModelMixin, ConfigMixin):
    """`model(x)` gives logits, `model.features(x)` the features that they are computed from.

    A fixed stem of whitening filters halves the resolution (Coates & Ng 2012; Jordan 2024, arXiv 2404.00498), three
    stages of 3×3 convolutions with batch norm follow, each stage at half the resolution of the one before it.

    Args:
        num_classes: logits.
        input_size: side S that pictures are resized to; a multiple of 8.
        widths: channels of the three stages; the last is the number of features d.
        stem_filters: whitening filters on 4×4 patches, at most 48. Each gives two channels, one for either sign.
        domain: the pictures it was trained on; its features mean nothing for others.
        class_names: name of every class, or none.

    Raises:
        ValueError: naming the value that does not fit, and what is allowed.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        input_size: int = 32,
        widths: Sequence[int] = (48, 96, 192),
        stem_filters: int = 32,
        domain: str = "",
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if len(widths) != 3:
            raise ValueError(f"widths must be three numbers, got {tuple(widths)}")
        if input_size < 8 or input_size % 8:
            raise ValueError(f"input_size must be a multiple of 8, got {input_size}")
        if not 1 <= stem_filters <= 48:
            raise ValueError(f"stem_filters must be 1 to 48, the numbers in a 4x4 patch, got {stem_filters}")
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"class_names must be {num_classes} names or none, got {len(class_names)}")
        first, second, third = widths
        self.stem = nn.Conv2d(3, stem_filters, 4, stride=2, padding=1, bias=False).requires_grad_(False)
        self.stages = nn.Sequential(
            ConvNorm(2 * stem_filters, first),
            nn.MaxPool2d(2),
            ConvNorm(first, second),
            Residual(ConvNorm(second, second)),
            nn.MaxPool2d(2),
            ConvNorm(second, third),
            Residual(ConvNorm(third, third)),
        )
        self.head = nn.Linear(third, num_classes)

    @property
    def num_features(self) -> int:
        """d"""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Features averaged over the picture, none negative.

        Args:
            x: pictures [B, 3, H, W] in -1..1, of any size; resized to S×S, bilinear with antialiasing.

        Returns:
            [B, d]
        """
        size = self.config["input_size"]
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        white = self.stem(x)
        return self.stages(torch.cat((white, -white), dim=1).relu_()).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of pictures as `features` takes them."""
        return self.head(self.features(x))


class ConvNorm(nn.Sequential):
    """3×3 convolution, batch norm, ReLU: [B, a, h, w] -> [B, b, h, w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """x + f(x)"""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)

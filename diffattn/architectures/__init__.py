"""One file per diffusers attention layout or model family, never one per method."""

from torch import nn

from diffattn.architectures.base import Architecture
from diffattn.architectures.cascade import CASCADE_FAMILIES
from diffattn.architectures.diffusers_dit import Transformer2DArchitecture
from diffattn.architectures.joint import JOINT_FAMILIES
from diffattn.architectures.own_dit import SiTArchitecture
from diffattn.architectures.unet import UNetArchitecture
from diffattn.architectures.videos import VIDEO_FAMILIES

ARCHITECTURES: tuple[Architecture, ...] = (
    UNetArchitecture(),
    Transformer2DArchitecture(),
    SiTArchitecture(),
    *JOINT_FAMILIES,
    *VIDEO_FAMILIES,
    *CASCADE_FAMILIES,
)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture family of a denoiser.

    Raises:
        TypeError: not supported; the message names the model's class and all supported ones.
    """
    for architecture in ARCHITECTURES:
        if architecture.matches(model):
            return architecture
    supported = "; ".join(a.title for a in ARCHITECTURES)
    raise TypeError(
        f"{type(model).__name__} is not supported; supported: {supported}. How to add one: docs/extending.md, "
        "adding an architecture"
    )

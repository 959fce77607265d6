"""One file per diffusers attention layout or model family, never one per method."""

from torch import nn

from diffattn.architectures.base import Architecture
from diffattn.architectures.cascade import CASCADE_FAMILIES
from diffattn.architectures.diffusers_dit import Transformer2DArchitecture
from diffattn.architectures.joint import JOINT_FAMILIES
from diffattn.architectures.own_dit import SiTArchitecture
from diffattn.architectures.pictures import PICTURE_FAMILIES
from diffattn.architectures.plain_transformers import PlainTransformer, TokenTransformer
from diffattn.architectures.uncovered import NOT_COVERED
from diffattn.architectures.unet import UNetArchitecture
from diffattn.architectures.videos import VIDEO_FAMILIES

ARCHITECTURES: tuple[Architecture, ...] = (
    UNetArchitecture(),
    Transformer2DArchitecture(),
    SiTArchitecture(),
    *JOINT_FAMILIES,
    *VIDEO_FAMILIES,
    *CASCADE_FAMILIES,
    *PICTURE_FAMILIES,
    PlainTransformer(),
    TokenTransformer(),
)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture family of a denoiser.

    Raises:
        TypeError: nothing to accelerate in it, or not supported; the message says why, or names all supported classes.
    """
    for architecture in ARCHITECTURES:
        if architecture.matches(model):
            return architecture
    if reason := why_not_covered(model):
        raise TypeError(f"nothing to accelerate in {type(model).__name__}: {reason}")
    supported = "; ".join(a.title for a in ARCHITECTURES)
    raise TypeError(
        f"{type(model).__name__} is not supported; supported: {supported}. How to add one: docs/extending.md, "
        "adding an architecture"
    )


def why_not_covered(model: nn.Module) -> str | None:
    """Why a class of diffusers has nothing to accelerate; None for any other."""
    return next((NOT_COVERED[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in NOT_COVERED), None)

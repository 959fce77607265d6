"""A UNet with one level more, from a trained one: for pictures twice as large, the coarsest grid stays the same."""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DConditionModel
from torch import nn


def can_grow(widths: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether `wanted` is `widths` and one level more, as wide as the deepest."""
    return wanted == (*widths, widths[-1])


@torch.no_grad()
def add_level(small: UNet2DConditionModel, large: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the weights of `small` into `large`, which has one level more below the deepest. → `large`

    The middle block moves down to the new level. Transformer blocks that `small` lacks start as the identity: their
    last projection is zero.

    Raises:
        ValueError: `large` is not `small` and one level more.
    """
    widths, wanted = tuple(small.config["block_out_channels"]), tuple(large.config["block_out_channels"])
    if not can_grow(widths, wanted):
        raise ValueError(f"a UNet of widths {widths} can grow to {(*widths, widths[-1])}, not to {wanted}")
    for name, module in large.named_modules():
        if name.endswith(".proj_out") and isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    up = re.compile(r"^up_blocks\.(\d+)")  # numbered from the deepest level
    weights = {up.sub(lambda m: f"up_blocks.{int(m[1]) + 1}", name): w for name, w in small.state_dict().items()}
    unknown = large.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{len(unknown)} weights have no place in the larger UNet, such as {unknown[0]}")
    return large

"""Token merging (Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", 2023) as tomesd does it."""

from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .base import Draw, LeftOut, Setting, only_unet, self_attention


@contextmanager
def tome(ratio: float, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """`tomesd.apply_patch(pipe, ratio=...)` on the levels of the setting; everything else as it ships."""
    try:
        import tomesd
    except ImportError:
        raise LeftOut("tomesd is not installed: pip install --no-deps tomesd==0.1.3") from None
    unet = only_unet(pipe, "tomesd")
    blocks = {spec.name.removesuffix(".attn1") for spec, _ in self_attention(unet) if spec.level in setting.levels}

    def repeatable(**arguments: Any) -> Any:
        """Every run draws the same destinations, from the generator that tomesd keeps."""
        unet._tome_info["args"]["generator"] = torch.Generator(unet.device).manual_seed(0)
        return draw(**arguments)

    try:
        tomesd.apply_patch(unet, ratio=ratio, max_downsample=2 ** max(setting.levels))
        for name, module in unet.named_modules():
            info: Any = module.__dict__.get("_tome_info")
            if info is not None and name and name not in blocks:  # a level that is not compared merges nothing
                module.__dict__["_tome_info"] = ChainMap({"args": info["args"] | {"max_downsample": 0}}, info)
        yield repeatable
    finally:
        tomesd.remove_patch(unet)
        for module in unet.modules():
            module.__dict__.pop("_tome_info", None)

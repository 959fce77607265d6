"""DeepCache (Ma et al., CVPR 2024, arXiv 2312.00858): most steps re-use the deep features of an earlier one."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from .base import Draw, LeftOut, Setting, only_unet, restored
from .steps import FULL

TOLERANCE = 0.05
"""How far the share of full steps may be from that of 20 steps."""


@contextmanager
def deepcache(interval: int, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """The package's own helper with a full step every `interval` steps, all else as it ships (branch 0)."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise LeftOut(f"DeepCache cannot be used ({error}): pip install --no-deps DeepCache==0.1.1") from None
    full, usual = ceil(setting.steps / interval), ceil(FULL / interval)
    if abs(full / setting.steps - usual / FULL) > TOLERANCE:
        raise LeftOut(f"{full} of {setting.steps} steps would be full, of {FULL} steps {usual}: not representative")
    unet = only_unet(pipe, "DeepCache")
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    with restored(unet, "forward"):  # its own removal leaves bound methods on every module
        helper.enable()
        try:
            yield draw
        finally:
            helper.disable()

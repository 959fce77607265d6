"""Block caching with cache-dit (DBCache): steps in which the first block does what it did before skip the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .base import Draw, LeftOut, Setting, denoiser_of

WARM_UP = 2
"""Steps at the start of a run that are always computed; cache-dit's default of 8 is for longer runs."""


@contextmanager
def block_cache(threshold: float, pipe: Any, draw: Draw, setting: Setting) -> Iterator[Draw]:
    """`cache_dit.enable_cache` with one block that is always computed, and this threshold of its residual's change."""
    try:
        import cache_dit
    except ImportError as error:
        raise LeftOut(f"cache-dit cannot be used ({error}): pip install 'diffattn[peers]'") from None
    if getattr(pipe, "unet", None) is not None:
        raise LeftOut(f"cache-dit is made for transformers, not for {type(denoiser_of(pipe)).__name__}")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=WARM_UP
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield draw
    finally:
        cache_dit.disable_cache(pipe)

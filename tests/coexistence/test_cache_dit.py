"""cache-dit, which wraps the blocks of the transformer in its own."""

from typing import Any

import pytest
import torch
from support.coexistence import Subject, check, coexists, differ

STEPS = 6


def enable(subject: Subject) -> None:
    """Every other step runs the first block only."""
    cache_dit: Any = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e9, max_warmup_steps=0,
        max_continuous_cached_steps=1,
    )  # fmt: skip
    cache_dit.enable_cache(subject.target, cache_config=config)


def disable(subject: Subject) -> None:
    pytest.importorskip("cache_dit").disable_cache(subject.target)


@pytest.mark.slow
@coexists(
    "cache-dit",
    "before the patch",
    on=["SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="both take effect: fewer calls, all of them accelerated",
    needs="cache_dit",
)
def test_before(subject: Subject) -> None:
    exact, own = subject.draw(num_inference_steps=STEPS), subject.draw_patched(num_inference_steps=STEPS)
    enable(subject)
    cached, accelerated = check(subject, num_inference_steps=STEPS)
    differ(cached, exact)
    differ(accelerated, own)
    disable(subject)
    assert torch.equal(subject.draw(num_inference_steps=STEPS), exact)


@pytest.mark.slow
@coexists(
    "cache-dit",
    "after the patch",
    on=["SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the same pictures as in the other order; disabled, the patch's own; removed, the unpatched one",
    needs="cache_dit",
)
def test_after(subject: Subject) -> None:
    exact, own = subject.draw(num_inference_steps=STEPS), subject.draw_patched(num_inference_steps=STEPS)
    enable(subject)
    expected = subject.draw_patched(num_inference_steps=STEPS)
    disable(subject)
    handle = subject.patch()
    assert torch.equal(subject.draw(num_inference_steps=STEPS), own)
    calls = handle.report().calls_accelerated
    enable(subject)
    assert torch.equal(subject.draw(num_inference_steps=STEPS), expected)
    assert 0 < handle.report().calls_accelerated - calls < calls
    disable(subject)
    assert torch.equal(subject.draw(num_inference_steps=STEPS), own)
    handle.remove()
    assert torch.equal(subject.draw(num_inference_steps=STEPS), exact)

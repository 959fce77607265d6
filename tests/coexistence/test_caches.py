"""diffusers' caches, which skip layers or blocks in some calls: what they compute is accelerated, what they skip is not
called at all."""

from typing import Any

import diffusers
import torch
from support.coexistence import Loop, Subject, agree, check, coexists, differ

STEPS = 6


def time_of(subject: Subject) -> Any:
    """The time step under way, as caches ask for it."""
    return lambda: subject.time if isinstance(subject, Loop) else float(subject.target.current_timestep)


def check_cache(subject: Subject, config: Any) -> None:
    """In either order the same; fewer calls than without the cache; removed and disabled, all is as before."""
    exact, own = subject.draw(num_inference_steps=STEPS), subject.draw_patched(num_inference_steps=STEPS)
    subject.denoiser.enable_cache(config)
    cached, accelerated = check(subject, num_inference_steps=STEPS)
    differ(cached, exact)
    differ(accelerated, own)
    subject.denoiser.disable_cache()

    handle = subject.patch()
    assert torch.equal(subject.draw(num_inference_steps=STEPS), own)
    calls = handle.report().calls_accelerated
    subject.denoiser.enable_cache(config)
    assert torch.equal(subject.draw(num_inference_steps=STEPS), accelerated)
    assert 0 < handle.report().calls_accelerated - calls < calls
    subject.denoiser.disable_cache()
    assert torch.equal(subject.draw(num_inference_steps=STEPS), own)
    handle.remove()
    assert torch.equal(subject.draw(num_inference_steps=STEPS), exact)


@coexists(
    "`enable_cache`: pyramid attention broadcast",
    "before and after the patch",
    on=[
        "FluxTransformer2DModel",
        "WanTransformer3DModel",
        "CogVideoXTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "MochiTransformer3DModel",
        "AllegroTransformer3DModel",
        "LatteTransformer3DModel",
    ],
    holds="both take effect: fewer calls, all of them accelerated; disabled, the patch's own pictures",
)
def test_pyramid_attention_broadcast(subject: Subject) -> None:
    every = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 1000)}
    check_cache(subject, diffusers.PyramidAttentionBroadcastConfig(**every, current_timestep_callback=time_of(subject)))


@coexists(
    "`enable_cache`: FasterCache",
    "before and after the patch",
    on=[
        "FluxTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
    ],
    holds="both take effect, also where half of a batch is left out; disabled, the patch's own pictures",
)
def test_faster_cache(subject: Subject) -> None:
    distilled = "CogVideoX" not in type(subject.denoiser).__name__
    config: Any = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        spatial_attention_block_identifiers=("blocks",),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        is_guidance_distilled=distilled,
        current_timestep_callback=time_of(subject),
    )
    check_cache(subject, config)


@coexists(
    "`enable_cache`: first block cache",
    "before and after the patch",
    on=[
        "FluxTransformer2DModel",
        "QwenImageTransformer2DModel",
        "WanTransformer3DModel",
        "CogVideoXTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "MochiTransformer3DModel",
    ],
    holds="both take effect: fewer calls, all of them accelerated; disabled, the patch's own pictures",
)
def test_first_block_cache(subject: Subject) -> None:
    check_cache(subject, diffusers.FirstBlockCacheConfig(threshold=100.0))


@coexists(
    "`enable_cache`: TaylorSeer",
    "before and after the patch",
    on=["FluxTransformer2DModel", "WanTransformer3DModel", "CogVideoXTransformer3DModel"],
    holds="both take effect: fewer calls, all of them accelerated; disabled, the patch's own pictures",
)
def test_taylorseer(subject: Subject) -> None:
    check_cache(
        subject,
        diffusers.TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r".*\.attn1?"],  # its own list knows layers named attn only
        ),
    )


@coexists(
    "`enable_cache`: MagCache",
    "before and after the patch",
    on=["FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"],
    holds="both take effect: fewer calls, all of them accelerated; disabled, the patch's own pictures",
)
def test_mag_cache(subject: Subject) -> None:
    check_cache(
        subject,
        diffusers.MagCacheConfig(threshold=0.5, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    )


@coexists(
    "`enable_cache`: keys and values of the text",
    "before and after the patch",
    on=["NucleusMoEImageTransformer2DModel"],
    holds="the cache is exact, and the patch draws what it draws without it",
)
def test_text_kv_cache(subject: Subject) -> None:
    own = subject.draw_patched()
    subject.denoiser.enable_cache(diffusers.TextKVCacheConfig())
    agree(check(subject).accelerated, own)

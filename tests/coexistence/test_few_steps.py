"""Models of few steps, where caches have nothing to skip."""

import diffusers
import pytest
from support.coexistence import Subject, check, coexists


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4])
@coexists(
    "few-step models",
    "1, 2 and 4 steps without guidance (LCM, flow matching)",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="every layer is accelerated in every step",
)
def test_few_steps(subject: Subject, steps: int) -> None:
    if "UNet" in type(subject.denoiser).__name__:
        subject.target.scheduler = diffusers.LCMScheduler.from_config(subject.target.scheduler.config)
    guidance = {} if "Flux" in type(subject.target).__name__ else {"guidance_scale": 1.0}
    check(subject, num_inference_steps=steps, **guidance)
    with subject.patch() as handle:
        subject.draw(num_inference_steps=steps, **guidance)
        assert handle.report().calls_accelerated == steps * subject.num_layers

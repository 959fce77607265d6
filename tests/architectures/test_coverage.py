"""Every denoiser of diffusers is covered or has nothing to accelerate, so a new release shows its additions here."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import diffusers
import pytest
from diffusers import SanaControlNetModel, SanaTransformer2DModel

import diffattn
from diffattn.architectures import ARCHITECTURES, NOT_COVERED
from diffattn.architectures.denoisers import CONTROL, DENOISER, EXPERTS

ALLOWED = (
    "no quadratic self-attention",
    "one-dimensional",
    "KV cache, BlockMask or packed segments throughout",
    "temporal layers of a few frames",
)
"""How the reason of a class that is not covered may begin."""

NO_DENOISERS = ("models.autoencoders.", "models.condition_embedders.", "models.latent_upscaler.", "models.adapter")
"""Modules of diffusers whose classes surround a denoiser."""

ASIDE = {
    "AceStepAudioTokenDetokenizer": "decodes",
    "AceStepAudioTokenizer": "encodes",
    "AceStepConditionEncoder": "encodes conditions",
    "AudioLDM2ProjectionModel": "encodes text",
    "CLIPImageProjection": "encodes pictures",
    "ControlNetXSAdapter": "holds weights for UNetControlNetXSModel",
    "Ideogram4PromptEnhancerHead": "writes prompts",
    "MotionAdapter": "holds weights for UNetMotionModel",
    "ReduxImageEncoder": "encodes pictures",
    "StableAudio3DurationEmbedder": "encodes conditions",
    "StableAudioProjectionModel": "encodes text",
}
"""Classes elsewhere that are no denoisers -> what they do."""


def denoisers() -> dict[str, Any]:
    """Name -> class of every denoiser that diffusers exports."""
    exported = {name: getattr(diffusers, name) for name in dir(diffusers)}
    return {
        name: kind
        for name, kind in exported.items()
        if inspect.isclass(kind)
        and issubclass(kind, diffusers.ModelMixin)
        and kind is not diffusers.ModelMixin
        and not kind.__module__.removeprefix("diffusers.").startswith(NO_DENOISERS)
        and name not in ASIDE
        and "controlnets" not in inspect.signature(kind.__init__).parameters  # several in one
    }


def is_covered(kind: Any) -> bool:
    model = kind.__new__(kind)  # architectures tell a model by its class
    return any(architecture.matches(model) for architecture in ARCHITECTURES)


@pytest.mark.slow
def test_every_denoiser_is_covered_or_says_why_not() -> None:
    missing = [name for name, kind in denoisers().items() if not is_covered(kind) and name not in NOT_COVERED]
    assert not missing, f"no row in diffattn.architectures, and not in NOT_COVERED: {', '.join(missing)}"


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_exists_and_has_an_allowed_reason(name: str) -> None:
    assert name in denoisers()
    assert not is_covered(denoisers()[name])
    assert NOT_COVERED[name].startswith(ALLOWED)


@pytest.mark.parametrize("name", ASIDE)
def test_what_is_set_aside_exists(name: str) -> None:
    assert issubclass(getattr(diffusers, name), diffusers.ModelMixin)


SANA: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8,
    "sample_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("kind", [SanaTransformer2DModel, SanaControlNetModel])
def test_linear_attention_is_refused_with_the_reason(kind: Any) -> None:
    model = kind(**SANA)
    with pytest.raises(TypeError, match=f"nothing to accelerate in {kind.__name__}: no quadratic self-attention"):
        diffattn.patch(model)


ELSEWHERE = {
    "image_unet": "the deprecated Versatile Diffusion, whose pipelines are refused: they have no denoiser",
    "text_unet": "the deprecated Versatile Diffusion",
    "prior_prior": "the prior of Stable Cascade in one pipeline with its decoder: 576 tokens",
    "super_res_first": "UnCLIP: without attention",
    "super_res_last": "UnCLIP: without attention",
}
"""Parts of pipelines that are of a covered class and run exact -> why."""


@pytest.mark.slow
def test_no_denoiser_of_a_pipeline_is_overlooked() -> None:
    kinds = {kind for kind in denoisers().values() if is_covered(kind)}
    found: dict[str, set[str]] = {}
    for pipeline in (getattr(diffusers, name) for name in dir(diffusers)):
        if inspect.isclass(pipeline) and issubclass(pipeline, diffusers.DiffusionPipeline):
            for part in inspect.signature(pipeline.__init__).parameters.values():
                if kinds & {part.annotation, *get_args(part.annotation)}:
                    found.setdefault(part.name, set()).add(pipeline.__name__)
    assert {"unet", "transformer", "transformer_2", "controlnet"} <= set(found)
    overlooked = {
        name: where for name, where in found.items() if name not in {*DENOISER, *EXPERTS, *CONTROL, *ELSEWHERE}
    }
    assert not overlooked, f"attention of these parts of pipelines would run exact without a word: {overlooked}"

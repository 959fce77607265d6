"""Variants of guidance: more passes, more samples per pass, perturbed layers."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from support.coexistence import Subject, check, coexists, differ, reasons
from torch import Tensor


@pytest.mark.slow
@coexists(
    "classifier-free guidance",
    "on and off; in one pass, or in two (Flux)",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="every layer is accelerated in every pass, and guidance matters",
)
def test_classifier_free(subject: Subject) -> None:
    flux = "Flux" in type(subject.target).__name__
    off = {} if flux else {"guidance_scale": 1.0}
    on = {"negative_prompt": "a dog", "true_cfg_scale": 2.0} if flux else {"guidance_scale": 4.0}
    differ(check(subject, **on).accelerated, check(subject, **off).accelerated)


@pytest.mark.slow
@coexists(
    "`guidance_rescale`",
    "in a patched pipeline",
    on=["UNet2DConditionModel"],
    holds="every layer is accelerated, and the factor matters",
)
def test_guidance_rescale(subject: Subject) -> None:
    differ(check(subject, guidance_rescale=0.7).accelerated, subject.draw_patched())


@pytest.mark.slow
@coexists(
    "skip-layer guidance",
    "`skip_guidance_layers` in a patched pipeline",
    on=["SD3Transformer2DModel"],
    holds="every layer is accelerated wherever it runs, and the guidance matters",
)
def test_skip_layer(subject: Subject) -> None:
    own = subject.draw_patched()
    skipped: dict[str, Any] = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    differ(check(subject, **skipped).accelerated, own)


@pytest.mark.slow
@coexists(
    "perturbed-attention guidance (PAG)",
    "by the pipelines of PAG, which replace processors in every call",
    on=["UNet2DConditionModel", "SD3Transformer2DModel"],
    holds="the attention of guided layers is accelerated too, the perturbed one is the pipeline's; the scale matters",
)
def test_pag(subject: Subject) -> None:
    layers = "mid" if "UNet" in type(subject.denoiser).__name__ else "blocks.1"
    kind: Any = getattr(diffusers, type(subject.target).__name__.replace("Pipeline", "PAGPipeline"))
    parts = {name: x for name, x in subject.target.components.items() if name in inspect.signature(kind).parameters}
    pipe = kind(**parts, pag_applied_layers=[layers])
    pipe.set_progress_bar_config(disable=True)
    pag = Subject(pipe, subject.arguments)
    differ(check(pag, pag_scale=2.0).accelerated, check(pag, pag_scale=0.0).accelerated)


def modular(subject: Subject) -> Subject:
    """The parts of an SD3 pipeline in one that is made of blocks."""
    pipe: Any = diffusers.StableDiffusion3AutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in subject.target.components.items() if part is not None})
    pipe.set_progress_bar_config(disable=True)
    return Blocks(pipe, subject.arguments)


class Blocks(Subject):
    """A `ModularPipeline`."""

    def draw(self, **overrides: Any) -> Tensor:
        given = self.arguments | {"negative_prompt": "a dog", "generator": torch.Generator().manual_seed(0)} | overrides
        given = {name: given[name] for name in given if name not in ("return_dict", "output_type", "guidance_scale")}
        return self.target(**given, output="latents")


GUIDERS: dict[str, Any] = {
    "ClassifierFreeGuidance": {},
    "AdaptiveProjectedGuidance": {"eta": 0.0},
    "TangentialClassifierFreeGuidance": {},
}


@pytest.mark.slow
@coexists(
    "guiders of diffusers in a `ModularPipeline`",
    "classifier-free, projected, tangential",
    on=["SD3Transformer2DModel"],
    holds="`diffattn.patch` takes the pipeline like any other; every layer is accelerated",
)
def test_guiders(subject: Subject) -> None:
    pipe, drawn = modular(subject), []
    for name, options in GUIDERS.items():
        pipe.target.update_components(guider=getattr(diffusers, name)(guidance_scale=3.0, **options))
        drawn.append(check(pipe).accelerated)
        with pipe.patch() as handle:
            pipe.draw()
            assert all(call["noise_level"] is not None for call in handle.trace())
    differ(drawn[0], drawn[1])
    differ(drawn[0], drawn[2])


def guided(subject: Any, scale: float) -> Tensor:
    """A few steps under a guider that perturbs the attention of a block, as the blocks of pipelines use it."""
    case, model = subject.case, subject.target
    perturbed = diffusers.LayerSkipConfig([1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    guider: Any = diffusers.PerturbedAttentionGuidance(
        guidance_scale=3.0, perturbed_guidance_scale=scale, perturbed_guidance_config=perturbed,
        perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
    )  # fmt: skip
    given = case.inputs(2, torch.Generator().manual_seed(1))
    scheduler = case.scheduler()
    scheduler.set_timesteps(3)
    latents = given["hidden_states"]
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=3, timestep=t)
        batches = guider.prepare_inputs({"hidden_states": (latents, latents)})
        for batch in batches:
            guider.prepare_models(model)
            out = case.call(model, given | {"hidden_states": batch.hidden_states}, level=float(t) / 1000)
            batch.noise_pred = out
            guider.cleanup_models(model)
        latents = scheduler.step(guider(batches).pred, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.slow
@coexists(
    "guiders of diffusers",
    "perturbed attention",
    on=["QwenImageTransformer2DModel", "CogView4Transformer2DModel"],
    holds="layers run exact while the guider replaces their attention, and the report says why; the scale matters",
)
def test_perturbing_guider(subject: Subject) -> None:
    exact = guided(subject, 2.0)
    differ(exact, guided(subject, 0.0))
    handle = subject.patch()
    accelerated = guided(subject, 2.0)
    assert reasons(handle) == {"perturbed by a guider, which replaces its attention by the values"}
    report = handle.report()
    assert report.calls_passed_through == 2  # in a third call of two of the steps
    assert report.calls_accelerated == (3 * 2 + 2) * subject.num_layers - 2
    differ(accelerated, guided(subject, 0.0))
    differ(accelerated, exact)
    handle.remove()
    assert torch.equal(guided(subject, 2.0), exact)

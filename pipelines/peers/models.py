"""Pipelines around UNets of real sizes with random weights, without text encoder and VAE: whole sampling loops."""

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffattn.measure.denoiser_inputs import TEXT_TOKENS
from diffattn.measure.models import BenchmarkModel

LOOP = {"sampler": "DDIMScheduler", "guidance": 7.5}


def random_pipeline(model: BenchmarkModel, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline that draws latents from embeddings."""
    unet = model.build(device, dtype)
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    absent: dict[str, Any] = dict(vae=None, text_encoder=None, tokenizer=None)
    if _is_xl(unet):
        absent |= dict(text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
        pipe: Any = StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **absent)
    else:
        absent |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = StableDiffusionPipeline(unet=unet, scheduler=scheduler, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe: Any, size: int, pictures: int) -> dict[str, Any]:
    """Arguments of one run for square pictures of `size` pixels, `num_inference_steps` excepted.

    Guidance doubles the batch: one picture is a batch of 2.
    """
    config, rng = pipe.unet.config, torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(pipe.unet.device, pipe.unet.dtype)

    text = (pictures, TEXT_TOKENS, config.cross_attention_dim)
    found = {"prompt_embeds": noise(*text), "negative_prompt_embeds": noise(*text)}
    if _is_xl(pipe.unet):
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found |= {"pooled_prompt_embeds": noise(pictures, width)}
        found |= {"negative_pooled_prompt_embeds": noise(pictures, width)}
    return found | {
        "height": size,
        "width": size,
        "guidance_scale": LOOP["guidance"],
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }


def _is_xl(unet: Any) -> bool:
    return unet.config.addition_embed_type == "text_time"

"""Tiling and slicing of the VAE, which the denoiser does not see."""

import pytest
import torch
from support.coexistence import Subject, check, coexists, differ


@pytest.mark.slow
@coexists(
    "VAE tiling and slicing",
    "enabled before and after the patch",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the same tiled pictures in either order",
)
def test_vae(subject: Subject) -> None:
    decoded = {"output_type": "pt"}
    whole = subject.draw_patched(**decoded)
    vae = subject.target.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 16
    vae.enable_tiling()
    vae.enable_slicing()
    _, tiled = check(subject, **decoded)
    differ(tiled, whole)
    vae.disable_tiling()
    with subject.patch():
        assert torch.equal(subject.draw(**decoded), whole)
        vae.enable_tiling()
        assert torch.equal(subject.draw(**decoded), tiled)

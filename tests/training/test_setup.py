"""The autoencoder of a run: what is refused before anything is trained."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffattn.training.setup import open_vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_an_autoencoder_is_frozen(folder: Path) -> None:
    vae = open_vae(str(folder))
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


def test_missing_and_unexpected_weights_are_named(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    kept = load_file(file)
    kept["loss.weight"] = kept.pop("quant_conv.bias")
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: quant_conv\.bias; unexpected: loss\.weight"):
        open_vae(str(folder))


def test_what_is_not_an_autoencoder(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    for source in (folder, folder / "none", folder.parent):
        with pytest.raises(ValueError, match=r"data\.vae='.*' cannot be loaded as an AutoencoderKL"):
            open_vae(str(source))

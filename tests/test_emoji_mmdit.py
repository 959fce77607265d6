"""The embedded Stable Diffusion 3: a plain pipeline that draws what it was asked for, patched and unpatched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

import diffattn
from diffattn.drawing.loading import embedded_folder
from diffattn.machine import fastest_dtype
from diffattn.metrics.extractors import load_extractor
from diffattn.metrics.paired import foreground_psnr
from diffattn.metrics.reference import Reference

FOLDER = embedded_folder("emoji-mmdit")


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = diffattn.load_demo("emoji-mmdit", fastest_dtype(torch.device("cpu")))
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: Any, steps: int, seed: int = 0) -> Tensor:
    """Two pictures [2, 3, 512, 512] in 0..1."""
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    call = {"num_inference_steps": steps, "guidance_scale": 1.5, "generator": generators, "output_type": "pt"}
    return pipe(["crab", "unicorn"], **call).images.float()


def test_it_is_small_and_has_4096_tokens_beside_those_of_the_text(pipe: Any) -> None:
    assert isinstance(pipe, StableDiffusion3Pipeline)
    model = pipe.transformer
    assert (model.config.sample_size // model.config.patch_size) ** 2 == 4096
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 14e6


@pytest.mark.slow
def test_it_has_the_autoencoder_and_tokenizer_of_emoji_sd(pipe: Any) -> None:
    other: Any = diffattn.load_demo("emoji-sd", pipe.dtype)
    for name, weight in pipe.vae.state_dict().items():
        assert torch.equal(weight, other.vae.state_dict()[name])
    names: Path = FOLDER / "tokenizer" / "tokenizer.json"
    assert names.read_text() == (embedded_folder("emoji-sd") / "tokenizer" / "tokenizer.json").read_text()


def test_its_card_says_what_was_measured() -> None:
    figures, card = json.loads((FOLDER / "figures.json").read_text()), (FOLDER / "README.md").read_text()
    assert f"{figures['nearest_among_trained_percent']:g} % of {figures['trained_names']} names" in card
    assert f"{figures['psnr_to_real_db_median']:.1f} dB" in card


@pytest.mark.slow
def test_patched_it_draws_similar_pictures_near_the_true_ones(pipe: Any) -> None:
    exact = draw(pipe, 5)
    with diffattn.patch(pipe, min_tokens=0, max_head_error=0.5, calibrate=False) as patch:
        fast = draw(pipe, 5)
        assert patch.report().layers_accelerated == len(pipe.transformer.transformer_blocks)
    assert foreground_psnr(fast, exact).min() > 15  # far less than on emoji-sd: docs/benchmarks.md
    extractor, known = load_extractor("emoji-classifier"), Reference.load(FOLDER / "reference.safetensors").features
    assert known is not None

    def distance(pictures: Tensor) -> float:
        features = extractor((255 * pictures).round().byte())
        return torch.cdist(features.float(), known.float()).min(1).values.mean().item()

    noise = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    assert max(distance(exact), distance(fast)) < 0.4 * distance(noise)

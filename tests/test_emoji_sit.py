"""The embedded SiT on latents: it matches its card, and draws with all of its numbers of mediators."""

from typing import Any

import pytest
import torch
from torch import Tensor

import diffattn
from diffattn.drawing.loading import embedded_folder
from diffattn.evaluation.sit_quality import Drawing, draw_classes
from diffattn.metrics.extractors import load_extractor
from diffattn.metrics.reference import Reference
from diffattn.sampling import SiTPipeline


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    found = diffattn.load_demo("emoji-sit")
    assert isinstance(found, SiTPipeline)
    found.set_progress_bar_config(disable=True)
    return found


def test_it_is_small_has_elastic_mediators_and_1024_tokens(pipe: SiTPipeline) -> None:
    model = pipe.transformer
    assert model.mediators == (4, 16, 64)
    assert (model.config["sample_size"] // model.config["patch_size"]) ** 2 == 1024
    assert len(set(pipe.class_names.labels.values())) == model.config["num_classes"] == 202
    assert sum(path.stat().st_size for path in embedded_folder("emoji-sit").rglob("*") if path.is_file()) < 13e6


@pytest.mark.slow
def test_it_has_the_autoencoder_of_emoji_sd(pipe: SiTPipeline) -> None:
    other: Any = diffattn.load_demo("emoji-sd")
    for name, weight in pipe.vae.state_dict().items():
        assert torch.equal(weight, other.vae.state_dict()[name])


@pytest.mark.slow
def test_its_pictures_are_near_the_true_ones(pipe: SiTPipeline) -> None:
    extractor = load_extractor("emoji-classifier")
    reference = Reference.load(embedded_folder("emoji-sit") / "reference.safetensors")
    drawing = Drawing(samples=8, steps=6, guidance=1.5, seed=0, batch=4)
    drawn = torch.cat([extractor(pictures) for pictures, _ in draw_classes(pipe, drawing)])
    noise = extractor(torch.randint(0, 256, (8, 3, 512, 512), generator=torch.Generator().manual_seed(0)).byte())
    known = reference.features
    assert known is not None

    def distance(features: Tensor) -> float:
        return torch.cdist(features.float(), known.float()).min(1).values.mean().item()

    assert distance(drawn) < 0.3 * distance(noise)


@pytest.mark.slow
def test_every_number_of_mediators_draws_nearly_the_same_picture(pipe: Any) -> None:
    def draw(n: int) -> Tensor:
        pipe.transformer.set_num_mediators(n)
        generator = torch.Generator().manual_seed(0)
        return pipe(["crab", "unicorn"], num_inference_steps=6, generator=generator, output_type="latent").images

    most = draw(64)
    for n in (4, 16):
        other = draw(n)
        assert not torch.equal(other, most)
        assert (other - most).norm() / most.norm() < 0.25

"""The embedded SiT: it matches its card, and draws with all of its numbers of mediators."""

from typing import Any

import pytest
import torch
from torch import Tensor

import diffattn
from diffattn.drawing.loading import embedded_folder
from diffattn.evaluation.sit_quality import Drawing, draw_classes
from diffattn.metrics.extractors import load_extractor
from diffattn.sampling import SiTPipeline


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    found = diffattn.load_demo("cifar-sit")
    assert isinstance(found, SiTPipeline)
    found.set_progress_bar_config(disable=True)
    return found


def test_it_is_a_small_model_with_elastic_mediators_and_the_names_of_the_classes(pipe: SiTPipeline) -> None:
    assert pipe.transformer.mediators == (4, 16, 64)
    assert pipe.transformer.dtype == torch.float32
    assert sorted(pipe.get_label_ids(["airplane", "cat", "truck"])) == [0, 3, 9]
    weights = embedded_folder("cifar-sit") / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 13e6


@pytest.mark.slow
def test_the_classifier_recognises_far_more_than_chance_would(pipe: SiTPipeline) -> None:
    extractor: Any = load_extractor("cifar-classifier")
    hits = []
    with torch.no_grad():
        for pictures, labels in draw_classes(pipe, Drawing(samples=40, steps=10, guidance=1.5, seed=0, batch=20)):
            hits += (extractor.model.head(extractor(pictures)).argmax(1) == labels).tolist()
    assert len(hits) == 40
    assert sum(hits) / len(hits) > 0.25  # chance: 0.1


@pytest.mark.slow
def test_every_number_of_mediators_draws_nearly_the_same_picture(pipe: Any) -> None:
    def draw(n: int) -> Tensor:
        pipe.transformer.set_num_mediators(n)
        generator = torch.Generator().manual_seed(0)
        return pipe(["ship", "horse"], num_inference_steps=8, guidance_scale=1.5, generator=generator,
                    output_type="pt").images  # fmt: skip

    most = draw(64)
    for n in (4, 16):
        other = draw(n)
        assert not torch.equal(other, most)
        assert (other - most).norm() / most.norm() < 0.15


def test_the_preset_follows_the_noise_level(pipe: Any) -> None:
    with diffattn.patch(pipe, "mediator"):
        trace = pipe([3], num_inference_steps=10, output_type="latent", return_trace=True).trace
    phases = [call["phase"] for call in trace]
    assert phases == sorted(phases)
    assert set(phases) == {0, 1, 2}

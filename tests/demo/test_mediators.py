"""The demo's second part: the embedded SiT with all, dynamic and few mediators."""

import pytest
import torch

from diffattn.demo import PROMPTS, Demo, DemoSettings, Mediators
from diffattn.drawing.loading import load_demo

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_way_draws_the_pictures_of_the_pipeline() -> None:
    ready = Mediators(["crab", "lion"], 3, 5, CPU, torch.float32)
    drawn: list[int] = []
    most, dynamic, few = ready.run(lambda: drawn.append(1))
    assert len(drawn) == ready.num_pictures == 9
    assert most.pictures.shape == few.pictures.shape == (2, 3, 512, 512)
    pipe = load_demo("emoji-sit")
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.set_num_mediators(4)  # type: ignore[attr-defined]
    alone = pipe(["lion"], num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="pt").images  # type: ignore[operator]
    torch.testing.assert_close(few.pictures[1:], alone, atol=1e-4, rtol=0)
    for other in (dynamic, few):
        difference = (most.pictures - other.pictures).norm() / most.pictures.norm()
        assert 0 < difference < 0.2


@pytest.mark.slow
def test_a_model_without_these_classes_is_left_alone() -> None:
    settings = DemoSettings(steps=1, prompts=["no name of the model"], size=None)
    assert Demo(settings).second is None
    assert Demo(DemoSettings(steps=1, prompts=PROMPTS[:1], size=256)).second is None
    assert Demo(DemoSettings(steps=1, prompts=PROMPTS[:1], mediators=False)).second is None


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match="no such name"):
        Mediators(["no such name"], 1, 0, CPU, torch.float32)

"""Omitted arguments are not passed on; unusable pictures are noticed: NaN, infinite values, blanked pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LatentConsistencyModelPipeline, LCMScheduler
from PIL import Image
from support import faulty, tiny
from support.tiny_dit import tiny_dit

from diffattn.app.jobs.limits import Limits
from diffattn.app.jobs.snippet import snippet
from diffattn.drawing.batch import NotFinite, draw_batch
from diffattn.drawing.draw import generate, own_guidance, prepare
from diffattn.drawing.request import Picture, Request, record_of, request_of
from diffattn.drawing.sizes import default_size
from diffattn.sampling import SiTPipeline

SEED = 4
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture
def pipe(place: Path) -> Any:
    return tiny.pipeline("sd", place)


def draw(pipe: Any, **given: Any) -> Picture:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "a cat", "method": "none", "steps": 2, "seed": SEED}
    return next(generate(pipe, prepare(pipe, Request(**(fields | given)))[0]))


def own(pipe: Any, **given: Any) -> np.ndarray:
    """What the pipeline draws by itself."""
    output = pipe(**({"prompt": "a cat", **STEPS} | given), generator=torch.Generator().manual_seed(SEED))
    return np.asarray(output.images[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_without_options_the_picture_is_the_pipelines_own(place: Path, kind: str) -> None:
    pipe: Any = tiny.pipeline(kind, place)
    assert np.array_equal(np.asarray(draw(pipe).image), own(pipe))
    assert np.array_equal(np.asarray(draw(pipe, negative_prompt="").image), own(pipe, negative_prompt=""))


@pytest.mark.slow
def test_an_empty_negative_prompt_is_not_none_at_all(place: Path, tmp_path: Path) -> None:
    pipe: Any = tiny.pipeline("sdxl", place)
    plain, empty = draw(pipe), draw(pipe, negative_prompt="")
    assert not np.array_equal(np.asarray(plain.image), np.asarray(empty.image))
    for picture, said in ((plain, None), (empty, "")):  # a record written before this distinction holds ""
        picture.save(tmp_path / "x.png")
        record = json.loads(json.dumps(record_of(tmp_path / "x.png")))
        assert record["negative_prompt"] == said
        again = next(generate(pipe, request_of(record)))
        assert np.array_equal(np.asarray(again.image), np.asarray(picture.image))
        request = prepare(pipe, request_of(record))[0]
        found: dict[str, Any] = {"pipe": pipe, "torch": torch}
        exec(snippet(request).splitlines()[-1], found)
        assert np.array_equal(np.asarray(found["image"]), np.asarray(picture.image))


def test_an_empty_box_on_the_page_is_not_given() -> None:
    limits = Limits()
    assert limits.request("m", "a").negative_prompt is limits.request("m", "a", negative_prompt="").negative_prompt
    assert limits.request("m", "a", negative_prompt="").negative_prompt is None
    assert limits.request("m", "a", negative_prompt="red").negative_prompt == "red"


def test_guidance_that_is_not_given_is_the_pipelines_own(place: Path, pipe: Any) -> None:
    assert own_guidance(pipe) == 7.5
    assert own_guidance(tiny.pipeline("sdxl", place)) == 5.0
    assert own_guidance(SiTPipeline(tiny_dit(in_channels=3), FlowMatchEulerDiscreteScheduler(shift=1))) == 1.0
    assert own_guidance(pipe, "emoji-sd") == 1.5


def test_a_size_that_only_the_pipeline_names_is_its_own(place: Path) -> None:
    pipe: Any = tiny.pipeline("sdxl", place)
    pipe.unet.register_to_config(sample_size=None)
    assert default_size(pipe) == (tiny.SIZE, tiny.SIZE)


def test_a_pipeline_without_negative_prompts_draws_from_text(pipe: Any) -> None:
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    parts = dict(pipe.components) | {"scheduler": scheduler, "unet": tiny.unet(time_cond_proj_dim=8)}
    lcm: Any = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    lcm.set_progress_bar_config(disable=True)
    assert draw(lcm).record["negative_prompt"] is None
    with pytest.raises(ValueError, match=r"LatentConsistencyModelPipeline .* takes no negative_prompt"):
        draw(lcm, negative_prompt="red")


# Not a picture


SPOILT = {
    "NaN weights": lambda pipe: faulty.spoil_unet(pipe, torch.nan),
    "infinite weights": lambda pipe: faulty.spoil_unet(pipe, torch.inf),
    "NaN in the VAE alone": lambda pipe: faulty.spoil_vae(pipe, torch.nan),
    "infinite pixels, which would be clamped": lambda pipe: faulty.spoil_vae(pipe, torch.inf),
    "a half precision VAE that overflows": lambda pipe: pipe.vae.half() and faulty.spoil_vae(pipe, -torch.inf),
    "NaN from the text encoder": faulty.spoil_word,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")  # of a NaN that is cast to an integer
@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_finite_is_no_picture(pipe: Any, what: str) -> None:
    if "half" in what:
        pipe.to(torch.float16)
    SPOILT[what](pipe)
    with pytest.raises(NotFinite, match=rf"NaN or infinite values .*\(seed {SEED}, Stable"):
        draw(pipe, prompt="a z")
    assert not pipe.vae.decoder._forward_hooks
    assert not pipe.vae.decoder._forward_pre_hooks


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("vae", [True, False])
def test_a_sit_with_and_without_a_vae(vae: bool, value: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1)
    model = tiny_dit(in_channels=4 if vae else 3)
    pipe = SiTPipeline(model, scheduler, tiny.vae() if vae else None)
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, prompt="1")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("final_layer.linear.bias"))[0] = value
    with pytest.raises(NotFinite, match=r"SiTPipeline in float32\): check its weights"):
        draw(pipe, prompt="1")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["", "enable_slicing", "enable_tiling"])
def test_each_picture_of_a_batch_is_judged_alone(pipe: Any, change: str) -> None:
    faulty.spoil_word(pipe)
    if change:
        getattr(pipe.vae, change)()
        pipe.vae.tile_latent_min_size = 8
    batch = draw_batch(pipe, ["a cat", "a z", "a hat"], [0, 1, 2], STEPS)
    assert batch.finite == (True, False, True)
    assert batch.images[[0, 2]].isfinite().all()
    assert batch.images[1].isnan().all()
    alone = draw_batch(pipe, ["a hat"], [2], STEPS)
    assert torch.allclose(alone.images[0], batch.images[2], atol=1e-5)


def test_nothing_is_read_from_the_device_between_the_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    isfinite = torch.isfinite

    def counted(x: torch.Tensor) -> torch.Tensor:
        counts.append(1)
        return isfinite(x)

    monkeypatch.setattr(torch, "isfinite", counted)
    for steps in (2, 6):
        counts.clear()
        draw_batch(pipe, ["a cat"], [0], {"num_inference_steps": steps})
        assert len(counts) == 3  # latents, what the decoder gives, the picture


# Blanked


@pytest.mark.slow
def test_a_blanked_picture_says_so(pipe: Any, tmp_path: Path) -> None:
    clean = draw(pipe)
    assert (clean.blanked, clean.record["blanked"]) == (False, False)
    faulty.add_checker(pipe, blanks=clean.image)
    blanked, other = draw(pipe), draw(pipe, seed=SEED + 1)
    assert (blanked.blanked, other.blanked) == (True, False)
    assert not np.asarray(blanked.image).any()
    blanked.save(tmp_path / "x.png")
    assert record_of(tmp_path / "x.png")["blanked"] is True
    with Image.open(tmp_path / "x.png") as saved:
        assert saved.size == clean.image.size
    batch = draw_batch(pipe, ["a cat"] * 2, [SEED + 1, SEED], STEPS | {"negative_prompt": ""})
    assert batch.blanked == (False, True)


def test_a_request_is_not_changed_by_what_it_draws(pipe: Any) -> None:
    asked = Request("tiny", "a cat", method="none", steps=2)
    ready, _ = prepare(pipe, asked)
    assert ready == replace(asked, width=tiny.SIZE, height=tiny.SIZE, guidance=7.5)

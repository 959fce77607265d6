"""Drawing with diffusers' own DiT and PixArt: classes and texts, sizes, steps, guidance, and the page's worker."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, HeunDiscreteScheduler
from support import tiny, tiny_transformers, web
from support.drawing import draw

from diffattn.app.jobs import Drawn, JobProgress
from diffattn.app.jobs.preview import clean_estimate
from diffattn.drawing.classes import draws_classes
from diffattn.drawing.draw import call_arguments, generate, prepare
from diffattn.drawing.loading import load_pipeline
from diffattn.drawing.request import Request, record_of, request_of
from diffattn.evaluation import DrawConfig, EvaluateConfig, evaluate
from diffattn.tuning.tune import workload

EVERYWHERE = {"min_tokens": 0, "num_agents": 4, "agent_ratio": None, "max_head_error": 10.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT, saved as those on the hub are: its index names the classes, as `save_pretrained` does not."""
    place = tmp_path_factory.mktemp("models")
    tiny.pipeline("dit", place).save_pretrained(place / "dit")
    index = place / "dit" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": tiny_transformers.LABELS}))
    return place


@pytest.fixture(scope="module")
def dit(folder: Path) -> Any:
    found: Any = load_pipeline(str(folder / "dit"))
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def pixart() -> Any:
    """Of 256 pixels, one of the sizes that the pipeline knows: 32x32 latents."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8,  # type: ignore[arg-type]
    )  # fmt: skip
    found = tiny_transformers.pixart_pipeline(vae.eval(), sample_size=32)
    found.set_progress_bar_config(disable=True)
    return found


def request(prompt: str = "goldfish", **changes: Any) -> Request:
    return Request(**({"model": "tiny", "prompt": prompt, "steps": 3, "options": EVERYWHERE} | changes))


def hooks(pipe: Any) -> tuple[int, int]:
    return len(pipe.transformer._forward_hooks), len(pipe.transformer._forward_pre_hooks)


# DiT: classes


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("1", 1), ("goldfish", 1), ("Carassius auratus", 1), ("goldfish, Carassius auratus", 1), ("0", 0),
        ("tench", 0), ("tench, Tinca tinca", 0), ("Tinca tinca,tench", 0), ("toilet tissue", 999), ("7", 7), ("2", 2),
    ],
)  # fmt: skip
def test_a_dit_draws_a_class_by_id_or_name(dit: Any, prompt: str, label: int) -> None:
    assert isinstance(dit, DiTPipeline)
    assert draws_classes(dit)
    ready, _ = prepare(dit, request(prompt, method="none", options={}))
    assert call_arguments(dit, ready)["class_labels"] == [label]


def test_its_picture_is_what_the_pipeline_draws(dit: Any) -> None:
    plain = dit([1], num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(2)).images[0]
    assert np.array_equal(draw(dit, request(method="none", options={}, seed=2))[0], np.asarray(plain))
    patched = draw(dit, request(seed=2))[0]
    assert patched.shape == (tiny.SIZE, tiny.SIZE, 3)
    assert not np.array_equal(patched, np.asarray(plain))
    assert not np.array_equal(draw(dit, request("0", seed=2))[0], patched)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "gold fish"}, "unknown class name 'gold fish'; names are .*goldfish.*, or an id from 0 to 999"),
        ({"prompt": ""}, "unknown class name ''"),
        ({"prompt": "crane"}, r"the class name 'crane' has several ids: \[2, 3\]; give the id"),
        ({"prompt": "goldfish, tench"}, "unknown class name 'goldfish, tench'"),
        ({"prompt": "1000"}, "class ids are from 0 to 999, got 1000"),
        ({"negative_prompt": "cat"}, "draws classes and takes no negative_prompt"),
        ({"width": 64}, "DiTPipeline draws 32x32 pixels only, got 64x32"),
        ({"width": 64, "height": 64}, "DiTPipeline draws 32x32 pixels only, got 64x64"),
        ({"method": "mediator", "options": {}}, "nothing to patch"),
    ],
)
def test_what_a_dit_cannot_draw_is_refused_before_anything_is_patched(
    dit: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dit, request(**changes))
    assert hooks(dit) == (0, 0)


def test_guidance_needs_the_null_class_that_the_pipeline_takes() -> None:
    few = tiny_transformers.dit_pipeline(tiny.vae(), num_embeds_ada_norm=10)
    few.set_progress_bar_config(disable=True)
    few.labels.clear()
    with pytest.raises(
        ValueError, match=r"class 1000, which is not the null class of a model with 10 classes.* at most 1, got 4"
    ):
        prepare(few, request("3", guidance=4.0))
    assert prepare(few, request("3", method="none", options={}))[0].guidance == 1
    assert len(draw(few, request("3"))) == 1


def test_guidance_is_the_pipelines_own(dit: Any, pixart: Any) -> None:
    plain = request(method="none", options={})
    assert prepare(dit, plain)[0].guidance == 4.0
    assert prepare(pixart, plain)[0].guidance == 4.5
    assert prepare(pixart, replace(plain, guidance=2.0))[0].guidance == 2.0


# Steps are told without a callback


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_every_step_is_told_and_no_hook_stays(name: str, request_pipes: dict[str, Any]) -> None:
    pipe, steps = request_pipes[name], []
    ready, patch = prepare(pipe, request(num_images=2))
    list(generate(pipe, ready, lambda: steps.append(1)))
    assert len(steps) == 2 * 3
    assert patch is not None
    patch.remove()
    assert hooks(pipe) == (0, 0)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(generate(pipe, replace(ready, num_images=1), stop))
    assert hooks(pipe) == (0, 0)


@pytest.fixture
def request_pipes(dit: Any, pixart: Any) -> dict[str, Any]:
    return {"dit": dit, "pixart": pixart}


def test_a_step_of_a_second_order_scheduler_is_told_once(dit: Any) -> None:
    twin, steps, calls = DiTPipeline(**dit.components), [], []
    twin.set_progress_bar_config(disable=True)
    twin.scheduler = HeunDiscreteScheduler.from_config(dit.scheduler.config)
    ready, _ = prepare(twin, request("1", method="none", options={}, steps=4))
    with twin.transformer.register_forward_hook(lambda *_: calls.append(1)):
        list(generate(twin, ready, lambda: steps.append(1)))
    assert (len(steps), len(calls)) == (4, 7)


# PixArt: texts


@pytest.mark.slow
def test_a_pixart_draws_from_text(pixart: Any) -> None:
    assert not draws_classes(pixart)
    plain = pixart("a cat", num_inference_steps=3, guidance_scale=4.5, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(draw(pixart, request("a cat", method="none", options={}))[0], np.asarray(plain.images[0]))
    ready, patch = prepare(pixart, request("a cat"))
    assert (ready.width, ready.height) == (256, 256)
    assert patch is not None
    patched = np.asarray(next(generate(pixart, ready)).image)
    assert patch.report().layers_accelerated == 2
    patch.remove()
    assert not np.array_equal(patched, np.asarray(plain.images[0]))
    assert draw(pixart, request("a cat", width=128, height=256))[0].shape == (256, 128, 3)
    with pytest.raises(ValueError, match="width 100 is not a positive multiple of 8"):
        prepare(pixart, request("a cat", width=100))


def test_a_recipe_draws_a_class_again(dit: Any, tmp_path: Path) -> None:
    ready, patch = prepare(dit, request(seed=4))
    picture = next(generate(dit, ready))
    assert patch is not None
    patch.remove()
    picture.save(tmp_path / "x.png")
    record = record_of(tmp_path / "x.png")
    assert (record["pipeline"], record["prompt"], record["guidance"]) == ("DiTPipeline", "goldfish", 4.0)
    assert np.array_equal(draw(dit, request_of(record))[0], np.asarray(picture.image))


# The rest of the package


@pytest.mark.slow
def test_the_pages_worker_draws_a_class_below_the_models_folder(folder: Path) -> None:
    worker = web.tiny_worker(folder)
    assert "dit" in worker.models.names()
    assert worker.models.describe("dit").size == (tiny.SIZE, tiny.SIZE)
    asked = worker.limits.request("dit", "goldfish, Carassius auratus", steps=2, acceleration="agent/fast")
    events = list(worker.generate("a", replace(asked, options=EVERYWHERE)))
    assert isinstance(events[-1], Drawn)
    assert events[-1].pictures[0].image.size == (tiny.SIZE, tiny.SIZE)
    assert events[-1].request.guidance == 4.0
    assert events[-1].report is not None
    assert events[-1].report.layers_accelerated == 2
    assert any(event.preview is not None for event in events if isinstance(event, JobProgress))
    code = events[-1].code.replace("MODELS_DIR", str(folder))
    found: dict[str, Any] = {}
    exec(code, found)
    assert np.array_equal(np.asarray(found["image"]), np.asarray(events[-1].pictures[0].image))
    with pytest.raises(ValueError, match="draws 32x32 pixels only"):
        list(worker.generate("a", worker.limits.request("dit", "1", steps=2, width=64)))


def test_a_preview_of_a_dit_follows_the_class_and_not_its_absence(dit: Any) -> None:
    given: list[Any] = []

    def look(model: Any, args: Any, kwargs: Any, output: Any) -> None:
        given.append((args[0], kwargs["timestep"], output.sample))

    twin: Any = DiTPipeline(**dit.components)
    twin.set_progress_bar_config(disable=True)
    twin.scheduler = DDIMScheduler.from_config(dit.scheduler.config, set_alpha_to_one=True)
    with twin.transformer.register_forward_hook(look, with_kwargs=True):
        clean = twin([1], num_inference_steps=1, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
                     output_type="pt").images  # fmt: skip
    latents = clean_estimate(twin, *given[0], guidance=4.0)
    with torch.no_grad():
        pixels = twin.vae.decode(latents / twin.vae.config.scaling_factor).sample
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), clean)


@pytest.mark.slow
def test_pictures_of_a_dit_are_evaluated_by_class(dit: Any, tmp_path: Path) -> None:
    draw_config = DrawConfig(num_pictures=3, prompts=["goldfish", "7"], steps=2, guidance=4.0)
    given: dict[str, Any] = {"config": EvaluateConfig(), "acceleration": {"method": "agent", **EVERYWHERE}}
    found = evaluate(dit, None, folder=tmp_path / "run", draw=draw_config, paired=True, **given)
    assert found.scores["psnr"] > 0
    assert hooks(dit) == (0, 0)
    with pytest.raises(ValueError, match="draws 32x32 pixels only, got 64x32"):
        evaluate(dit, None, folder=tmp_path / "no", draw=replace(draw_config, width=64), paired=True, **given)


def test_a_dit_that_gives_no_latents_is_not_tuned(dit: Any, pixart: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("DiTPipeline cannot be tuned: it gives no latents")):
        workload(dit, ["1"], steps=2, max_error=0.1)
    assert workload(pixart, ["a cat"], steps=2, max_error=0.1).calls["exact runs"] == 2
    assert hooks(dit) == (0, 0)

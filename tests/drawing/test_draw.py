"""Loading pipelines by name, drawing with them, and the recipes in the pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DModel,
    WanPipeline,
)
from PIL import Image
from support import tiny, tiny_joint
from support.drawing import draw
from support.tiny_dit import tiny_dit

import diffattn
from diffattn.drawing.draw import generate, prepare
from diffattn.drawing.loading import EMBEDDED, load_pipeline
from diffattn.drawing.request import Request, record_of, request_of
from diffattn.drawing.sizes import check_size
from diffattn.sampling import SiTPipeline

EVERYWHERE = {"min_tokens": 0, "num_agents": 4, "agent_ratio": None, "max_head_error": 10.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion model, saved as users save theirs."""
    place = tmp_path_factory.mktemp("model")
    tiny.pipeline("sd", place / "tokenizer").save_pretrained(place / "sd")
    return place / "sd"


@pytest.fixture
def pipe(folder: Path) -> DiffusionPipeline:
    found = load_pipeline(str(folder))
    found.set_progress_bar_config(disable=True)
    return found


def request(**changes: object) -> Request:
    return Request(**({"model": "tiny", "prompt": "a cat", "steps": 3, "options": EVERYWHERE} | changes))  # type: ignore[arg-type]


# Loading


def test_stable_diffusion_3_loads_without_its_third_text_encoder(tmp_path: Path) -> None:
    tiny_joint.sd3_pipeline(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd3")
    assert json.loads((tmp_path / "sd3" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    pipe = load_pipeline(str(tmp_path / "sd3"))
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert pipe.text_encoder_3 is pipe.tokenizer_3 is None


@pytest.mark.slow
def test_a_folder_loads_as_its_own_class_in_one_precision(folder: Path) -> None:
    pipe = load_pipeline(str(folder), torch.bfloat16)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


@pytest.mark.slow
def test_half_precision_weights_load_in_float32(tmp_path: Path) -> None:
    tiny.pipeline("sd", tmp_path / "tokenizer").to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    pipe = load_pipeline(str(tmp_path / "half"))
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}  # type: ignore[attr-defined]


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "sd"
    shutil.copytree(folder, copied)
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"refused.*diffusion_pytorch_model\.bin.*pickle.*safetensors"):
        load_pipeline(str(copied))
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt.*pickle"):
        load_pipeline(str(tmp_path / "model.ckpt"))


def test_what_is_not_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a model.*no model_index\.json"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="single file"):
        load_pipeline(str(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="names no pipeline class"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ValueError, match=r"could not be loaded.*NoSuchPipeline"):
        load_pipeline(str(tmp_path))


def test_a_model_with_a_part_missing(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "sd"
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "unet")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_pipeline(str(copied))


def test_weights_that_were_cut_off_are_refused(folder: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "unet"):
        copied = tmp_path / part
        shutil.copytree(folder, copied)
        (file,) = (copied / part).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"{part}' could not be loaded"):
            load_pipeline(str(copied))


@pytest.mark.parametrize(
    "name", ["nothing", "a/b/c", "", "no such folder/x", "x" * 300, "x" * 300 + "/y", "𠮷" * 90 + "/y"]
)
def test_a_name_that_is_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=r"no model|not a model"):
        load_pipeline(name)


def test_a_hub_id_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else its client tries again for long
    with pytest.raises(ValueError, match="diffattn-tests/there-is-no-such-model"):
        load_pipeline("diffattn-tests/there-is-no-such-model")


# Requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"num_images": 0}, "num-images must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be at least 0"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
        ({"method": "none"}, "no preset, no options and no recipe"),
    ],
)
def test_bad_requests(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**changes)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (33, 32, "width 33 is not a positive multiple of 8 pixels; nearest: 32 or 40"),
        (32, 31, "height 31 is not a positive multiple of 8 pixels; nearest: 24 or 32"),
        (0, 32, "width 0 is not a positive multiple of 8 pixels; nearest: 8"),
        (4, 32, "width 4 is not a positive multiple of 8 pixels; nearest: 8"),
        (-8, 32, "width -8 is not a positive multiple of 8 pixels; nearest: 8"),
    ],
)
def test_sizes_the_vae_cannot_divide(pipe: DiffusionPipeline, width: int, height: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(pipe, request(width=width, height=height))
    with pytest.raises(ValueError, match=message):
        check_size(pipe, width, height)
    prepare(pipe, request())[1].remove()  # type: ignore[union-attr]  # nothing was patched before


def test_bad_methods(pipe: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=r"unknown method.*nothing.*agent"):
        prepare(pipe, request(method="nothing"))
    with pytest.raises(ValueError, match=r"unknown preset.*nothing.*balanced"):
        prepare(pipe, request(preset="nothing"))
    with pytest.raises(ValueError, match="unknown option nothing"):
        prepare(pipe, request(options={"nothing": 1}))


def test_pipelines_that_do_not_draw_from_text(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="StableDiffusionImg2ImgPipeline takes a picture"):
        prepare(tiny.pipeline("img2img", tmp_path), request())
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(TypeError, match="DDPMPipeline takes no prompt"):
        prepare(DDPMPipeline(unet, DDPMScheduler()), request())


def test_pipelines_that_draw_videos_are_refused_before_they_run() -> None:
    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer"))
    with pytest.raises(TypeError, match=r"WanPipeline draws videos.*diffattn\.patch\(pipe\) accelerates it"):
        prepare(WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts), request())


# Drawing


def test_an_embedded_model_brings_its_own_guidance() -> None:
    pipe = load_pipeline("emoji-sd")
    asked = Request(model="emoji-sd", prompt="", method="none")
    assert prepare(pipe, asked)[0].guidance == EMBEDDED["emoji-sd"].guidance != 7.5
    assert prepare(pipe, replace(asked, guidance=1.0))[0].guidance == 1.0


def test_the_defaults_are_filled_in(pipe: DiffusionPipeline) -> None:
    ready, patch = prepare(pipe, request())
    assert patch is not None
    assert (ready.width, ready.height, ready.preset) == (tiny.SIZE, tiny.SIZE, "balanced")
    assert ready.guidance == 7.5
    patch.remove()


@pytest.mark.slow
def test_patched_differs_and_none_does_not(pipe: DiffusionPipeline) -> None:
    plain = np.asarray(
        pipe("a cat", num_inference_steps=3, guidance_scale=7.5, generator=torch.Generator().manual_seed(0)).images[0]  # type: ignore[operator]
    )
    assert np.array_equal(draw(pipe, request(method="none", options={}))[0], plain)
    assert not np.array_equal(draw(pipe, request())[0], plain)


@pytest.mark.slow
def test_each_picture_can_be_drawn_again_alone(pipe: DiffusionPipeline) -> None:
    together = draw(pipe, request(num_images=3, seed=5))
    for i, picture in enumerate(together):
        assert np.array_equal(draw(pipe, request(seed=5 + i))[0], picture)
    assert not np.array_equal(together[0], together[1])


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "a very long prompt " * 20, "crème brûlée 🍮"])
def test_any_prompt_works(pipe: DiffusionPipeline, prompt: str) -> None:
    assert draw(pipe, request(prompt=prompt, width=40, height=24))[0].shape == (24, 40, 3)


@pytest.mark.slow
def test_every_step_is_told(pipe: DiffusionPipeline) -> None:
    steps = []
    ready, patch = prepare(pipe, request(num_images=2))
    list(generate(pipe, ready, lambda: steps.append(1)))
    assert len(steps) == 2 * 3
    assert patch is not None
    patch.remove()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "calls"), [(PNDMScheduler, 6), (HeunDiscreteScheduler, 9)])
def test_every_step_is_told_once_whatever_calls_it_takes(pipe: DiffusionPipeline, kind: Any, calls: int) -> None:
    told, made = [], []
    parts: Any = pipe
    parts.scheduler = kind.from_config(parts.scheduler.config, skip_prk_steps=True)
    ready, _ = prepare(pipe, request(method="none", options={}, steps=5))
    with parts.unet.register_forward_hook(lambda *_: made.append(1)):
        list(generate(pipe, ready, lambda: told.append(1)))
    assert (len(told), len(made)) == (5, calls)


def test_guidance_of_1_and_below_is_none_for_a_sit_too() -> None:
    sit = SiTPipeline(tiny_dit(in_channels=3), FlowMatchEulerDiscreteScheduler(shift=1))
    plain = request(prompt="1", method="none", options={})
    without, below, above = (draw(sit, replace(plain, guidance=g))[0] for g in (1.0, 0.0, 2.0))
    assert np.array_equal(below, without)
    assert not np.array_equal(above, without)
    assert prepare(sit, replace(plain, guidance=0.0))[0].guidance == 1  # as the picture's recipe and code say


@pytest.mark.slow
def test_a_failure_while_drawing_leaves_the_model_to_unpatch(pipe: DiffusionPipeline) -> None:
    before = draw(pipe, request(method="none", options={}))[0]
    ready, _ = prepare(pipe, request())

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate(pipe, ready, stop))
    diffattn.unpatch(pipe)
    assert np.array_equal(draw(pipe, request(method="none", options={}))[0], before)


# Recipes


@pytest.mark.slow
def test_a_record_draws_the_picture_again(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    asked = request(
        prompt="crème 🍮", negative_prompt="blue", num_images=2, seed=7, guidance=3.0, width=40, preset="fast"
    )
    ready, patch = prepare(pipe, asked)
    pictures = list(generate(pipe, ready))
    assert patch is not None
    patch.remove()
    pictures[1].save(tmp_path / "x.png")
    assert b"tEXtdiffattn\0" in (tmp_path / "x.png").read_bytes()
    record = record_of(tmp_path / "x.png")
    expected = {
        "model": "tiny", "prompt": "crème 🍮", "negative_prompt": "blue", "method": "agent", "preset": "fast",
        "options": EVERYWHERE, "seed": 8, "steps": 3, "guidance": 3.0, "width": 40, "height": tiny.SIZE,
        "scheduler": "DDIMScheduler", "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["diffattn"] == diffattn.__version__
    again = draw(pipe, request_of(record))
    assert len(again) == 1
    with Image.open(tmp_path / "x.png") as saved:
        assert np.array_equal(np.asarray(saved), again[0])


def test_pictures_without_a_record(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    for name, message in (("plain.png", "no diffattn record"), ("text.png", "not a picture"), ("no.png", "No such")):
        with pytest.raises(ValueError, match=message):
            record_of(tmp_path / name)

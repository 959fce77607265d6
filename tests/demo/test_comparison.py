"""The embedded model and the demo on it, end to end."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import diffattn
from diffattn.demo import PROMPTS, Demo, DemoResult, DemoSettings, run_demo
from diffattn.demo.comparison import SIDE
from diffattn.drawing.loading import embedded_folder, embedded_models
from diffattn.metrics.paired import psnr, ssim

SHORT = DemoSettings(steps=1, rounds=2, prompts=PROMPTS[:2], preset="fast", seed=3, guidance=2.0, dtype="float32",
                     mediators=False)  # fmt: skip
FIELDS = (
    "model method preset size steps seed dtype device baseline_s accelerated_s speedup psnr ssim layers_patched "
    "layers_accelerated prompts guidance rounds spread versions hardware verdict foreground_psnr"
)


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run_demo(SHORT)


@pytest.mark.slow
def test_the_embedded_model_is_a_stable_diffusion_pipeline() -> None:
    assert "emoji-sd" in embedded_models()
    pipe = diffattn.load_demo("emoji-sd")
    assert type(pipe) is StableDiffusionPipeline
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    drawn: Any = pipe(PROMPTS[0], num_inference_steps=1, output_type="np")
    image = drawn.images
    assert image.shape[0] == 1
    assert math.isfinite(image.mean())


def test_the_embedded_model_holds_no_pickle() -> None:
    suffixes = {path.suffix for path in embedded_folder("emoji-sd").rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes
    assert not suffixes & {".bin", ".ckpt", ".pt", ".pth", ".pkl"}


def test_an_unknown_model_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown embedded model 'sd-1\.5'; available: .*emoji-sd"):
        diffattn.load_demo("sd-1.5")


@pytest.mark.slow
def test_the_figures(result: DemoResult, tmp_path: Path) -> None:
    sheet, figures = result.save(tmp_path / "out")
    told = json.loads(figures.read_text())
    assert set(FIELDS.split()) <= set(told)
    expected = {"model": "emoji-sd", "method": "agent", "preset": "fast", "steps": 1, "seed": 3, "rounds": 2}
    assert {name: told[name] for name in expected} == expected
    assert (told["dtype"], told["device"]) == ("float32", "cpu") or torch.cuda.is_available()
    assert told["prompts"] == list(PROMPTS[:2])
    assert 0 < told["layers_accelerated"] <= told["layers_patched"]
    assert told["baseline_s"] > 0
    assert told["spread"][0] <= told["speedup"] <= told["spread"][1]
    assert told["psnr"] == pytest.approx(sum(pair["psnr"] for pair in told["pairs"]) / 2)
    inside = sorted(pair["foreground_psnr"] for pair in told["pairs"])
    assert told["foreground_psnr"] == pytest.approx([sum(inside) / 2, inside[0]])
    with Image.open(sheet) as picture:
        assert 2 * SIDE < picture.width < 2 * told["size"]
        assert 3 * SIDE < picture.height < 5 * SIDE
    assert told["mediators"] == []


@pytest.mark.slow
def test_the_second_part_is_on_the_sheet_and_among_the_figures() -> None:
    result = run_demo(replace(SHORT, rounds=1, prompts=PROMPTS[:1], mediators=True))
    assert 6 * SIDE < result.sheet.height < 6 * result.size
    rows = result.to_dict()["mediators"]
    assert [row["name"] for row in rows] == ["64 mediators", "dynamic", "4 mediators"]
    assert rows[0]["speedup"] == 1
    assert all(row["seconds"] > 0 for row in rows)
    dynamic, few = (f"{row['name']} {row['speedup']:.2f}x" for row in rows[1:])
    assert result.mediators_verdict == f"The SiT, against 64 mediators: {dynamic}, {few} the speed."


@pytest.mark.slow
def test_another_size_is_timed_and_not_judged() -> None:
    result = run_demo(replace(SHORT, size=192, steps=1, rounds=1, prompts=PROMPTS[:1]))
    told = result.to_dict()
    assert (told["size"], told["psnr"], told["ssim"], told["foreground_psnr"]) == (192, None, None, None)
    assert told["pairs"][0]["psnr"] is None
    assert "PSNR" not in result.verdict
    assert (told["mediators"], result.mediators_verdict) == ([], None)
    with pytest.raises(ValueError, match="width 100 is not a positive multiple of 8"):
        Demo(replace(SHORT, size=100))


def test_every_prompt_was_trained_on() -> None:
    card = json.loads((embedded_folder("emoji-sd") / "speed_quality.json").read_text())
    assert set(PROMPTS) <= {name for run in card["runs"] for name in run["prompts"]}
    assert len(set(PROMPTS)) >= 20


@pytest.mark.slow
def test_the_pictures_compared_are_those_of_the_pipeline(result: DemoResult) -> None:
    def draw(pipe: Any, prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SHORT.seed)
        arguments = {"num_inference_steps": SHORT.steps, "guidance_scale": SHORT.guidance, "generator": generator}
        return pipe(prompt, **arguments, output_type="pt").images.float().cpu()

    pipe = diffattn.load_demo("emoji-sd").to(result.device, result.dtype)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, PROMPTS[1])
    with diffattn.patch(pipe, "agent", preset="fast"):
        fast = draw(pipe, PROMPTS[1])
    found = result.pairs[1]
    assert found.prompt == PROMPTS[1]
    assert found.psnr == pytest.approx(psnr(fast, plain).item(), abs=0.01)
    assert found.ssim == pytest.approx(ssim(fast, plain).item(), abs=1e-3)
    assert result.size == plain.shape[-1]


@pytest.mark.slow
def test_every_picture_is_told() -> None:
    ready = Demo(DemoSettings(steps=1, rounds=1, prompts=PROMPTS[:1], preset="fast", size=192))
    pictures: list[int] = []
    ready.run(lambda: pictures.append(1))
    assert len(pictures) == ready.num_pictures == 4


@pytest.mark.slow
def test_it_says_so_if_nothing_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = tmp_path / "thresholds.json"
    never.write_text(json.dumps({"devices": {name: {"64": 10**9} for name in ("cpu", "cuda", "mps")}}))
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(never))
    ready = Demo(DemoSettings(steps=1, rounds=1, prompts=PROMPTS[:1], dtype="float32", mediators=False))
    with pytest.warns(diffattn.DiffAttnWarning, match="accelerates no layer"):
        result = ready.run()
    assert result.verdict.startswith("Nothing is faster: no layer ran accelerated")
    told = result.to_dict()
    assert told["layers_accelerated"] == 0
    assert told["psnr"] is None  # identical pictures: infinite
    assert told["ssim"] == pytest.approx(1, abs=1e-4)  # float32
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("speedup", "spread", "words"),
    [
        (1.3, (1.2, 1.4), "Faster: 1.30x"),
        (1.1, (0.9, 1.2), "Not clearly faster: 1.10x"),
        (0.9, (0.8, 0.95), "Nothing is faster: 0.90x"),
    ],
)
def test_the_verdict(result: DemoResult, speedup: float, spread: tuple[float, float], words: str) -> None:
    assert replace(result, speedup=speedup, spread=spread).verdict.startswith(words)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"rounds": 0}, {"prompts": ()}, {"guidance": math.nan}, {"seed": -1}, {"seed": 10**23}],
    ids=str,
)
def test_bad_settings(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        DemoSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"steps": 1001}, "1001 cannot be larger than"), ({"model": "cifar-sit"}, "unknown class name 'footprints'")],
    ids=str,
)
def test_what_the_model_cannot_draw_is_refused_before_the_first_picture(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Demo(replace(SHORT, **changes))

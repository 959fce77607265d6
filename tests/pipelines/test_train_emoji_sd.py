"""`pipelines/train_emoji_sd.py` end to end on eight generated pictures."""

import io
import json
import math
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

PROGRAM = Path(__file__).parents[2] / "pipelines" / "train_emoji_sd.py"
sys.path.insert(0, str(PROGRAM.parent))

from emoji_sd.data import held_out_of_vae, load_pictures, split_names  # noqa: E402
from emoji_sd.denoiser import build_unet, sample_timesteps  # noqa: E402
from emoji_sd.evaluate import best_guidance, closeness, hit_rate, nearest  # noqa: E402
from emoji_sd.grow import add_level  # noqa: E402
from emoji_sd.loop import Curves  # noqa: E402
from emoji_sd.precision import training_dtype  # noqa: E402
from emoji_sd.presets import PRESETS, Stage  # noqa: E402
from emoji_sd.stages import unet_files  # noqa: E402
from emoji_sd.strided_keys import stride_keys, strided  # noqa: E402
from emoji_sd.text import EOS, MAX_LENGTH, build_tokenizer, tokenize  # noqa: E402
from emoji_sd.vae import build_vae, encode, normalise  # noqa: E402
from train_emoji_sd import app  # noqa: E402
from training_loop import STOPPED, Budget  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight coloured pictures with names, as a zip."""
    path = tmp_path_factory.mktemp("data") / "pictures.zip"
    rng = np.random.default_rng(0)
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(8):
            picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            archive.writestr(f"{i}.png", buffer.getvalue())
            rows.append(json.dumps({"file_name": f"{i}.png", "text": f"red shape {i}"}))
        archive.writestr("metadata.jsonl", "\n".join(rows))
    return path


def run(*arguments: object) -> str:
    """Call the program in this process; → what it printed, without the progress bars."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def train_arguments(data: Path, folder: Path) -> list[object]:
    return [
        "train", "--data", data, "--preset", "tiny", "--work", folder / "work", "--out", folder / "model",
        "--steps", 4, "--save-minutes", 0,
    ]  # fmt: skip


def run_training(data: Path, folder: Path) -> Path:
    run(*train_arguments(data, folder))
    return folder / "model"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(data, tmp_path_factory.mktemp("whole"))


def test_the_export_is_a_plain_pipeline(trained: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    assert load_file(trained / "unet" / "diffusion_pytorch_model.safetensors").popitem()[1].dtype == torch.float16
    for prompt in ("red shape 0", "", "日本 ☂ \x00", "word " * 99):
        picture = pipe(prompt, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        assert picture.shape == (1, 64, 64, 3)
        assert np.isfinite(picture).all()


def test_the_export_loads_and_draws_without_a_word(trained: Path) -> None:
    program = (
        "import sys, warnings, diffusers, transformers\n"
        "from diffusers import StableDiffusionPipeline as P\n"
        "diffusers.logging.disable_progress_bar(); transformers.logging.disable_progress_bar()\n"
        "print('loading', file=sys.stderr)\n"
        "warnings.simplefilter('error')\n"
        "pipe = P.from_pretrained(sys.argv[1]); pipe.set_progress_bar_config(disable=True)\n"
        "pipe('red', num_inference_steps=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, trained], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split("loading\n")[1] == ""


def test_a_killed_run_goes_on_as_if_nothing_happened(data: Path, trained: Path, tmp_path: Path) -> None:
    victim = subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, train_arguments(data, tmp_path))], stdout=subprocess.DEVNULL
    )
    while victim.poll() is None and not (tmp_path / "work" / "unet-4.pt").exists():
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    resumed = run_training(data, tmp_path)
    once, twice = parts(trained), parts(resumed)
    for key in once:
        torch.testing.assert_close(once[key], twice[key], atol=1e-3, rtol=1e-2, msg=key)


def test_a_run_that_is_asked_to_stop_saves_and_says_so(data: Path, tmp_path: Path) -> None:
    arguments = [*train_arguments(data, tmp_path), "--steps", 10**6, "--save-minutes", 0.01]
    victim = subprocess.Popen([sys.executable, PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    while victim.poll() is None and not (tmp_path / "work" / "vae.pt").exists():
        time.sleep(0.05)
    victim.send_signal(signal.SIGTERM)
    said, _ = victim.communicate(timeout=60)
    assert victim.returncode == STOPPED
    step = torch.load(tmp_path / "work" / "vae.pt", weights_only=True)["progress"]["step"]
    assert f"vae: stopped and saved at step {step}" in said


def parts(folder: Path) -> dict[str, torch.Tensor]:
    files = ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
    return {f"{f}:{k}": v for f in files for k, v in load_file(folder / f"{f}.safetensors").items()}


def test_a_start_keeps_the_encoder_and_its_latents(data: Path, trained: Path, tmp_path: Path) -> None:
    run(*train_arguments(data, tmp_path), "--start", trained)
    before, after = parts(trained), parts(tmp_path / "model")
    assert before.keys() == after.keys()
    for key, value in before.items():
        frozen = "vae" in key and key.partition(":")[2].startswith(("encoder.", "quant_conv."))
        assert not frozen or torch.equal(value, after[key]), key
    for part in ("unet", "text_encoder", "vae/diffusion_pytorch_model:decoder"):
        assert any(not torch.equal(v, after[k]) for k, v in before.items() if k.startswith(part)), part
    images = load_pictures(data, 64).images
    first, second = (
        encode(StableDiffusionPipeline.from_pretrained(f).vae, images, 64, "cpu") for f in (trained, tmp_path / "model")
    )
    assert torch.equal(first[0], second[0])
    stored = torch.load(tmp_path / "work" / "latents-8-of-8.pt", weights_only=True)
    torch.testing.assert_close(stored, first[0], atol=1e-3, rtol=1e-2)  # in another memory format
    assert (trained / "tokenizer" / "tokenizer.json").read_text() == (
        tmp_path / "model" / "tokenizer" / "tokenizer.json"
    ).read_text()


def test_a_start_that_does_not_fit_is_named(data: Path, trained: Path, tmp_path: Path) -> None:
    for arguments, complaint in (
        (("--preset", "tiny", "--start", tmp_path), "is no exported pipeline"),
        (("--preset", "cpu", "--start", trained), "UNet channels (16, 32, 32) instead of (32, 64, 128)"),
        (("--preset", "tiny", "--start", trained, "--out", trained), "--out is the --start folder"),
        (("--preset", "cpu-512", "--minutes", 5), "budgets in samples"),
        (("--dtype", "float16"), "unknown dtype 'float16'; choose from auto, float32, bfloat16"),
    ):
        result = CliRunner().invoke(app, ["train", "--data", str(data), "--work", str(tmp_path), *map(str, arguments)])
        assert result.exit_code == 2
        assert complaint in " ".join(result.output.replace("│", " ").split())


def test_a_start_grows_by_the_level_that_the_preset_has_more(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tuple(Stage(8, 2, 1e-3, Budget(steps=1), muon=True, key_strides=strides) for strides in ((2, 2), ()))
    larger = replace(
        PRESETS["tiny"], unet_channels=(16, 32, 32, 32), unet_heads=(1, 2, 2, 2), stages=stages, vae_muon=True
    )
    monkeypatch.setitem(PRESETS, "larger", larger)
    run(
        "train", "--data", data, "--preset", "larger", "--work", tmp_path, "--start", trained, "--steps", 1,
    )  # fmt: skip
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe.unet.config.block_out_channels == [16, 32, 32, 32]
    assert {path.name for path in tmp_path.glob("unet-*.pt")} == {"unet-8.pt", "unet-8-2.pt"}
    assert pipe("red shape 0", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)


def test_growing_keeps_what_was_learned() -> None:
    torch.manual_seed(0)
    small = build_unet((16, 32, 32), (1, 2, 2), 32, 8).eval()
    large = build_unet((16, 32, 32, 32), (1, 2, 2, 2), 32, 8).eval()
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    add_level(small, large)
    after = large.state_dict()
    assert torch.equal(after["down_blocks.1.resnets.0.conv1.weight"], before["down_blocks.1.resnets.0.conv1.weight"])
    assert torch.equal(after["up_blocks.3.resnets.0.conv1.weight"], before["up_blocks.2.resnets.0.conv1.weight"])
    # the new transformer blocks of the level that had none pass their input on
    block: Any = large.down_blocks[2].attentions[0]  # type: ignore[index]
    x, text = torch.randn(1, 32, 2, 2), torch.randn(1, 3, 32)
    assert torch.equal(block(x, encoder_hidden_states=text).sample, x)
    with pytest.raises(ValueError, match=r"widths \(16, 32, 32, 32\) can grow to .*, not to \(16, 32, 32\)"):
        add_level(large, small)


def test_strided_keys_are_a_grid_of_the_tokens() -> None:
    torch.manual_seed(0)
    unet = build_unet((16, 32, 32), (1, 2, 2), 32, 8)
    attention: Any = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1  # type: ignore[index]
    x, text = torch.randn(2, 64, 16), torch.randn(2, 3, 32)
    grid = [row * 8 + column for row in (1, 3, 5, 7) for column in (0, 2, 4, 6)]
    expected, every = attention(x, encoder_hidden_states=x[:, grid]), attention(x)
    crossed = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2  # type: ignore[index]
    context = crossed(x, encoder_hidden_states=text)  # type: ignore[operator]
    stride_keys(unet, (2, 4))
    assert [p.stride for p in strided(unet)] == [2, 4, 4, 4, 2, 2]  # down 0 and 1, up 1, 1, 0, 0
    attention.processor.corner = (1, 0)
    assert torch.equal(attention(x), expected)
    assert torch.equal(crossed(x, encoder_hidden_states=text), context)  # type: ignore[operator]
    corners = set()
    for seed in range(20):
        attention.processor.draw_corner(torch.Generator().manual_seed(seed))
        corners.add(attention.processor.corner)
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}
    stride_keys(unet, ())
    assert torch.equal(attention(x), every)
    assert not strided(unet)


def test_every_stage_has_a_checkpoint_of_its_own() -> None:
    assert unet_files(PRESETS["cpu"]) == ["unet-16.pt", "unet-32.pt"]
    assert unet_files(PRESETS["cpu-512"]) == ["unet-64.pt", "unet-64-2.pt", "unet-64-3.pt"]


def test_bfloat16_trains_float32_weights(data: Path, trained: Path, tmp_path: Path) -> None:
    run(*train_arguments(data, tmp_path), "--dtype", "bfloat16", "--steps", 2)
    state = torch.load(tmp_path / "work" / "unet-8.pt", weights_only=True)
    for part in ("model", "ema"):
        assert {v.dtype for v in state[part].values() if v.is_floating_point()} == {torch.float32}
    assert {v.dtype for s in state["optimizer"]["state"].values() for v in s.values()} == {torch.float32}
    after = parts(tmp_path / "model")
    assert all(v.isfinite().all() for v in after.values())
    assert training_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


def test_export_takes_the_newest_checkpoints(data: Path, trained: Path, tmp_path: Path) -> None:
    said = run("export", "--preset", "tiny", "--work", trained.parent / "work", "--out", tmp_path / "model")
    assert "step 4 on 8×8 latents" in said
    wanted, found = parts(trained), parts(tmp_path / "model")
    assert all(torch.equal(v, found[k]) for k, v in wanted.items())
    run("export", "--preset", "tiny", "--work", tmp_path / "empty", "--start", trained, "--out", tmp_path / "start")
    assert "_name_or_path" not in "".join(path.read_text() for path in (tmp_path / "start").rglob("*.json"))
    found = parts(tmp_path / "start")
    assert all(torch.equal(v, found[k]) for k, v in wanted.items())
    result = CliRunner().invoke(app, ["export", "--preset", "tiny", "--work", str(tmp_path / "empty")])
    assert result.exit_code == 2
    assert "holds no tokenizer" in " ".join(result.output.replace("│", " ").split())


def test_evaluate_finds_the_best_guidance(data: Path, trained: Path) -> None:
    arguments = ["evaluate", "--data", data, "--preset", "tiny", "--model", trained, "--steps", 1, "--no-write"]
    figures = json.loads(run(*arguments, "--guidance", "1,2", "--sweep-names", 2, "--vae-pictures", 0))
    assert [(row["guidance"], row["trained_names"]) for row in figures["guidance_sweep"]] == [(1, 2), (2, 2)]
    assert figures["guidance"] in (1, 2)
    assert math.isfinite(figures["psnr_to_real_db_median"])
    figures = json.loads(run(*arguments, "--limit", 0))
    assert "trained_names" not in figures
    assert figures["vae_held_out_pictures"] == 2
    assert math.isfinite(figures["vae_held_out_foreground_psnr_db"])


def test_evaluate_writes_figures_and_grids(data: Path, trained: Path) -> None:
    samples = trained.parent / "samples"
    run("evaluate", "--data", data, "--preset", "tiny", "--model", trained, "--samples", samples, "--steps", 2)
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["trained_names"] == 4
    assert 0 <= figures["nearest_among_all_percent"] <= figures["nearest_among_trained_percent"] <= 100
    assert {p.name for p in samples.iterdir()} == {"grid.png", "heldout.png"}


def test_dry_run_prints_the_plan_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    plan = run("train", "--data", data, "--work", tmp_path / "work", "--minutes", 30, "--dry-run")
    assert "unet_channels" in plan
    assert not list(tmp_path.iterdir())


def test_unknown_preset_names_the_known_ones(data: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", str(data), "--work", str(tmp_path), "--preset", "huge"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "tiny" in result.output


def test_data(data: Path) -> None:
    pictures = load_pictures(data, 32)
    assert pictures.images.shape == (8, 3, 32, 32)
    assert pictures.select([3]).names == ["red shape 3"]
    assert split_names(8, 4, keep=True) == ([0, 4], [1, 2, 3, 5, 6, 7])
    assert split_names(8, 4, keep=False) == ([1, 2, 3, 5, 6, 7], [0, 4])
    assert held_out_of_vae(8, 4) == ([0, 2, 3, 4, 6, 7], [1, 5])
    assert held_out_of_vae(3, None) == ([0, 1, 2], [])


def test_a_preset_without_a_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="one stage or more"):
        replace(PRESETS["tiny"], stages=())


def test_measures(data: Path) -> None:
    images = load_pictures(data, 64).images
    assert hit_rate(nearest(images, images), list(range(8))) == 100
    real = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    real[..., :2, :2] = 0
    drawn = real.clone()
    drawn[..., 0, 0] = 51  # a fifth off in one of 64 pixels; with its margin the foreground has 16
    whole, inside = closeness(drawn, real)
    assert whole.item() == pytest.approx(-10 * math.log10(0.04 / 64), abs=1e-3)
    assert inside.item() == pytest.approx(-10 * math.log10(0.04 / 16), abs=1e-3)
    row: Any = lambda *values: dict(  # noqa: E731
        zip(("guidance", "nearest_among_trained_percent", "psnr_to_real_db_median"), values, strict=True)
    )
    assert best_guidance([row(1.5, 90.0, 19.0), row(2.0, 95.0, 17.0), row(2.5, 95.0, 18.0)]) == 2.5


def test_tokenizer_takes_any_text() -> None:
    tokenizer = build_tokenizer(["grinning face", "face with tears"], 560)
    assert len(tokenizer) <= 560
    assert tokenizer.tokenize("Face") == ["face</w>"]
    ids = tokenize(tokenizer, ["", "日本 ☂", "face " * 99])
    assert ids.shape == (3, MAX_LENGTH)
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist())[1:] == [EOS] * (MAX_LENGTH - 1)
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "日本 ☂"


def test_normalising_the_latents_leaves_the_pictures_alone() -> None:
    vae: Any = build_vae((8, 8), 1, 16).eval()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        std, mean = torch.std_mean(before.mean, dim=(0, 2, 3))
        normalise(vae, mean, std)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4))
    torch.testing.assert_close(after.std * std[:, None, None], before.std)


def test_schedules() -> None:
    curves = Curves(lr=1.0, warmup=0.1, final_lr=0.1, ema=0.9, final_ema=0.99)
    rates = [curves.rate(s / 100) for s in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert [curves.ema_decay(done) for done in (0, 0.5, 1)] == pytest.approx([0.9, 0.945, 0.99])
    assert Curves(lr=1.0, ema=0.9).ema_decay(1) == 0.9


@pytest.mark.parametrize(("towards_noise", "low", "high"), [(1.4, 560, 610), (1, 480, 520), (0.9, 455, 490)])
def test_timesteps_lean_as_the_stage_says(towards_noise: float, low: float, high: float) -> None:
    t = sample_timesteps(10_000, 1000, torch.Generator().manual_seed(0), towards_noise)
    assert t.min() >= 0
    assert t.max() <= 999
    assert low < t.float().mean() < high

"""`pipelines/train_emoji_sd.py` end to end on eight generated pictures."""

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

PROGRAM = Path(__file__).parents[2] / "pipelines" / "train_emoji_sd.py"
sys.path.insert(0, str(PROGRAM.parent))

from emoji_sd.data import batch_indices, load_pictures, split_names  # noqa: E402
from emoji_sd.denoiser import sample_timesteps  # noqa: E402
from emoji_sd.evaluate import hit_rate, nearest  # noqa: E402
from emoji_sd.loop import LoopConfig, Progress, learning_rate  # noqa: E402
from emoji_sd.text import EOS, MAX_LENGTH, build_tokenizer, tokenize  # noqa: E402
from emoji_sd.vae import build_vae, normalise  # noqa: E402
from train_emoji_sd import app  # noqa: E402


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
    """Call the program in this process; → what it printed."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


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
    pipe = StableDiffusionPipeline.from_pretrained(trained)
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
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        once, twice = (load_file(f / f"{part}.safetensors") for f in (trained, resumed))
        for key in once:
            torch.testing.assert_close(once[key], twice[key], atol=1e-3, rtol=1e-2, msg=f"{part} {key}")


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
    epoch = torch.cat([batch_indices(step, 2, 8, seed=0) for step in range(4)])
    assert sorted(epoch.tolist()) == list(range(8))
    found = nearest(pictures.images, pictures.images)
    assert hit_rate(found, list(range(8))) == 100


def test_tokenizer_takes_any_text() -> None:
    tokenizer = build_tokenizer(["grinning face", "face with tears"], 560)
    assert len(tokenizer) <= 560
    assert tokenizer.tokenize("Face") == ["face</w>"]
    ids = tokenize(tokenizer, ["", "日本 ☂", "face " * 99])
    assert ids.shape == (3, MAX_LENGTH)
    assert tokenizer.convert_ids_to_tokens(ids[0])[1:] == [EOS] * (MAX_LENGTH - 1)
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "日本 ☂"


def test_normalising_the_latents_leaves_the_pictures_alone() -> None:
    vae = build_vae((8, 8), 1, 16).eval()
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
    cfg = LoopConfig(batch=1, lr=1.0, steps=100, warmup=0.1, final_lr=0.1)
    rates = [learning_rate(Progress(step=s).done(cfg), cfg) for s in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert Progress(seconds=30).done(LoopConfig(batch=1, lr=1, minutes=1)) == pytest.approx(0.5)
    t = sample_timesteps(10_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 999
    assert t.float().mean() > 520  # leans towards noise

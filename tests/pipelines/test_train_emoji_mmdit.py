"""`pipelines/train_emoji_mmdit.py` end to end on eight generated pictures, of which four are trained on."""

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import load_file, save_file
from support.tiny_pictures import captioned, packed
from torch import Tensor, nn
from torch.nn.functional import pad
from typer.testing import CliRunner

from diffattn.drawing.loading import embedded_folder, load_pipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

from emoji_mmdit.denoiser import Denoiser, build_text_encoder, build_transformer, set_positions
from emoji_mmdit.export import build_scheduler
from emoji_mmdit.joint_keys import T5_TOKENS, use_fewer_keys
from emoji_mmdit.stages import load_parts
from train_emoji_mmdit import app
from training_loop import STOPPED

PARTS = embedded_folder("emoji-sd")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"red shape {i}" for i in range(8)]
    return packed(tmp_path_factory.mktemp("data") / "pictures.zip", captioned(names, 64))


def run(*arguments: object) -> str:
    """Call the program in this process; → what it printed."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def train(data: Path, work: Path, *more: object) -> None:
    arguments = ("--preset", "tiny", "--work", work, "--parts", PARTS, "--save-minutes", 0, "--dtype", "float32")
    run("train", "--data", data, *arguments, *more)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    train(data, work)
    return work / "model"


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """Random, with modulations that are not zero."""
    torch.manual_seed(0)
    parts = load_parts(PARTS)
    transformer = build_transformer(32, 2, 2, parts.text.config.hidden_size, 8)
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return Denoiser(transformer, build_text_encoder(parts.text))


@pytest.mark.slow
def test_the_export_is_a_plain_pipeline_that_matches_its_size(trained: Path) -> None:
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(trained, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    stored = load_file(trained / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert pipe.transformer.config.sample_size == 8
    assert "_name_or_path" not in "".join(path.read_text() for path in trained.rglob("*.json"))
    for prompt in ("red shape 0", "", "日本 ☂ \x00", "word " * 99):
        picture = pipe(prompt, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        assert picture.shape == (1, 64, 64, 3)
        assert np.isfinite(picture).all()


@pytest.mark.slow
def test_training_changes_all_parts_but_the_autoencoder(trained: Path) -> None:
    pipe: Any = load_pipeline(str(trained))  # knows by itself that there is no T5
    assert pipe.text_encoder_3 is None
    parts = load_parts(PARTS)
    for name, weight in parts.vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], weight)
    text = pipe.text_encoder.state_dict()
    assert all(torch.equal(text[name], weight) for name, weight in pipe.text_encoder_2.state_dict().items())
    assert any(not torch.equal(text[f"text_model.{name}"], weight) for name, weight in parts.text.state_dict().items())
    assert pipe.transformer.proj_out.weight.any()
    assert all(block.norm1.linear.weight.any() for block in pipe.transformer.transformer_blocks)


@pytest.mark.slow
def test_a_stopped_run_continues_as_if_nothing_had_happened(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training_loop

    update, done = training_loop.Trainee.update, []

    def stop_in_the_second_stage(self: Any, *arguments: Any) -> None:
        update(self, *arguments)
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training_loop.Trainee, "update", stop_in_the_second_stage)
        arguments = ("--preset", "tiny", "--work", tmp_path, "--parts", PARTS, "--save-minutes", 0)
        result = CliRunner().invoke(app, [*map(str, ("train", "--data", data, *arguments, "--dtype", "float32"))])
        assert result.exit_code not in (0, STOPPED)
    assert "step 4 on 4×4 latents" in run("export", "--preset", "tiny", "--work", tmp_path, "--parts", PARTS)
    train(data, tmp_path)
    once, twice = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors")
                   for f in (trained, tmp_path / "model"))  # fmt: skip
    for name, weight in once.items():
        torch.testing.assert_close(weight, twice[name], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
def test_a_training_begins_from_a_model_that_fits(data: Path, trained: Path, tmp_path: Path) -> None:
    train(data, tmp_path, "--start", trained, "--steps", 1)
    file = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(trained / file), load_file(tmp_path / "model" / file)
    changed = [(after[name] - weight).float().norm() for name, weight in before.items()]
    assert 0 < torch.stack(changed).norm() < 0.2 * torch.stack([w.float().norm() for w in before.values()]).norm()
    shutil.copytree(trained, tmp_path / "other")
    save_file(before | {"proj_out.bias": torch.zeros(3)}, tmp_path / "other" / file)
    for options, complaint in (
        (("--start", tmp_path / "other"), "1 weights differ, such as transformer.proj_out.bias"),
        (("--start", tmp_path / "none"), "is no exported pipeline"),
        (("--start", trained, "--out", trained), "--out is the --start folder"),
    ):
        arguments = ("--data", data, "--work", tmp_path, "--preset", "tiny", "--parts", PARTS, *options)
        done = CliRunner().invoke(app, ["train", *map(str, arguments)])
        assert done.exit_code == 2
        assert complaint in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_the_model_is_evaluated(data: Path, trained: Path, tmp_path: Path) -> None:
    said = run("evaluate", "--data", data, "--preset", "tiny", "--model", trained, "--samples", tmp_path,
               "--steps", 2, "--guidance", "1,1.5", "--shift", 3, "--limit", 2)  # fmt: skip
    assert '"shift": 3' in said
    assert '"trained_names": 2' in (trained / "figures.json").read_text()
    assert (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_what_cannot_be_trained_is_named(data: Path, tmp_path: Path) -> None:
    for arguments, complaint in (
        (("--preset", "large"), "unknown preset 'large'; choose from cpu, cpu-512, tiny"),
        (("--parts", tmp_path), "is no exported pipeline"),
        (("--dtype", "float16", "--parts", PARTS), "unknown dtype 'float16'"),
    ):
        done = CliRunner().invoke(app, ["train", "--data", str(data), "--work", str(tmp_path), *map(str, arguments)])
        assert done.exit_code == 2
        assert complaint in " ".join(done.output.replace("│", " ").split())
    with pytest.raises(SystemExit, match="2"):
        app(["export", "--work", str(tmp_path), "--parts", str(PARTS), "--preset", "tiny"])


def outputs(model: Denoiser, x: Tensor, ids: Tensor, t5: int) -> Tensor:
    """As the pipeline computes it, with `t5` zero tokens."""
    found = model.text(ids, output_hidden_states=True)
    words, pooled = found.hidden_states[-2], found.text_embeds
    context = pad(torch.cat([words, words], dim=-1), (0, 0, 0, t5))
    for block in model.transformer.transformer_blocks:
        block.attn.set_processor(JointAttnProcessor2_0())  # type: ignore[operator,union-attr]
    return model.transformer(x, context, torch.cat([pooled, pooled], dim=-1), torch.tensor([300.0, 700.0])).sample


@pytest.mark.slow
def test_one_token_with_the_weight_of_256_gives_their_outputs_and_gradients(denoiser: Denoiser) -> None:
    set_positions(denoiser.transformer, 8)
    torch.manual_seed(1)
    x, ids = torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2, 32))

    def gradients(compute: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        denoiser.zero_grad()
        out = compute()
        out.square().mean().backward()
        return out.detach(), {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}

    true, wanted = gradients(lambda: outputs(denoiser, x, ids, T5_TOKENS))
    use_fewer_keys(denoiser.transformer, 1)
    found, got = gradients(lambda: denoiser(x, torch.tensor([300.0, 700.0]), ids))
    torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-4)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name
    assert (outputs(denoiser, x, ids, 1) - true).norm() > 0.01 * true.norm()  # the weight matters


def test_keys_of_a_grid_stand_for_their_neighbours(denoiser: Denoiser) -> None:
    block: Any = denoiser.transformer.transformer_blocks[0]
    torch.manual_seed(2)
    x = torch.randn(1, 4, 4, 32).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)  # 2×2 alike
    text = torch.randn(1, 5, 32)
    use_fewer_keys(denoiser.transformer, 1)
    true = block.attn(hidden_states=x, encoder_hidden_states=text)
    processors = use_fewer_keys(denoiser.transformer, 2)
    for corner in ((0, 0), (1, 0)):
        processors[0].corner = corner
        for found, wanted in zip(block.attn(hidden_states=x, encoder_hidden_states=text), true, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    corners = set()
    for seed in range(20):
        processors[0].draw_corner(torch.Generator().manual_seed(seed))
        corners.add(processors[0].corner)
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_positions_of_small_latents_lie_in_the_middle_of_their_pixels() -> None:
    model: Any = build_transformer(32, 1, 2, 16, 8)
    natural = model.pos_embed.pos_embed.clone()
    set_positions(model, 8)
    torch.testing.assert_close(model.pos_embed.pos_embed, natural)
    set_positions(model, 4)
    first = model.pos_embed.pos_embed[0, 0]  # sines of the column, cosines of the column, the same of the row
    slowest, fastest = math.sin(0.5 * 10000 ** (-7 / 8)), math.sin(0.5)
    assert first[0].item() == pytest.approx(fastest, abs=1e-6)
    assert first[7].item() == pytest.approx(slowest, abs=1e-6)
    tokens = model.pos_embed(torch.zeros(1, 4, 4, 4)) - model.pos_embed.proj.bias
    torch.testing.assert_close(tokens, model.pos_embed.pos_embed)


def test_the_text_encoder_begins_as_it_was() -> None:
    start = load_parts(PARTS).text.eval()
    ids = torch.randint(0, 1000, (2, 32))
    found = build_text_encoder(start).eval()(ids)
    true = start(ids)
    assert torch.equal(found.last_hidden_state, true.last_hidden_state)
    torch.testing.assert_close(found.text_embeds, true.pooler_output)


def test_modulations_and_the_last_layer_begin_at_zero() -> None:
    model = build_transformer(32, 2, 2, 16, 8)
    zero = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if name.endswith("weight") and not p.any()}
    blocks = {f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in ("norm1", "norm1_context")}
    assert zero == {*blocks, "norm_out.linear", "proj_out"}


def test_the_scheduler_gives_pure_noise_first() -> None:
    scheduler: Any = build_scheduler(2.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0].item() == pytest.approx(1.0)
    assert scheduler.sigmas[-1].item() == 0.0

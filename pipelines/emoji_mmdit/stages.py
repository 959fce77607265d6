"""The stages in their order: latents of the given autoencoder, then MMDiT and text encoder on ever larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from emoji_sd.data import Pictures
from emoji_sd.loop import Curves, checkpoint_names, train
from emoji_sd.text import tokenize
from emoji_sd.vae import encode
from safetensors.torch import load_file
from torch import Tensor
from training_loop import Budget, LoopConfig
from transformers import CLIPTextModel, CLIPTokenizer

from diffattn.files import write_whole

from .denoiser import Denoiser, build_text_encoder, build_transformer, denoiser_loss, set_positions
from .joint_keys import use_fewer_keys
from .presets import Preset, Stage


@dataclass(frozen=True)
class Parts:
    """What is taken from `emoji-sd`: autoencoder and tokenizer as they are, the text encoder to begin from."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text: CLIPTextModel


@dataclass(frozen=True)
class Job:
    preset: Preset
    parts: Parts
    work: Path  # checkpoints, latents, sample grids of this run
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # what networks compute in
    seed: int = 0
    steps: int | None = None  # per stage, instead of the preset's budgets
    start: Path | None = None  # exported pipeline to begin from; None: fresh weights
    save_minutes: float = 3

    def loop(self, stage: Stage) -> LoopConfig:
        return LoopConfig(
            Budget(steps=self.steps) if self.steps else stage.budget, stage.batch, self.seed, self.device, clip=1.0,
            save_every=60 * self.save_minutes,
        )  # fmt: skip

    def checkpoints(self) -> list[tuple[Stage, Path]]:
        """Every stage, in its order, and its checkpoint."""
        stages = self.preset.stages
        names = checkpoint_names("mmdit", [stage.latent for stage in stages])
        return [(stage, self.work / name) for stage, name in zip(stages, names, strict=True)]


def load_parts(folder: Path) -> Parts:
    """Of a `StableDiffusionPipeline` folder, in float32.

    Raises:
        ValueError: no such pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no exported pipeline: it has no model_index.json")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    return Parts(pipe.vae.float().eval(), pipe.tokenizer, pipe.text_encoder.float())


def build_denoiser(job: Job) -> Denoiser:
    p = job.preset
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        text = build_text_encoder(job.parts.text)
        width = text.config.hidden_size
        transformer = build_transformer(p.width, p.layers, p.heads, width, p.size // 8)
        model = Denoiser(transformer, text)
    if job.start is not None:
        load_weights(model, job.start)
    return model.to(job.device)


POSITIONS = "transformer.pos_embed.pos_embed"

TRAINED = {"transformer": "transformer/diffusion_pytorch_model.safetensors", "text": "text_encoder/model.safetensors"}
"""Part of the denoiser -> its file in an exported pipeline."""


def load_weights(model: Denoiser, folder: Path) -> None:
    """Load the weights of an exported pipeline. Positions follow from the size of the latents, and stay.

    Raises:
        ValueError: no such pipeline, or one of another size.
    """
    own = model.state_dict()
    weights = {POSITIONS: own[POSITIONS]}
    for part, file in TRAINED.items():
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is no exported pipeline: it has no {file}")
        weights = {f"{part}.{name}": weight for name, weight in load_file(folder / file).items()} | weights
    wrong = sorted({k for k in own if k not in weights or weights[k].shape != own[k].shape} | (weights.keys() - own))
    if wrong:
        raise ValueError(f"{folder} does not fit the preset: {len(wrong)} weights differ, such as {wrong[0]}")
    model.load_state_dict(weights)


def stage_latents(job: Job, pictures: Pictures, side: int) -> Tensor:
    """Latents of the pictures [N, 4, side, side] as the denoiser meets them."""
    path = job.work / f"latents-{side}-of-{len(pictures)}.pt"
    if not path.exists():
        write_whole(path, partial(torch.save, encode(job.parts.vae, pictures.images, 8 * side, job.device)[0]))
    return torch.load(path, weights_only=True) * job.parts.vae.config["scaling_factor"]


def train_all(job: Job, pictures: Pictures) -> Denoiser:
    """Every stage starts from the averaged weights of the one before. → those of the last stage"""
    ids, empty = tokenize(job.parts.tokenizer, pictures.names), tokenize(job.parts.tokenizer, [""])[0]
    model = build_denoiser(job)
    for number, (stage, path) in enumerate(job.checkpoints()):
        set_positions(model.transformer, stage.latent)
        processors = use_fewer_keys(model.transformer, stage.key_stride)
        curves = Curves(stage.lr, final_lr=0.05, ema=stage.ema, muon=True)
        loss = denoiser_loss(
            stage_latents(job, pictures, stage.latent), ids, empty, stage, processors, job.seed + number,
            job.device, job.dtype,
        )  # fmt: skip
        model, _ = train(path.stem, model, loss, curves, job.loop(stage), path)
        model.requires_grad_(True)
    return model


def load_newest(job: Job) -> tuple[Denoiser, Stage, int]:
    """The averaged weights of the last stage that has any, that stage and its step.

    Raises:
        ValueError: no stage has been started.
    """
    for stage, path in reversed(job.checkpoints()):
        if not path.exists():
            continue
        state = torch.load(path, map_location=job.device, weights_only=True)
        model = build_denoiser(job)
        set_positions(model.transformer, stage.latent)
        model.load_state_dict(state["ema"])
        return model.eval(), stage, state["progress"]["step"]
    raise ValueError(f"{job.work} holds no checkpoint of the MMDiT")

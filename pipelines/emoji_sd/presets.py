"""Sizes and budgets of each way to train: one row per preset."""

from __future__ import annotations

from dataclasses import dataclass, replace

from training_loop import Budget


@dataclass(frozen=True)
class Stage:
    latent: int  # side of the latents; pictures are 8 times as wide
    batch: int
    lr: float
    budget: Budget
    final_lr: float = 0.02  # share of lr
    ema: float = 0.999  # decay of the averaged weights at the start …
    final_ema: float | None = None  # … and at the end; None: the same
    towards_noise: float = 1.4  # > 1: more samples at high noise, 1: evenly spread, < 1: more at low noise
    muon: bool = False  # Muon for matrices and kernels, AdamW for the rest; False: AdamW for all
    key_strides: tuple[int, ...] = ()  # self-attention of the first levels over every s-th key per axis: `strided_keys`


@dataclass(frozen=True)
class Preset:
    size: int  # side of the pictures
    every: int  # every n-th name …
    keep: bool  # … is trained on (True) or held out (False)
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_crops: tuple[int, ...]  # crop sizes that take turns
    vae_pixels: int  # pixels per step
    vae_lr: float
    vae_budget: Budget  # a step counts as many samples as crops of the first size make its pixels
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    text_width: int
    vocab: int
    stages: tuple[Stage, ...]
    vae_held_out: int | None = None  # every n-th picture is kept from the autoencoder; None: none
    vae_muon: bool = False  # as in `Stage`

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a preset needs one stage or more for the denoiser, got none")

    def scaled(self, minutes: float) -> Preset:
        """The same shares of another total budget.

        Raises:
            ValueError: budgets in samples, or no minutes.
        """
        budgets = [self.vae_budget, *(s.budget for s in self.stages)]
        spent = [budget.minutes for budget in budgets if budget.minutes is not None]
        if len(spent) < len(budgets):
            raise ValueError("this preset has budgets in samples, which minutes cannot scale; --steps tries it out")
        factor = minutes / sum(spent)
        vae, *rest = (Budget(minutes=part * factor) for part in spent)
        stages = tuple(replace(s, budget=b) for s, b in zip(self.stages, rest, strict=True))
        return replace(self, vae_budget=vae, stages=stages)


PRESETS = {
    # one GPU: 512×512 pictures, all names but every 20th; budgets estimated, not yet run
    "full": Preset(
        size=512, every=20, keep=False,
        vae_channels=(32, 64, 64, 64), vae_layers=1, vae_crops=(128, 128, 64, 128, 256, 512),
        vae_pixels=2**20, vae_lr=2e-3, vae_budget=Budget(minutes=20),
        unet_channels=(64, 128, 192), unet_heads=(2, 4, 6), text_width=192, vocab=2048,
        stages=(Stage(32, 128, 1e-3, Budget(minutes=60), 0.3), Stage(64, 64, 7e-4, Budget(minutes=60))),
    ),
    # two CPU cores: 256×256 pictures, every 8th name
    "cpu": Preset(
        size=256, every=8, keep=True,
        vae_channels=(16, 32, 64, 64), vae_layers=1, vae_crops=(64, 64, 32, 64, 64, 128),
        vae_pixels=2**16, vae_lr=2e-3, vae_budget=Budget(minutes=35),
        unet_channels=(32, 64, 128), unet_heads=(1, 2, 4), text_width=128, vocab=2048,
        stages=(
            Stage(16, 32, 1.5e-3, Budget(minutes=18), 0.4, 0.995),
            Stage(32, 16, 1e-3, Budget(minutes=24.6), 0.02, 0.995),
        ),
    ),
    # two CPU cores with bfloat16, from the weights that `cpu` gives: 512×512 pictures, the same names, one level more
    # below the deepest. About 50 minutes for the decoder, 75 for UNet and text encoder
    "cpu-512": Preset(
        size=512, every=8, keep=True,
        vae_channels=(16, 32, 64, 64), vae_layers=1, vae_crops=(128, 256, 128, 256, 512),
        vae_pixels=2**17, vae_lr=4e-4, vae_budget=Budget(samples=50_000), vae_held_out=16, vae_muon=True,
        unet_channels=(32, 64, 128, 128), unet_heads=(1, 2, 4, 4), text_width=128, vocab=2048,
        stages=(
            Stage(64, 8, 6e-4, Budget(samples=25_000), 0.25, 0.995, 0.998, 1.5, muon=True, key_strides=(4, 2)),
            Stage(64, 8, 1.5e-4, Budget(samples=7_000), 0.1, 0.997, 0.999, 1.1, muon=True, key_strides=(2,)),
            Stage(64, 8, 1.5e-5, Budget(samples=1_200), 0.2, 0.998, 0.999, 1.0, muon=True),
        ),
    ),
    # tests: seconds
    "tiny": Preset(
        size=64, every=2, keep=True,
        vae_channels=(8, 8, 8, 8), vae_layers=1, vae_crops=(32, 64),
        vae_pixels=2**12, vae_lr=2e-3, vae_budget=Budget(minutes=0.1), vae_held_out=4,
        unet_channels=(16, 32, 32), unet_heads=(1, 2, 2), text_width=32, vocab=600,
        stages=(Stage(4, 2, 1e-3, Budget(minutes=0.1), 0.3), Stage(8, 2, 1e-3, Budget(minutes=0.1))),
    ),
}  # fmt: skip

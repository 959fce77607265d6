"""Sizes and budgets of each way to train: one row per preset."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    latent: int  # side of the latents; pictures are 8 times as wide
    batch: int
    lr: float
    minutes: float
    final_lr: float = 0.02  # share of lr
    ema: float = 0.999  # decay of the averaged weights


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
    vae_minutes: float
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    text_width: int
    vocab: int
    stages: tuple[Stage, ...]

    def scaled(self, minutes: float) -> Preset:
        """The same shares of another total budget."""
        factor = minutes / self.minutes
        stages = tuple(replace(s, minutes=s.minutes * factor) for s in self.stages)
        return replace(self, vae_minutes=self.vae_minutes * factor, stages=stages)

    @property
    def minutes(self) -> float:
        return self.vae_minutes + sum(s.minutes for s in self.stages)


PRESETS = {
    # one GPU: 512×512 pictures, all names but every 20th; budgets estimated, not yet run
    "full": Preset(
        size=512, every=20, keep=False,
        vae_channels=(32, 64, 64, 64), vae_layers=1, vae_crops=(128, 128, 64, 128, 256, 512),
        vae_pixels=2**20, vae_lr=2e-3, vae_minutes=20,
        unet_channels=(64, 128, 192), unet_heads=(2, 4, 6), text_width=192, vocab=2048,
        stages=(Stage(32, 128, 1e-3, 60, 0.3), Stage(64, 64, 7e-4, 60)),
    ),
    # two CPU cores: 256×256 pictures, every 8th name
    "cpu": Preset(
        size=256, every=8, keep=True,
        vae_channels=(16, 32, 64, 64), vae_layers=1, vae_crops=(64, 64, 32, 64, 64, 128),
        vae_pixels=2**16, vae_lr=2e-3, vae_minutes=35,
        unet_channels=(32, 64, 128), unet_heads=(1, 2, 4), text_width=128, vocab=2048,
        stages=(Stage(16, 32, 1.5e-3, 18, 0.4, 0.995), Stage(32, 16, 1e-3, 24.6, 0.02, 0.995)),
    ),
    # tests: seconds
    "tiny": Preset(
        size=64, every=2, keep=True,
        vae_channels=(8, 8, 8, 8), vae_layers=1, vae_crops=(32, 64),
        vae_pixels=2**12, vae_lr=2e-3, vae_minutes=0.1,
        unet_channels=(16, 32, 32), unet_heads=(1, 2, 2), text_width=32, vocab=600,
        stages=(Stage(4, 2, 1e-3, 0.1, 0.3), Stage(8, 2, 1e-3, 0.1)),
    ),
}  # fmt: skip

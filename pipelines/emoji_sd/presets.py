"""Sizes and budgets of each way to train: one row per preset."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    latent: int  # side of the latents; pictures are 8 times as wide
    batch: int
    lr: float
    minutes: float | None = None  # budget in minutes of training …
    final_lr: float = 0.02  # share of lr
    ema: float = 0.999  # decay of the averaged weights
    samples: int | None = None  # … or in samples: a slow machine does not train less
    final_ema: float | None = None  # decay that `ema` grows to; None: constant
    towards_noise: float = 1.4  # > 1: more samples at high noise, 1: evenly spread, < 1: more at low noise


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
    vae_minutes: float | None
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    text_width: int
    vocab: int
    stages: tuple[Stage, ...]
    vae_samples: int | None = None  # instead of vae_minutes; crops of the first size
    vae_held_out: int | None = None  # every n-th picture is kept from the autoencoder; None: none

    def scaled(self, minutes: float) -> Preset:
        """The same shares of another total budget."""
        if self.minutes is None:
            raise ValueError("this preset has budgets in samples, which do not scale with minutes")
        factor = minutes / self.minutes
        stages = tuple(replace(s, minutes=s.minutes * factor) for s in self.stages)
        return replace(self, vae_minutes=self.vae_minutes * factor, stages=stages)

    @property
    def minutes(self) -> float | None:
        """Total; None with budgets in samples."""
        parts = [self.vae_minutes, *(s.minutes for s in self.stages)]
        return None if None in parts else sum(parts)


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
    # two CPU cores with bfloat16, from the weights that `cpu` gives: 512×512 pictures, the same names. About 40
    # minutes for the decoder and 6 hours for UNet and text encoder
    "cpu-512": Preset(
        size=512, every=8, keep=True,
        vae_channels=(16, 32, 64, 64), vae_layers=1, vae_crops=(128, 256, 128, 256, 512),
        vae_pixels=2**17, vae_lr=1e-3, vae_minutes=None, vae_samples=100_000, vae_held_out=16,
        unet_channels=(32, 64, 128), unet_heads=(1, 2, 4), text_width=128, vocab=2048,
        stages=(Stage(64, 8, 6e-4, ema=0.995, final_ema=0.999, samples=100_000, towards_noise=0.9),),
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

"""Sizes and budgets of each way to train: one row per preset."""

from __future__ import annotations

from dataclasses import dataclass

from training_loop import Budget


@dataclass(frozen=True)
class Stage:
    latent: int  # side of the latents, as many tokens per axis; pictures are 8 times as wide
    batch: int
    lr: float
    budget: Budget
    ema: float  # decay of the averaged weights
    logit_mean: float = 0.0  # noise levels are the sigmoid of a normal of this mean: above 0 more samples near noise
    key_stride: int = 1  # of the picture's keys in attention, per axis: `joint_keys`


@dataclass(frozen=True)
class Preset:
    size: int  # side of the pictures
    every: int  # every n-th name is trained on
    width: int
    layers: int
    heads: int
    shift: float  # of the scheduler's noise levels
    stages: tuple[Stage, ...]


PRESETS = {
    # two CPU cores with bfloat16
    "cpu": Preset(
        size=512, every=8, width=128, layers=7, heads=4, shift=2.0,
        stages=(
            Stage(16, 64, 1e-2, Budget(samples=25_600), 0.99),
            Stage(32, 32, 6e-3, Budget(samples=12_800), 0.99, 0.4, key_stride=2),
            Stage(64, 16, 4e-3, Budget(samples=4_000), 0.98, 0.7, key_stride=4),
        ),
    ),
    # from the weights that `cpu` gives: more at 512×512, then with more keys
    "cpu-512": Preset(
        size=512, every=8, width=128, layers=7, heads=4, shift=2.0,
        stages=(
            Stage(64, 16, 3e-3, Budget(samples=6_400), 0.99, 0.4, key_stride=4),
            Stage(64, 16, 6e-4, Budget(samples=1_200), 0.97, 0.0, key_stride=2),
        ),
    ),
    # tests: seconds
    "tiny": Preset(
        size=64, every=2, width=32, layers=2, heads=2, shift=2.0,
        stages=(
            Stage(4, 2, 1e-2, Budget(samples=8), 0.9),
            Stage(8, 2, 5e-3, Budget(samples=4), 0.9, 0.5, key_stride=2),
        ),
    ),
}  # fmt: skip

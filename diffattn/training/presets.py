"""Presets of training runs by name; each overrides the defaults."""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cifar-sit": {  # the larger sibling of the embedded model, for a GPU
        "data": {"size": 32},
        "model": {"patch_size": 2, "hidden_size": 192, "num_layers": 9, "num_heads": 6, "mediators": (4, 16, 64)},
        "optim": {"batch": 256, "lr": 1e-3, "schedule": "cosine", "final_lr": 0.02, "warmup": 500, "ema": 0.9995,
                  "betas": (0.9, 0.99), "weight_decay": 0.01},
        "objective": {"time": "logit_normal"},
        "run": {"steps": 60_000, "save_every": 2_000, "sample_every": 5_000, "guidance": 1.5},
    },
    "cifar-sit-cpu": {  # smaller, for two CPU cores and an hour: patches of 4, so 64 tokens
        "data": {"size": 32},
        "model": {"patch_size": 4, "hidden_size": 128, "num_layers": 8, "num_heads": 4, "mediators": (4, 16, 64)},
        "optim": {"batch": 64, "lr": 1.5e-3, "schedule": "cosine", "final_lr": 0.02, "warmup": 100, "ema": 0.998,
                  "betas": (0.9, 0.99), "weight_decay": 0.01},
        "objective": {"time": "logit_normal"},
        "run": {"steps": 4_000, "save_every": 200, "sample_every": 2_000, "guidance": 1.5, "log_every": 50},
    },
    "cifar-linear-cpu": {  # for comparing attentions: 256 tokens, ten minutes each in bf16 on a CPU core
        "data": {"size": 32},
        "model": {"patch_size": 2, "hidden_size": 128, "num_layers": 6, "num_heads": 4, "mediators": (16,),
                  "attention": "inline"},
        "optim": {"name": "muon", "batch": 32, "lr": 4e-3, "schedule": "cosine", "final_lr": 0.02, "warmup": 50,
                  "ema": 0.995, "betas": (0.9, 0.99), "weight_decay": 0.01},
        "objective": {"time": "logit_normal"},
        "run": {"steps": 800, "save_every": 200, "sample_every": 0, "guidance": 1.5, "log_every": 50,
                "precision": "bf16"},
    },
    "emoji-sit-cpu": {  # the embedded model, in bf16 on two CPU cores; `pipelines/train_emoji_sit.py` sets the sizes
        "data": {"label": "text", "size": 512, "flip": False},
        "model": {"patch_size": 2, "hidden_size": 160, "num_layers": 8, "num_heads": 4, "mediators": (4, 16, 64)},
        "optim": {"name": "muon", "batch": 16, "lr": 4e-3, "schedule": "cosine", "final_lr": 0.05, "warmup": 50,
                  "ema": 0.995, "betas": (0.9, 0.99), "weight_decay": 0.01},
        "objective": {"time": "logit_normal"},
        "run": {"steps": 900, "save_every": 50, "keep": 1, "sample_every": 0, "guidance": 1.5, "log_every": 25,
                "precision": "bf16"},
    },
    "sit-256": {  # the paper's setting: latents of 256 x 256 pictures, SiT-S/2, 400,000 steps
        "data": {"size": 256, "vae": "stabilityai/sd-vae-ft-ema", "in_memory": False},
        "model": {"size": "S/2", "learn_sigma": True},
        "optim": {"batch": 256, "lr": 1e-4},
        "run": {"steps": 400_000, "save_every": 10_000},
    },
}  # fmt: skip

"""Training runs of seconds: a tiny model, ten tiny pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffattn.training import checkpoints
from diffattn.training.config import TrainConfig
from diffattn.training.run import train
from diffattn.training.setup import set_up

TINY = [
    "data.size=8", "model.patch_size=2", "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2",
    "model.mediators=[1,4]", "optim.batch=4", "optim.lr=3e-3", "optim.ema=0.9", "optim.warmup=2", "run.sample_every=0",
    "run.log_every=2", "run.trackers=[]", "run.save_every=3", "run.steps=8",
]  # fmt: skip


def make_pictures(root: Path) -> Path:
    """Two classes of five pictures, one dark, one bright."""
    rng = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (root / name).mkdir()
        for i in range(5):
            pixels = rng.integers(low, low + 100, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def run(pictures: Path, out: Path, *settings: str, said: list[str] | None = None) -> Path:
    """Train; the folder of the pipeline."""
    config = TrainConfig.read(settings=[*TINY, *settings], options={"data.source": str(pictures), "run.out": str(out)})
    return train(set_up(config, "cpu", [].append if said is None else said.append))


def last(out: Path) -> tuple[dict, dict]:
    """Tensors and state of the latest checkpoint."""
    folder = checkpoints.latest(out / "checkpoints")
    assert folder is not None
    return checkpoints.load(folder)


def assert_same(one: Path, other: Path) -> None:
    """Model, average, optimizer and random states are equal bit for bit."""
    (a, a_state), (b, b_state) = last(one), last(other)
    for part in ("model", "ema", "optimizer"):
        assert a[part].keys() == b[part].keys()
        different = [name for name in a[part] if not torch.equal(a[part][name], b[part][name])]
        assert not different, f"{part}: {different}"
    assert a["optimizer"]
    assert a_state["ema_step"] == b_state["ema_step"]

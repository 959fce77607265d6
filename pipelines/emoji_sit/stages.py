"""How `emoji-sit` is trained: its data, and one run of `diffattn train` after the other, each at a larger size."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffattn.data.indexes import rows_of_jsonl
from diffattn.drawing.loading import embedded_folder
from diffattn.files import decode_text, write_whole
from diffattn.training.config import TrainConfig
from diffattn.training.run import train
from diffattn.training.setup import set_up

EVERY = 8  # of all names, as for emoji-sd
PRESET = "emoji-sit-cpu"
INDEX = "metadata.jsonl"


@dataclass(frozen=True)
class Stage:
    size: int  # side of the pictures; latents have an eighth
    batch: int
    steps: int
    lr: float
    ema: float
    position_scale: float = 1.0
    logit_mean: float = 0.0  # below 0: more samples near noise, of which a larger picture needs more for its outline

    def settings(self) -> list[str]:
        return [f"data.size={self.size}", f"optim.batch={self.batch}", f"run.steps={self.steps}",
                f"optim.lr={self.lr}", f"optim.ema={self.ema}", f"model.position_scale={self.position_scale}",
                f"objective.logit_mean={self.logit_mean}"]  # fmt: skip


STAGES = (
    Stage(128, 64, 560, 1e-2, 0.99),  # 64 tokens
    Stage(256, 32, 1000, 6e-3, 0.995),  # 256
    Stage(512, 16, 900, 4e-3, 0.995, position_scale=0.5, logit_mean=-0.7),  # 1,024; positions as at 256
)


def make_data(source: Path, folder: Path, every: int = EVERY) -> Path:
    """A folder of every n-th picture of the zip, each of them a class, in a layout that `diffattn train` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source) as archive:
        rows = rows_of_jsonl(decode_text(archive.read(INDEX)))[::every]
        for row in rows:
            (folder / row["file_name"]).write_bytes(archive.read(row["file_name"]))
    lines = [json.dumps({"file_name": row["file_name"], "text": row["text"]}) + "\n" for row in rows]
    write_whole(folder / INDEX, lambda part: part.write_text("".join(lines), encoding="utf-8"))
    return folder


def configs(data: Path, work: Path, stages: tuple[Stage, ...], settings: list[str]) -> list[TrainConfig]:
    """The runs, each of which starts from the pipeline of the one before.

    Args:
        data: made by `make_data`.
        work: holds a folder per size.
        stages: of the training, in their order.
        settings: "section.field=value", the same for all stages.
    """
    found, start = [], None
    for stage in stages:
        out = work / str(stage.size)
        options = {
            "data.source": str(data),
            "data.vae": str(embedded_folder("emoji-sd") / "vae"),
            "data.cache": str(data.parent / f"latents-{stage.size}"),
            "model.start": start,
            "run.out": str(out),
        }
        found.append(TrainConfig.read(PRESET, None, [*stage.settings(), *settings], options))
        start = str(out / "pipeline")
    return found


def train_all(runs: list[TrainConfig], device: str, say: Callable[[str], None]) -> Path:
    """Train one after the other; a finished run is not repeated. Returns the last pipeline's folder."""
    folder = Path()
    for config in runs:
        out = Path(config.run.out)
        folder = out / "pipeline"
        if folder.exists():
            say(f"{out} is complete")
            continue
        folder = train(set_up(config, device, say))
    return folder

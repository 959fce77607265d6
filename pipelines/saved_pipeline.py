"""How a trained pipeline is written: beside its folder, then swapped in, so that a reader never meets half a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

SHARD = "14MB"


def swap_in(pipe: DiffusionPipeline, folder: Path, text_encoders: tuple[str, ...], kept: tuple[str, ...]) -> None:
    """Save `pipe` as `folder`.

    Args:
        pipe: its parts in the dtype that the files are to have.
        folder: replaced if it exists.
        text_encoders: folders of transformers' models among the parts; they load in float32, as diffusers' do.
        kept: names of files that the old folder hands on to the new one.
    """
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    pipe.save_pretrained(fresh, max_shard_size=SHARD)
    for name in text_encoders:
        _load_as_float32(fresh / name / "config.json")
    drop_origin(fresh)
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # written readable by their owner only
    for name in kept:
        if (folder / name).exists():
            shutil.copy2(folder / name, fresh / name)
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def drop_origin(folder: Path) -> None:
    """Take the place of training, which diffusers writes down, out of the configurations of a saved pipeline."""
    for path in sorted(folder.rglob("*.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def _load_as_float32(config: Path) -> None:
    """transformers loads in the dtype its config names; diffusers in float32: name float32, or the two would clash."""
    values = json.loads(config.read_text())
    values.pop("torch_dtype", None)
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

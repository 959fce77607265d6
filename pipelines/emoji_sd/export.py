"""Write the trained parts as a diffusers `StableDiffusionPipeline` folder: fp16 files that load as fp32."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from saved_pipeline import drop_origin
from transformers import CLIPTokenizer

from .denoiser import Denoiser, build_scheduler

SHARD = "14MB"
KEPT = ("README.md", "figures.json")  # what an export leaves in place


def export(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, latent_size: int) -> None:
    """Write beside `folder`, then swap, so that a reader never meets half a model."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    _pipeline(model, vae, tokenizer, latent_size).save_pretrained(fresh, max_shard_size=SHARD)
    _load_as_float32(fresh / "text_encoder" / "config.json")
    drop_origin(fresh)
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # written readable by their owner only
    for name in KEPT:
        if (folder / name).exists():
            shutil.copy2(folder / name, fresh / name)
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _pipeline(
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, latent_size: int
) -> StableDiffusionPipeline:
    unet = copy.deepcopy(model.unet).cpu().half()
    unet.register_to_config(sample_size=latent_size)
    return StableDiffusionPipeline(
        vae=copy.deepcopy(vae).cpu().half(),
        text_encoder=copy.deepcopy(model.text).cpu().half(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _load_as_float32(config: Path) -> None:
    """transformers loads in the dtype its config names; diffusers in float32: name float32, or the two would clash."""
    values = json.loads(config.read_text())
    values.pop("torch_dtype", None)
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

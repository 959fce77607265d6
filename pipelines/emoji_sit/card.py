"""The exported model: fp16 weights, the autoencoder beside them, and a model card written from the records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from export_cifar_sit import wrapped
from saved_pipeline import drop_origin

from diffattn.files import read_json
from diffattn.machine import where
from diffattn.sampling import SiTPipeline
from diffattn.training import checkpoints

from .stages import Stage

KEPT = ("first_steps.json", "speed_quality.json", "reference.safetensors")
"""What other programs wrote beside the model, which an export leaves in place."""

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# emoji-sit: a SiT with elastic mediators on 1,024 tokens

A class-conditional `SiTPipeline` that draws 202 emoji at 512×512: {tokens:,} tokens on the 64×64 latents of the
autoencoder of `emoji-sd`. Every attention layer has 4, 16 or 64 mediators to choose from; a schedule follows the noise.

```python
import diffattn

pipe = diffattn.load_demo("emoji-sit")
diffattn.patch(pipe)  # few mediators while the picture is noise, more as detail appears
pipe(["crab", "unicorn"], num_inference_steps=20).images[0].save("crab.png")
```

## Figures

{steps} Euler steps, seed 0 for every picture, {dtype}. "Nearest" is the smallest L2 distance over pixels at
64×64, among the 202 pictures of the classes, and among all 1,609.

| mediators | guidance | nearest of 202 | nearest of 1,609 | PSNR to the true picture, median; of the foreground |
|---|---|---|---|---|
{rows}

Times and quality against softmax attention, trained alike: "Mediators: the embedded emoji-sit" in
`docs/benchmarks.md`.

## Data and licence

202 Noto Emoji pictures (the image resources of googlefonts/noto-emoji, Apache-2.0), on white: every 8th of 1,609 names
in the order of Unicode's `emoji-test.txt`, those that `emoji-sd` was trained on. A model of 202 pictures knows them by
heart, which is its purpose: what acceleration loses can be seen. The weights are Apache-2.0.

## Recipe

{parameters:,} parameters: width {model[hidden_size]}, {model[num_layers]} layers, {model[num_heads]} heads, patches of
{model[patch_size]}×{model[patch_size]} latents. Velocity on the linear path, times {objective[time]}, label dropout
{objective[label_dropout]}, no mirrored pictures. Muon for the inner matrices and AdamW for the rest under a cosine,
averaged weights, bfloat16 autocast; each step draws one of the numbers of mediators.

| pictures | tokens | steps | batch | learning rate | minutes |
|---|---|---|---|---|---|
{stages}

Trained on {hardware}, shared with other work. `python pipelines/train_emoji_sit.py` trains, judges and exports.
"""


def export_model(
    work: Path, stages: tuple[Stage, ...], figures: dict[str, Any], guidance: float | None, out: Path
) -> int:
    """Export the last stage; returns the bytes of the weights.

    Args:
        work: holds the runs of all stages.
        stages: of the training.
        figures: as `judge` writes them.
        guidance: the model's own; None: as trained.
        out: the folder of the model, replaced but for `KEPT`.
    """
    pipe = SiTPipeline.from_pretrained(work / str(stages[-1].size) / "pipeline")
    if guidance is not None:
        pipe.register_to_config(guidance_scale=guidance)
    text = card(pipe, work, stages, figures)
    for path in out.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()
    pipe.to(dtype=torch.float16).save_pretrained(out)
    drop_origin(out)
    (out / "README.md").write_text(wrapped(text), encoding="utf-8")
    weights = list(out.rglob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)  # written readable by their owner only
    return sum(path.stat().st_size for path in weights)


def card(pipe: SiTPipeline, work: Path, stages: tuple[Stage, ...], figures: dict[str, Any]) -> str:
    config = read_json(work / str(stages[-1].size) / "config.json")
    judged = figures["judged"]
    side = pipe.transformer.config["sample_size"] // pipe.transformer.config["patch_size"]
    return CARD.format(
        tokens=side**2, parameters=sum(p.numel() for p in pipe.transformer.parameters()), model=config["model"],
        objective=config["objective"], steps=judged[0]["steps"], dtype=judged[0]["dtype"],
        rows="\n".join(map(_judged, judged)), hardware=where(figures["machine"]),
        stages="\n".join(_trained(work / str(stage.size), stage) for stage in stages),
    )  # fmt: skip


def _judged(row: dict[str, Any]) -> str:
    return (
        f"| {row['num_mediators'] or 'softmax'} | {row['guidance']:g} | {row['nearest_among_trained_percent']:g} % "
        f"| {row['nearest_among_all_percent']:g} % | {row['psnr_to_real_db_median']:.1f} dB; "
        f"{row['foreground_psnr_to_real_db_median']:.1f} dB |"
    )


def _trained(run: Path, stage: Stage) -> str:
    folder = checkpoints.latest(run / "checkpoints")
    if folder is None:
        raise ValueError(f"{str(run)!r} has no complete checkpoint")
    minutes = read_json(folder / checkpoints.STATE)["progress"]["seconds"] / 60
    tokens = (stage.size // 16) ** 2
    return f"| {stage.size}×{stage.size} | {tokens:,} | {stage.steps} | {stage.batch} | {stage.lr:g} | {minutes:.0f} |"

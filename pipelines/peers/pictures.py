"""The variants' pictures: paired with the unaccelerated ones, and scored against real ones.

Shapes: N pictures, H, W pixels, d features.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffattn.architectures.denoisers import denoiser_of
from diffattn.evaluation.quality import Protocol, QualityResult, quality
from diffattn.files import read_lines
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.features import features_of
from diffattn.metrics.paired import LatentTrace, foreground_psnr, latent_relative_error, psnr, ssim
from diffattn.metrics.reference import Reference

from .base import Draw

GROUPS = ("trained", "held-out")
"""Names the model was trained on, and names it never saw."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; picture i has prompt i modulo their number, and the seed `seed` + i."""

    steps: int = 20
    guidance: float = 2.5
    seed: int = 0
    batch: int = 8
    side: int | None = None  # pixels; None: the model's own

    def shifted(self, count: int) -> Self:
        """The same with seeds that begin `count` later."""
        return replace(self, seed=self.seed + count)

    def arguments(self, prompts: Sequence[str], first: int, last: int) -> dict[str, Any]:
        """Arguments of the call that draws pictures `first` to `last`, except `num_inference_steps`."""
        indices = range(first, last)
        size = {} if self.side is None else {"height": self.side, "width": self.side}
        return {
            "prompt": [prompts[i % len(prompts)] for i in indices],
            "guidance_scale": self.guidance,
            "generator": [torch.Generator().manual_seed(self.seed + i) for i in indices],
            "output_type": "pt",
            **size,
        }

    def protocol(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What a figure depends on besides steps, guidance and seeds: for its `Protocol`."""
        digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
        return {"prompts_sha256": digest, "size": self.side or "the model's own", "batch": self.batch}


@dataclass
class Drawn:
    """Pictures [N, 3, H, W] in 0..1 on the CPU, and the latents after every step, batch by batch."""

    images: Tensor
    traces: list[LatentTrace]


def builtin_prompts(group: str) -> list[str]:
    """64 names, in an order that was shuffled once.

    Trained: every 8th picture of the data, and not a 20th. Held out: the others; the first 40 of them are 20th pictures
    (which the larger preset of the training program holds out as well).
    """
    return read_lines(Path(__file__).parent / "prompts" / f"{group}.txt")


def draw_pairs(draw: Draw, prompts: Sequence[str], drawing: Drawing) -> Drawn:
    """One picture per prompt."""
    images, traces = [], []
    for first in range(0, len(prompts), drawing.batch):
        trace = LatentTrace()
        arguments = drawing.arguments(prompts, first, min(first + drawing.batch, len(prompts)))
        output = draw(num_inference_steps=drawing.steps, callback_on_step_end=trace, **arguments)
        images.append(output.images.float().cpu())
        traces.append(trace)
    return Drawn(torch.cat(images), traces)


def paired(found: Drawn, exact: Drawn) -> dict[str, Any]:
    """Metrics of every picture against the unaccelerated one; null where infinite (identical) or without foreground.

    "latent_error_per_step" is null for runs of another number of steps.
    """
    pairs = list(zip(found.traces, exact.traces, strict=True))
    last = torch.cat([latent_relative_error(a.steps[-1], b.steps[-1]) for a, b in pairs])
    same = all(len(a.steps) == len(b.steps) for a, b in pairs)
    return {
        "identical": torch.equal(found.images, exact.images),
        "psnr": _listed(psnr(found.images, exact.images)),
        "foreground_psnr": _listed(foreground_psnr(found.images, exact.images)),
        "ssim": _listed(ssim(found.images, exact.images)),
        "latent_error": _listed(last),
        "latent_error_per_step": [row for a, b in pairs for row in a.errors(b)] if same else None,
    }


def score(
    draw: Draw,
    pipe: Any,
    subject: str,
    prompts: Sequence[str],
    count: int,
    drawing: Drawing,
    reference: Reference,
    eye: FeatureExtractor,
) -> QualityResult:
    """FID, KID and the rest of `count` pictures, under their protocol."""

    def pictures() -> Iterator[Tensor]:
        for first in range(0, count, drawing.batch):
            arguments = drawing.arguments(prompts, first, min(first + drawing.batch, count))
            yield draw(num_inference_steps=drawing.steps, **arguments).images.float()

    scores, options = quality(features_of(pictures(), eye), reference)
    protocol = Protocol.of(
        count,
        reference,
        eye,
        sampler=type(pipe.scheduler).__name__,
        steps=drawing.steps,
        guidance=drawing.guidance,
        seeds=f"{drawing.seed}..{drawing.seed + count - 1}",
        dtype=denoiser_of(pipe).dtype,
        device=pipe.device,
        options=options | drawing.protocol(prompts),
    )
    return QualityResult(subject, protocol, scores)


def all_values(pictures: Mapping[str, Mapping[str, Any]], metric: str, groups: Sequence[str] = GROUPS) -> list[float]:
    """The known values of one metric, over all pictures of these groups."""
    return [v for group in groups if group in pictures for v in pictures[group][metric] if v is not None]


def _listed(values: Tensor) -> list[float | None]:
    return [v if isfinite(v) else None for v in values.tolist()]

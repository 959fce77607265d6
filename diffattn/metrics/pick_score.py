"""PickScore: which of two pictures people prefer (Kirstain et al. 2023), by a CLIP model trained on such choices."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffattn.metrics.clip_score import ClipScore

EXAMPLE = "yuvalkirstain/PickScore_v1"


class PickScore:
    """The model's temperature times the cosine of picture and prompt.

    Of two pictures of one prompt the first is preferred with probability σ(s₁ - s₂) of their scores.

    Attributes:
        hash: sha256 of the weights.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        """Raises `ValueError` if there is no CLIP model with safetensors weights, a tokenizer and a processor."""
        self.clip = ClipScore(source, device, example=EXAMPLE)
        self.hash = self.clip.hash

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score of every picture [B] on the CPU; arguments and errors as `ClipScore.cosines`."""
        return self.clip.model.logit_scale.exp().cpu() * self.clip.cosines(images, prompts)

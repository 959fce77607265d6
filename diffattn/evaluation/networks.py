"""The networks that score pictures: against prompts, and in pairs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffattn.evaluation.config import EvaluateConfig
from diffattn.metrics.clip_score import ClipScore
from diffattn.metrics.lpips import Lpips
from diffattn.metrics.pick_score import PickScore
from diffattn.metrics.similarity import ImageSimilarity, clip_similarity, dino_similarity

OF_PROMPTS: Mapping[str, Callable[..., ClipScore | PickScore]] = {"clip": ClipScore, "pickscore": PickScore}
"""Score, and field of `EvaluateConfig` -> what loads it from there."""

OF_PAIRS: Mapping[str, Callable[..., ImageSimilarity]] = {"clip_i": clip_similarity, "dino_i": dino_similarity}
"""The same for pairs; LPIPS is separate since its input differs."""

LPIPS_WEIGHTS = "lpips_weights"
"""Field of `EvaluateConfig`."""


@dataclass(frozen=True)
class Networks:
    """The networks that a configuration requires."""

    of_prompts: Mapping[str, ClipScore | PickScore] = field(default_factory=dict)  # by score
    of_pairs: Mapping[str, ImageSimilarity] = field(default_factory=dict)  # by score
    lpips: Lpips | None = None

    @classmethod
    def load(cls, config: EvaluateConfig, device: torch.device) -> "Networks":
        """Raises `ValueError` as the networks."""
        found = [
            {
                name: make(source, device)
                for name, make in kinds.items()
                if (source := getattr(config, name)) is not None
            }
            for kinds in (OF_PROMPTS, OF_PAIRS)
        ]
        lpips = None if config.lpips_weights is None else Lpips(config.lpips_weights, device)
        return cls(found[0], found[1], lpips)  # type: ignore[arg-type]

    def hashes(self) -> dict[str, str]:
        """Score -> sha256 of the weights that it depends on."""
        found = {name: network.hash for name, network in {**self.of_prompts, **self.of_pairs}.items()}
        return found if self.lpips is None else found | {"lpips": self.lpips.hash}


def asked_for(config: EvaluateConfig, kinds: Iterable[str]) -> Sequence[str]:
    """The scores of `OF_PROMPTS` or of `OF_PAIRS`, or other fields, that a configuration requests."""
    return [name for name in kinds if getattr(config, name) is not None]


def pair_values(networks: Networks, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Scores [B] of pairs of uint8 pictures [B, 3, H, W] by the networks."""
    found = {name: network(a, b) for name, network in networks.of_pairs.items()}
    return found if networks.lpips is None else found | {"lpips": networks.lpips(a.float() / 255, b.float() / 255)}

"""What the contract suite needs to know about a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A class of diffusers, a tiny configuration, and the arguments of a call."""

    name: str  # of the class in diffusers, perhaps with more after a space
    config: Mapping[str, Any]
    inputs: Inputs  # (batch, random numbers) -> arguments of forward, without the time
    grid: tuple[int, ...]  # of the picture's tokens in these inputs
    time: Callable[[float], float]  # σ of flow matching -> the time argument that its pipeline passes
    num_layers: int  # self-attention layers over the picture's tokens
    time_name: str = "timestep"
    time_dtype: torch.dtype = torch.float32
    context: int = 0  # tokens without a place
    per_sample: frozenset[str] = field(default=frozenset())  # arguments that are not per sample although tensors
    references: tuple[tuple[int, ...], ...] = ()  # grids of reference pictures in these inputs
    batched_lists: frozenset[str] = field(default=frozenset())  # arguments that are lists with a batch in each entry
    scheduler: Callable[[], Any] = lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    output: Callable[[Any], Tensor] = lambda out: out[0]

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> Any:
        """The model with random weights, in eval mode."""
        torch.manual_seed(seed)
        kind: Any = getattr(diffusers, self.name.partition(" ")[0])
        model = kind(**self.config).eval()
        for parameter in model.parameters():  # gates and outputs start at zero in many
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model

    def one_of(self, given: Mapping[str, Any], index: int, batch: int) -> dict[str, Any]:
        """The arguments for one sample of a batch."""

        def part(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: part(k, v) for k, v in value.items()}
            if name in self.batched_lists:
                return [x[index : index + 1] for x in value]
            return value[index : index + 1] if isinstance(value, Tensor | list) and len(value) == batch else value

        return part("", dict(given))

    def call(self, model: Any, given: Mapping[str, Any], level: float = 0.7) -> Tensor:
        """The output of one call at a noise level."""
        batch = next(len(x) for x in given.values() if isinstance(x, Tensor | list) and not isinstance(x, str))
        time = torch.full((batch,), self.time(level), dtype=self.time_dtype)
        with torch.no_grad():
            return self.output(model(**given, **{self.time_name: time}, return_dict=False))


def normal(*shape: int, rng: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=rng)

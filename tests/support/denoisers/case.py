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
    batch_dims: Mapping[str, int] = field(default_factory=dict)  # where the batch is not the first dimension
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"return_dict": False})  # arguments beside the inputs
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

    def call(self, model: Any, given: Mapping[str, Any], level: float = 0.7) -> Tensor:
        """The output of one call at a noise level."""
        batch = next(len(x) for x in given.values() if isinstance(x, Tensor | list) and not isinstance(x, str))
        time = torch.full((batch,), self.time(level), dtype=self.time_dtype)
        with torch.no_grad():
            return self.output(model(**given, **{self.time_name: time}, **self.fixed))

    def one_of(self, given: Mapping[str, Any], index: int, batch: int) -> dict[str, Any]:
        """The arguments for one sample of a batch."""
        rows = {k: v[index : index + 1] for k, v in given.items() if isinstance(v, Tensor | list) and len(v) == batch}
        return {**given, **rows, **{k: given[k].narrow(dim, index, 1) for k, dim in self.batch_dims.items()}}


def normal(*shape: int, rng: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=rng)

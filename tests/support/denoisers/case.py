"""What the contract suite needs to know about a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], dict[str, Any]]

_TIMES = ContextVar("times", default=1)


@contextmanager
def enlarged(times: int) -> Iterator[None]:
    """Inputs with so many times the rows and columns, and tokens of pictures and texts in proportion."""
    token = _TIMES.set(times)
    try:
        yield
    finally:
        _TIMES.reset(token)


def side(number: int) -> int:
    """Rows or columns, of pixels or tokens, enlarged."""
    return number * _TIMES.get()


def area(number: int) -> int:
    """Tokens, enlarged."""
    return number * _TIMES.get() ** 2


@dataclass(frozen=True)
class Case:
    """A class of diffusers, a tiny configuration, and the arguments of a call."""

    name: str  # of the class in diffusers, perhaps with more after a space
    config: Mapping[str, Any]
    inputs: Inputs  # (batch, random numbers) -> arguments of forward, without the time
    grid: tuple[int, ...]  # of the picture's tokens in these inputs
    time: Callable[[float], float]  # a time step of the scheduler / 1000 -> the argument that its pipeline passes
    num_layers: int  # self-attention layers over the picture's tokens
    level: float = 0.7  # a time step of the scheduler / 1000 for calls at any one
    needs: str = "torch"  # a package without which diffusers cannot run this class
    time_name: str = "timestep"
    time_dtype: torch.dtype = torch.float32
    per_call: Callable[[float], Sequence[float]] | None = None  # times of a call as a whole, of the time argument
    time_shape: tuple[int, ...] = ()  # per sample, of times per token or frame
    more_grids: tuple[tuple[int, ...], ...] = ()  # of other levels that have attention
    context: int = 0  # tokens without a place
    per_sample: frozenset[str] = field(default=frozenset())  # arguments that are not per sample although tensors
    per_frame: Mapping[str, int] = field(default_factory=dict)  # arguments that its pipeline repeats for every frame
    references: tuple[tuple[int, ...], ...] = ()  # grids of reference pictures in these inputs
    batched_lists: frozenset[str] = field(default=frozenset())  # arguments that are lists with a batch in each entry
    batch_dims: Mapping[str, int] = field(default_factory=dict)  # where the batch is not the first dimension
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"return_dict": False})  # arguments beside the inputs
    output: Callable[[Any], Tensor] = lambda out: out[0]
    scheduler: Callable[[], Any] = lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)  # of its pipeline
    enlarged: Mapping[str, Any] = field(default_factory=dict)  # what the configuration needs for enlarged inputs
    batched: bool = True  # whether a call takes several samples
    calls_per_sample: bool = False  # the processor attends for one sample after another

    def __str__(self) -> str:
        return self.name

    def num_calls(self, batch: int) -> int:
        """Calls of attention over the picture's tokens in one call of the model."""
        return self.num_layers * (batch if self.calls_per_sample else 1)

    def build(self, seed: int = 0, **config: Any) -> Any:
        """The model with random weights, in eval mode; `config`: what differs from the configuration."""
        pytest.importorskip(self.needs)
        torch.manual_seed(seed)
        kind: Any = getattr(diffusers, self.name.partition(" ")[0])
        return random_weights(kind(**{**self.config, **config}).eval())

    def one_of(self, given: Mapping[str, Any], index: int, batch: int) -> dict[str, Any]:
        """The arguments for one sample of a batch."""

        def part(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: part(k, v) for k, v in value.items()}
            if name in self.batched_lists:
                return [x[index : index + 1] for x in value]
            return value[index : index + 1] if isinstance(value, Tensor | list) and len(value) == batch else value

        elsewhere = {name: given[name].narrow(dim, index, 1) for name, dim in self.batch_dims.items()}
        return part("", dict(given)) | elsewhere

    def call(self, model: Any, given: Mapping[str, Any], level: float | None = None) -> Tensor:
        """The output of one call at a time step of the scheduler, divided by 1000."""
        level = self.level if level is None else level
        batch = next(len(x) for x in given.values() if isinstance(x, Tensor | list) and not isinstance(x, str))
        shape = tuple(area(n) if n == prod(self.grid) else n for n in self.time_shape)  # per token
        time = torch.full((batch, *shape), self.time(level), dtype=self.time_dtype)
        if self.per_call is not None:
            time = torch.tensor(self.per_call(self.time(level)), dtype=self.time_dtype)
        repeated = {name: given[name].repeat_interleave(n, dim=0) for name, n in self.per_frame.items()}
        given = {**given, **repeated}
        with torch.no_grad():
            return self.output(model(**given, **{self.time_name: time}, **self.fixed))


def random_weights(model: Any) -> Any:
    """The model with weights of the size that keeps activations alike; gates and outputs start at zero in many."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            inputs = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]
            nn.init.normal_(parameter, std=inputs**-0.5)
    return model


def normal(*shape: int, rng: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=rng)


def noise_level_of(scheduler: Any, step: int) -> float:
    """σ of flow matching, or σ/(1 + σ) by the scheduler's σ of EDM or table of ᾱ."""
    if hasattr(scheduler, "precondition_noise") or scheduler.config.get("timestep_type") == "continuous":
        return float(scheduler.sigmas[step] / (1 + scheduler.sigmas[step]))
    if hasattr(scheduler, "_alpha_cumprod"):
        alpha = float(scheduler._alpha_cumprod(scheduler.timesteps[step], torch.device("cpu")))
        return (1 - alpha) ** 0.5 / (alpha**0.5 + (1 - alpha) ** 0.5)
    if scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction":
        sigma = float(scheduler.sigmas[step])
        return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma
    alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
    return (1 - alpha) ** 0.5 / (alpha**0.5 + (1 - alpha) ** 0.5)

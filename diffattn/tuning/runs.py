"""Runs of one pipeline that the tuner compares: final latents, and single denoiser calls recorded from them.

Shapes: B samples, c channels, h, w of the latents; with guidance a call has 2B rows, first those without the prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor, nn

from diffattn.architectures import architecture_of
from diffattn.architectures.denoisers import argument_names, denoisers_of, is_compiled
from diffattn.drawing.draw import call_arguments, prepare
from diffattn.drawing.request import UNPATCHED, Request
from diffattn.machine import execution_device
from diffattn.noise_level import NoiseLevels
from diffattn.patching.patch import Patch, find_patch, patch


@dataclass(frozen=True)
class Call:
    """The inputs of one denoiser call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    level: float  # noise level, 1 noise ... 0 data


class PipelineRuns:
    """Runs of a pipeline, one per prompt, with the same noise every time.

    Args:
        pipe: unpatched and not compiled, on its device.
        prompts: run i draws prompt i with the seed `request.seed` + i.
        request: steps, guidance, size and seed of all runs.
        on_call: called before every call of the denoiser.

    Raises:
        TypeError: the pipeline draws neither from text alone nor from classes, or its denoiser is not supported.
        ValueError: no prompts, a prompt or size that the pipeline refuses; a pipeline that is patched or compiled.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], request: Request, on_call: Callable[[], None] | None = None
    ) -> None:
        if not prompts:
            raise ValueError("there are no prompts to tune on")
        if isinstance(pipe, DiTPipeline):
            raise ValueError("DiTPipeline cannot be tuned: it gives no latents (output_type 'latent') to compare")
        self.pipe, self.on_call = pipe, on_call
        self.requests = [
            prepare(pipe, replace(request, method=UNPATCHED, prompt=prompt, seed=request.seed + i))[0]
            for i, prompt in enumerate(prompts)
        ]
        denoisers = denoisers_of(pipe)
        self.denoiser = denoisers[""]
        if find_patch(pipe) is not None:
            raise ValueError("the pipeline is patched; call diffattn.unpatch before tuning")
        if any(is_compiled(model) for model in denoisers.values()):
            raise ValueError("the denoiser is compiled; tune it before compiling it")
        self._taken: list[Call] | None = None
        self._levels = NoiseLevels(pipe.scheduler)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return execution_device(self.denoiser)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count every denoiser call within the block, and record it if a run asks for that."""
        handle = self.denoiser.register_forward_pre_hook(self._notice, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def latents(self, index: int) -> Tensor:
        """Final latents [B, c, h, w] of one prompt in the pipeline's current state, in fp32."""
        request = self.requests[index]
        generator = torch.Generator().manual_seed(request.seed)
        arguments = call_arguments(self.pipe, request)
        return self.pipe(**arguments, generator=generator, output_type="latent").images.float()

    def latents_and_calls(self, index: int) -> tuple[Tensor, list[Call]]:
        """Like `latents`, with the inputs of all denoiser calls."""
        self._taken = []
        try:
            return self.latents(index), self._taken
        finally:
            self._taken = None

    @contextmanager
    def patched(self, recipe: Mapping[str, Any]) -> Iterator[Patch]:
        """Patch the pipeline within the block; single calls in a band that the recipe leaves exact give no warning."""
        with patch(self.pipe, recipe=recipe) as handle:
            handle.quiet()
            yield handle

    @torch.no_grad()
    def replay(self, call: Call) -> Tensor:
        """The denoiser's current output for a call: [B, c, h, w], guided, in fp32."""
        output = self.denoiser(*call.args, **call.kwargs)
        output = (output[0] if isinstance(output, tuple) else output.sample).float()
        guidance = float(self.requests[0].guidance or 0)
        if not getattr(self.pipe, "do_classifier_free_guidance", guidance > 1) or len(output) % 2:
            return output
        without, with_prompt = output.chunk(2)
        return without + guidance * (with_prompt - without)

    def _notice(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on_call is not None:
            self.on_call()
        if self._taken is None:
            return
        architecture = architecture_of(model)
        given = dict(zip(argument_names(model), args, strict=False)) | kwargs
        reading = architecture.read_time(model, architecture.timestep(given), self._levels)
        kept = {name: _copy(value) for name, value in kwargs.items()}
        self._taken.append(Call(tuple(map(_copy, args)), kept, max(reading.levels)))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖x - x*‖ / ‖x*‖; infinite where it is not a number."""
    error = float((found - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def bands_of(levels: Sequence[float], count: int) -> tuple[float, ...]:
    """Lowest noise levels of `count` bands with about as many calls each, falling to 0; fewer where levels coincide.

    Args:
        levels: of the calls of one run.
        count: 1 or more.
    """
    falling = sorted(levels, reverse=True)
    cuts = {round(len(falling) * i / count) for i in range(1, count)}
    pairs = [(falling[i - 1], falling[i]) for i in sorted(cuts) if 0 < i < len(falling)]
    return (*(_between(low, high) for high, low in pairs if high > low), 0.0)


def band_at(bounds: Sequence[float], level: float) -> int:
    """The band of a noise level, by the rule of `NoiseSchedule`."""
    return next((i for i, bound in enumerate(bounds) if level >= bound), len(bounds) - 1)


def _between(low: float, high: float) -> float:
    """The midpoint, rounded to four digits if they suffice."""
    middle = (low + high) / 2
    return rounded if low < (rounded := round(middle, 4)) < high else middle


def _copy(value: Any) -> Any:
    """Record a call; the noisy input is copied, since a scheduler may later change it in place."""
    return value.clone() if isinstance(value, Tensor) and value.ndim == 4 else value

"""SADA, step-wise (Jiang et al., "Stability-guided Adaptive Diffusion Acceleration", ICML 2025, arXiv 2507.17135).

While a run is stable, a step takes its x0 from the trajectory so far and the denoiser is not asked:

- *step-wise*: the criterion is asked after every step with the denoiser. If it holds, the next step's sample is
  approximated by Adams-Moulton, and the noise of the last step is used again: x0 = (x̂ - σ·ε) / α;
- *multistep-wise*: from the first stable step of the second half on, only every k-th step asks the denoiser, and those
  between take x0 from the Lagrange polynomial through such steps.

The sampler goes on from its own sample, whatever its order. Written from the formulas, not from the published code.
What they leave open is settled here so: never two skipped steps in a row before the multistep part; the times at which
steps may be skipped are those the authors publish for 50 steps, as shares of a run. Their third part is left out: where
the criterion fails they compute attention for unstable tokens only, inside of layers, where agents are.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from itertools import islice
from typing import Any, NamedTuple, Self

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Size, Tensor

from .base import Draw, LeftOut, Setting
from .trajectory import Path, adams_moulton, is_stable, lagrange

SHORTEST = 10
"""Steps of a run; a shorter one has hardly any that may be skipped."""

SAMPLERS = (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler)
"""Those that solve an ODE and ask the denoiser once a step."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
ORDER = 3  # gradients that the criterion looks at
TERMS = 4  # nodes of the Lagrange polynomial

Criterion = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], bool]
"""Arguments as those of `is_stable`."""


class Window(NamedTuple):
    """Which steps may be skipped: `first` to `end` - 1, from `multistep` on all but every `interval`-th."""

    first: int
    multistep: int
    end: int
    interval: int

    @classmethod
    def of(cls, steps: int) -> Self:
        """10, 24, 47 and 4 of 50 steps."""
        first, multistep, end = (steps * share // 50 for share in (10, 24, 47))
        return cls(max(first, ORDER), multistep, end, max(round(steps * 4 / 50), 2))


@dataclass
class Run:
    """What one run has shown so far.

    Attributes:
        step: number of the step to come.
        planned: its x0, where the denoiser need not be asked.
        gradients: of the last steps, the newest first.
        clean: x0 of every step with the denoiser.
        since: step at which the multistep part began.
    """

    path: Path
    stable: Criterion
    step: int = 0
    planned: Tensor | None = None
    gradients: deque[Tensor] = field(default_factory=lambda: deque(maxlen=ORDER))
    clean: dict[int, Tensor] = field(default_factory=dict)
    since: int | None = None

    def observe(self, x: Tensor, output: Tensor, after: Tensor) -> None:
        """Takes note of a step from x to `after`, and plans the next.

        Args:
            output: the denoiser's, or what stood in for it; guidance included.
        """
        asked, i = self.planned is None, self.step
        clean = self.path.clean(i, output, x) if self.planned is None else self.planned
        noise = self.path.noise(i, clean, x)
        self.gradients.appendleft(self.path.gradient(i, clean, noise))
        if asked:
            self.clean[i] = clean
        self.step += 1
        self.planned = self._plan(x, noise, after, asked)

    def _plan(self, x: Tensor, noise: Tensor, after: Tensor, asked: bool) -> Tensor | None:
        i, window = self.step, Window.of(self.path.steps)
        if not window.first <= i < window.end:
            return None
        if self.since is None:
            guess = adams_moulton(x, *self.gradients)
            if not asked or not self.stable(after, guess, *self.gradients):
                return None
            if i < window.multistep:
                return (guess - self.path.sigma[i] * noise) / self.path.alpha[i]
            self.since = i - 1
        if (i - self.since) % window.interval == 0:
            return None
        return lagrange(dict(islice(self._nodes(window.interval), TERMS)), i)

    def _nodes(self, distance: int) -> Iterator[tuple[int, Tensor]]:
        """The newest steps with the denoiser that are so far apart."""
        last = self.step + distance
        for i in reversed(self.clean):
            if last - i >= distance:
                yield i, self.clean[i]
                last = i


class Skipper:
    """Stands before a pipeline's denoiser and before the step of its scheduler."""

    def __init__(self, pipe: Any, stable: Criterion) -> None:
        self.scheduler, self.stable = pipe.scheduler, stable
        self.forward, self.step = pipe.unet.forward, pipe.scheduler.step
        self.begin()

    def begin(self) -> None:
        """A new run."""
        self.run: Run | None = None
        self.kept: deque[tuple[Size, Any]] = deque()  # inputs' shapes and outputs of the last step with the denoiser

    def denoise(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output; that of the last step where the next needs none.

        A batch of another size, as at the end of guidance, is always computed.
        """
        if self.run is not None and self.run.planned is not None:
            if self.kept[0][0] == sample.shape:
                self.kept.rotate(-1)
                return self.kept[-1][1]
            self.run.planned = None
            self.kept.clear()
        output = self.forward(sample, *args, **kwargs)
        self.kept.append((sample.shape, output))
        return output

    def advance(self, output: Tensor, timestep: Tensor | float, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's step, from the planned x0 where there is one."""
        run = self.run = self.run or Run(Path.of(self.scheduler, timestep), self.stable)
        x = sample.float()
        if run.planned is not None:
            output = run.path.output(run.step, run.planned, x).to(output.dtype)
        stepped = self.step(output, timestep, sample, *args, **kwargs)
        run.observe(x, output.float(), stepped[0].float())
        if run.planned is None:
            self.kept.clear()
        return stepped


@contextmanager
def sada(pipe: Any, draw: Draw, setting: Setting, stable: Criterion = is_stable) -> Iterator[Draw]:
    """Skips steps while the trajectory is stable, with any UNet, guidance and sampler of `SAMPLERS`."""
    _check(pipe.scheduler, setting.steps)
    skipper = Skipper(pipe, stable)

    def run(**arguments: Any) -> Any:
        skipper.begin()
        return draw(**arguments)

    with (
        _wrapped(pipe.unet, "forward", skipper.denoise),
        _wrapped(pipe.scheduler, "step", skipper.advance),
    ):
        yield run


def _check(scheduler: Any, steps: int) -> None:
    if steps < SHORTEST:
        raise LeftOut(f"SADA skips steps of runs of {SHORTEST} steps or more, not of {steps}")
    prediction, algorithm = (scheduler.config.get(key) for key in ("prediction_type", "algorithm_type"))
    stochastic = str(algorithm).startswith("sde")
    if stochastic or not isinstance(scheduler, SAMPLERS) or prediction not in PREDICTIONS:
        names = ", ".join(sampler.__name__ for sampler in SAMPLERS)
        raise LeftOut(f"SADA knows the deterministic {names} with {', '.join(PREDICTIONS)}, "
                      f"not {type(scheduler).__name__} with {prediction}")  # fmt: skip


@contextmanager
def _wrapped(holder: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Puts a function in the place of a method of one object; it keeps the signature of what it stands for."""
    before = {key: value for key, value in vars(holder).items() if key == name}
    setattr(holder, name, update_wrapper(partial(function), getattr(holder, name)))
    try:
        yield
    finally:
        delattr(holder, name)
        vars(holder).update(before)

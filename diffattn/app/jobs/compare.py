"""The same seeds unpatched and patched: times, work, memory, and how similar the pictures are."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffattn.app.jobs.choices import RECIPE, method_and_preset
from diffattn.app.jobs.run_trace import RunTrace
from diffattn.app.jobs.speed_up import SpeedUp
from diffattn.app.jobs.watch import Watch, noisy_input
from diffattn.architectures.denoisers import denoiser_of
from diffattn.drawing.draw import generate, prepare
from diffattn.drawing.request import UNPATCHED, Picture, Request
from diffattn.measure.flops import count_gflops
from diffattn.measure.interleave import rotated
from diffattn.metrics.paired import SSIM_WINDOW, psnr, ssim
from diffattn.patching.patch import Patch
from diffattn.patching.report import Report
from diffattn.schedules import NoiseSchedule

MAX_COUNTED_TOKENS = 4096  # latent pixels; above, no counting: it takes a [tokens, tokens] matrix

WARMING_UP = "warming up"
WARM_STEPS = 2

MakeWatch = Callable[..., Watch]


@dataclass(frozen=True)
class Variant:
    """One acceleration of a comparison, or "none"."""

    name: str
    pictures: tuple[Picture, ...]
    seconds: float  # of a picture, median
    gflops: float | None  # of all denoiser calls of a picture; a multiply-add counts as two; None: not counted
    peak_mib: float | None  # peak memory allocated on a CUDA device, None elsewhere
    psnr: float | None  # dB, mean over the pictures that differ; None for "none"; infinite if none does
    ssim: float | None  # of both: pictures that a safety checker blanked are left out, None if all are
    report: Report | None
    trace: RunTrace

    @property
    def blanked(self) -> int:
        """Number of pictures that the model's safety checker made black."""
        return sum(picture.blanked for picture in self.pictures)


@dataclass(frozen=True)
class Comparison:
    """All variants; the first is unpatched."""

    request: Request
    variants: tuple[Variant, ...]
    unread: str = ""  # the end of the prompt, beyond what the model's text encoder takes

    def speedup(self, variant: Variant) -> SpeedUp | None:
        """The speed-up of a variant over the unpatched one, picture by picture; None for too few pictures."""
        exact, own = ([picture.seconds for picture in v.pictures] for v in (self.variants[0], variant))
        return SpeedUp.of(exact, own)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, as JSON types."""
        return {"variants": [self._figures(variant) for variant in self.variants]}

    def _figures(self, v: Variant) -> dict[str, Any]:
        faster = None if v is self.variants[0] else self.speedup(v)
        figures = {"seconds_each": [picture.seconds for picture in v.pictures], "seconds": v.seconds}
        figures |= {"speedup": faster and {**asdict(faster), "difference_shown": faster.shown}}
        identical = v.psnr is not None and math.isinf(v.psnr)
        alike = {"psnr": None if identical else v.psnr, "identical": identical, "ssim": v.ssim}
        return {"acceleration": v.name, "gflops": v.gflops, "peak_mib": v.peak_mib, **figures, **alike}


@dataclass
class Collected:
    """The results of one variant so far."""

    request: Request
    pictures: list[Picture] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)  # MiB, on a CUDA device
    gflops: float | None = None  # of a picture
    report: Report | None = None
    trace: RunTrace | None = None


def compare(pipe: Any, request: Request, names: Sequence[str], watch: MakeWatch) -> Comparison:
    """Draw the pictures of a request unpatched and with every acceleration, in a rotating order.

    Args:
        pipe: on its target device; it is left unpatched.
        request: its method and preset are ignored, its recipe is used for "recipe" only.
        names: accelerations, see `choices.accelerations`, or "recipe".
        watch: makes the `Watch` of one picture, called as watch(request, patch, done, pictures, what).
    """
    collected = {name: Collected(one) for name, one in requests_of(request, names).items()}
    order, total = list(collected), len(collected) * request.num_images
    for name in order:
        warm_up(pipe, collected[name].request, watch)
    for i in range(request.num_images):
        for j, name in enumerate(rotated(order, i)):
            draw(pipe, collected[name], request.seed + i, watch, name, i * len(order) + j, total)
    found = tuple(_summary(name, one, collected[UNPATCHED].pictures) for name, one in collected.items())
    return Comparison(request, found)


def requests_of(request: Request, names: Sequence[str]) -> dict[str, Request]:
    """Name -> request of every variant of a comparison, the unpatched one first."""
    return {name: _variant(request, name) for name in (UNPATCHED, *names)}


def _variant(request: Request, name: str) -> Request:
    if name == RECIPE:
        return replace(request, method=None, preset=None)
    method, preset = method_and_preset(name)
    return replace(request, method=method, preset=preset, recipe=None)


def warm_up(pipe: Any, request: Request, watch: MakeWatch) -> None:
    """Run two untimed steps, since the first run of a variant takes longer."""
    few = replace(request, steps=min(WARM_STEPS, request.steps))
    draw(pipe, Collected(few), request.seed, watch, WARMING_UP, 0, None)


def draw(pipe: Any, one: Collected, seed: int, watch: MakeWatch, what: str, done: int, total: int | None) -> None:
    """Draw one more picture; the model is patched before and restored afterwards."""
    ready, patch = prepare(pipe, replace(one.request, seed=seed, num_images=1))
    on_cuda = pipe.device.type == "cuda"
    try:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(pipe.device)
        with watch(ready, patch, done, total, what) as followed:
            one.pictures += generate(pipe, ready)
            if what != WARMING_UP:
                followed.drawn(one.pictures[-1])
        if on_cuda:
            one.peaks.append(torch.cuda.max_memory_allocated(pipe.device) / 2**20)
        one.request = replace(ready, seed=one.request.seed, num_images=one.request.num_images)
        one.report, one.trace = patch.report() if patch else None, followed.trace
        if one.gflops is None and what != WARMING_UP:
            one.gflops = _gflops(pipe, followed, patch)
    finally:
        if patch:
            patch.remove()


@torch.no_grad()
def _gflops(pipe: Any, followed: Watch, patch: Patch | None) -> float | None:
    """Operations of all denoiser calls of a picture, counted by repeating one call of every phase.

    None if that takes too long, or if the phase does not follow from the noise level, so that a call repeated on its
    own would run in another phase.
    """
    if patch and not isinstance(patch.plan.schedule, NoiseSchedule):
        return None
    model: Any = denoiser_of(pipe)
    x, _ = noisy_input(*next(iter(followed.inputs.values())))
    phases = [entry["phase"] for entry in patch.trace()] if patch else [0] * len(followed.trace.seconds)
    if x.shape[-2] * x.shape[-1] > MAX_COUNTED_TOKENS or set(phases) - set(followed.inputs):
        return None
    of_phase = {}
    for phase, (args, kwargs) in followed.inputs.items():
        of_phase[phase] = count_gflops(lambda args=args, kwargs=kwargs: model(*args, **kwargs))
    return sum(of_phase[phase] for phase in phases)


def _summary(name: str, one: Collected, exact: Sequence[Picture]) -> Variant:
    assert one.trace is not None
    both = [pair for pair in zip(one.pictures, exact, strict=True) if not (pair[0].blanked or pair[1].blanked)]
    db = alike = None
    if name != UNPATCHED and both:
        own, reference = (torch.cat([pixels(picture.image) for picture in side]) for side in zip(*both, strict=True))
        db = _mean_of_finite(psnr(own, reference))
        alike = float(ssim(own, reference).mean()) if min(own.shape[2:]) >= SSIM_WINDOW else None
    return Variant(
        name=name,
        pictures=tuple(one.pictures),
        seconds=statistics.median(picture.seconds for picture in one.pictures),
        gflops=one.gflops,
        peak_mib=max(one.peaks, default=None),
        psnr=db,
        ssim=alike,
        report=one.report,
        trace=one.trace,
    )


def _mean_of_finite(values: Tensor) -> float:
    """The mean of the finite values; infinite if there is none."""
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else math.inf


def pixels(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in 0..1"""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255

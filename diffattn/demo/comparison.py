"""The demo's first part: an embedded model draws the same pictures unpatched and patched; and the sheet of both."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffattn.demo.mediators import MODEL, MediatorRow, Mediators
from diffattn.drawing.batch import NotFinite, draw_batch, to_pictures
from diffattn.drawing.draw import prepare
from diffattn.drawing.loading import embedded_models, load_demo
from diffattn.drawing.request import UNPATCHED as NO_METHOD
from diffattn.drawing.request import Request
from diffattn.drawing.sheet import amplified, comparison_sheet, with_time_bars
from diffattn.drawing.sizes import default_size, size_arguments
from diffattn.files import write_whole
from diffattn.machine import choose_device, choose_dtype, describe_device, dtype_name, fastest_dtype, versions
from diffattn.measure.interleave import Timings, interleave
from diffattn.metrics.paired import foreground_psnr, psnr, ssim
from diffattn.patching.patch import Patch, patch
from diffattn.patching.report import Report

PROMPTS = (
    "footprints", "T-Rex", "tent", "man vampire", "green heart", "star-struck", "lion", "crab", "guitar", "locomotive",
    "doughnut", "jack-o-lantern", "unicorn", "mushroom", "ferry", "Santa Claus", "house with garden", "old key",
    "sun with face", "kissing cat",
)  # fmt: skip
"""Fixed prompts, all among the names that `emoji-sd` was trained on."""

SHOWN = 5
"""Prompts on the sheet."""

SIDE = 256
"""Largest width and height of a picture on the sheet, in pixels."""

PARTNER = "emoji-sd"
"""The model whose prompts are classes of the SiT with mediators."""

UNPATCHED, PATCHED = "unpatched", "patched"
SHEET, RESULT = "comparison.png", "result.json"


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. The defaults take less than 3 minutes on two CPU cores with bfloat16 instructions."""

    model: str = "emoji-sd"
    method: str | None = None  # None: the one that suits the model
    preset: str = "balanced"
    steps: int = 16
    guidance: float | None = None  # None: the model's own
    seed: int = 0  # of every picture
    rounds: int = 1  # how often every prompt is drawn and timed, unpatched and patched
    size: int | None = None  # pixels, width and height; None: what the model was trained at
    prompts: Sequence[str] = PROMPTS
    device: str = "auto"
    dtype: str = "auto"
    mediators: bool = True  # also the SiT with mediators, where the prompts are its classes and the size is its own

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds}")
        if not self.prompts:
            raise ValueError("prompts must contain at least one")
        self.requests()  # checks steps, guidance and seed

    def requests(self) -> list[Request]:
        """What is drawn unpatched, a picture per prompt."""
        shared = Request(
            self.model, "", method=NO_METHOD, steps=self.steps, guidance=self.guidance, width=self.size,
            height=self.size, seed=self.seed,
        )  # fmt: skip
        return [replace(shared, prompt=prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class Pair:
    """One prompt drawn unpatched and patched."""

    prompt: str
    baseline_s: float  # seconds for one picture unpatched, median over the rounds
    accelerated_s: float  # patched
    speedup: float  # of patched over unpatched in the same round, median over the rounds
    psnr: float | None  # dB, patched against unpatched; infinite if identical
    ssim: float | None
    foreground_psnr: float | None  # of what is not white


@dataclass(frozen=True)
class DemoResult:
    """The measurements of a demo, and its comparison sheet."""

    settings: DemoSettings
    pairs: tuple[Pair, ...]
    size: int  # pixels, width and height
    baseline_s: float  # seconds for one picture unpatched, median over prompts and rounds
    accelerated_s: float
    speedup: float  # of patched over unpatched in the same round, median over prompts and rounds
    spread: tuple[float, float]  # first and third quartile of that
    psnr: float | None  # mean over the prompts; None at another size than the model was trained at, as below
    ssim: float | None
    foreground_psnr: tuple[float, float] | None  # median and worst of the prompts
    device: torch.device
    dtype: torch.dtype
    report: Report
    sheet: Image.Image
    mediators: tuple[MediatorRow, ...] = ()  # of the second part; none if it was left out

    @property
    def verdict(self) -> str:
        """One sentence: whether patching is faster by more than the spread of the measurement."""
        low, high = self.spread
        measured = f"{self.speedup:.2f}x the speed (middle half of the measurements: {low:.2f}x to {high:.2f}x)"
        if not self.report.layers_accelerated:
            return f"Nothing is faster: no layer ran accelerated at {self.size}x{self.size} on {self.device.type}."
        if low > 1:
            return f"Faster: {measured}{self._similarity}."
        if self.speedup <= 1:
            return f"Nothing is faster: {measured}."
        return f"Not clearly faster: {measured}."

    @property
    def mediators_verdict(self) -> str | None:
        """One sentence about the second part; None if it was left out."""
        if not self.mediators:
            return None
        most, *others = self.mediators
        speeds = ", ".join(f"{row.name} {row.speedup:.2f}x" for row in others)
        return f"The SiT, against {most.name}: {speeds} the speed."

    @property
    def _similarity(self) -> str:
        if self.foreground_psnr is None:
            return ""
        median, worst = self.foreground_psnr
        return f", at a PSNR of the foreground of {median:.1f} dB (median; worst {worst:.1f} dB)"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sheet as JSON types; the PSNR of identical pictures is null."""
        fields = asdict(self.settings) | {"prompts": list(self.settings.prompts)}
        totals = ("size", "baseline_s", "accelerated_s", "speedup", "psnr", "ssim")
        pairs: list[dict[str, Any]] = [asdict(pair) for pair in self.pairs]
        found: dict[str, Any] = fields | {name: getattr(self, name) for name in totals} | {"spread": list(self.spread)}
        found |= {"dtype": dtype_name(self.dtype), "device": str(self.device), "hardware": describe_device(self.device)}
        found |= {"layers_patched": self.report.layers_patched, "layers_accelerated": self.report.layers_accelerated}
        found |= {"verdict": self.verdict, "versions": versions(), "pairs": pairs, "report": self.report.to_dict()}
        found["mediators"] = [row.to_dict() for row in self.mediators]
        found["foreground_psnr"] = None if self.foreground_psnr is None else list(map(_finite, self.foreground_psnr))
        for part in (found, *pairs):
            part["psnr"] = _finite(part["psnr"])
        for part in pairs:
            part["foreground_psnr"] = _finite(part["foreground_psnr"])
        return found

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write the sheet and the figures into a folder, creating it if necessary. → their paths"""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        write_whole(folder / SHEET, partial(self.sheet.save, format="PNG"))
        write_whole(folder / RESULT, lambda part: part.write_text(text, encoding="utf-8"))
        return folder / SHEET, folder / RESULT


class Demo:
    """Two copies of the model, one unpatched and one patched, ready to run.

    Raises:
        ValueError, TypeError: from the settings, see `load_demo`, `choose_device`, `choose_dtype`, `prepare` and
            `patch`; more steps than the scheduler has.
    """

    def __init__(self, settings: DemoSettings) -> None:
        self.device = choose_device(settings.device)
        is_auto = settings.dtype == "auto"
        self.dtype = fastest_dtype(self.device) if is_auto else choose_dtype(settings.dtype, self.device)
        self.pipes = {name: self._load(settings.model) for name in (UNPATCHED, PATCHED)}
        exact: Any = self.pipes[UNPATCHED]
        self.native = default_size(exact)
        (first, _), *_ = [prepare(exact, request) for request in settings.requests()]
        assert first.width is not None
        assert first.height is not None
        self.width, self.height, self.guidance = first.width, first.height, first.guidance
        exact.scheduler.set_timesteps(settings.steps)  # refuses now what it would refuse at the first picture
        self.patch: Patch = patch(self.pipes[PATCHED], settings.method, preset=settings.preset)
        self.settings = replace(settings, method=self.patch.plan.method, guidance=self.guidance)
        self.second = self._second_part()

    @property
    def num_pictures(self) -> int:
        """Number of pictures that `run` draws, including the warm-up."""
        first = 2 + 2 * len(self.settings.prompts) * self.settings.rounds
        return first + (0 if self.second is None else self.second.num_pictures)

    def run(self, on_picture: Callable[[], None] = lambda: None) -> DemoResult:
        """Draw every prompt both ways, alternating, several times; the very first pair is an uncounted warm-up.

        Args:
            on_picture: called after every picture.

        Raises:
            NotFinite: a picture has NaN or infinite values.
        """
        timings: list[Timings] = []
        pictures: dict[str, list[Tensor]] = {}
        for i, prompt in enumerate(self.settings.prompts):
            seen: dict[str, Tensor] = {}  # the same in every round

            def draw(name: str, prompt: str = prompt, seen: dict[str, Tensor] = seen) -> None:
                seen[name] = self._draw(self.pipes[name], prompt)
                on_picture()

            variants = {name: partial(draw, name) for name in self.pipes}
            timings.append(interleave(variants, self.settings.rounds, warmup=int(i == 0), device=self.device))
            for name, picture in seen.items():
                pictures.setdefault(name, []).append(picture)
        rows = () if self.second is None else self.second.run(on_picture)
        return self._result(timings, torch.cat(pictures[UNPATCHED]), torch.cat(pictures[PATCHED]), rows)

    def _second_part(self) -> Mediators | None:
        """The SiT with the classes on the sheet; None where it is not wanted, or does not go with the first part."""
        settings = self.settings
        shown = settings.prompts[:SHOWN]
        fits = settings.mediators and settings.model == PARTNER and (self.width, self.height) == self.native
        if not fits or not set(shown) <= set(PROMPTS) or MODEL not in embedded_models():
            return None
        return Mediators(shown, settings.steps, settings.seed, self.device, self.dtype)

    def _load(self, model: str) -> DiffusionPipeline:
        pipe = load_demo(model, self.dtype).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _draw(self, pipe: Any, prompt: str) -> Tensor:
        """The picture [1, 3, H, W] in 0..1, on the CPU."""
        settings = {"num_inference_steps": self.settings.steps, "guidance_scale": self.guidance}
        settings |= size_arguments(pipe, self.width, self.height)
        batch = draw_batch(pipe, [prompt], [self.settings.seed], settings)
        if not batch.finite[0]:
            raise NotFinite(pipe, self.settings.seed)
        return batch.images

    def _result(
        self, timings: Sequence[Timings], plain: Tensor, fast: Tensor, rows: tuple[MediatorRow, ...]
    ) -> DemoResult:
        """The result, from times and pictures [P, 3, H, W] of all prompts, and the second part."""
        pairs = self._pairs(timings, plain, fast)
        inside = [pair.foreground_psnr for pair in pairs if pair.foreground_psnr is not None]
        together = Timings(UNPATCHED, tuple(r for times in timings for r in times.rounds))
        baseline, accelerated, speedup = _figures(together)
        ratio = together.time_ratio(PATCHED)
        return DemoResult(
            settings=self.settings,
            pairs=pairs,
            size=plain.shape[-1],
            baseline_s=baseline,
            accelerated_s=accelerated,
            speedup=speedup,
            spread=(1 / ratio.q75, 1 / ratio.q25),
            psnr=_mean([pair.psnr for pair in pairs]),
            ssim=_mean([pair.ssim for pair in pairs]),
            foreground_psnr=(statistics.median(inside), min(inside)) if inside else None,
            device=self.device,
            dtype=self.dtype,
            report=self.patch.report(),
            sheet=self._sheet(plain, fast, (baseline, accelerated), rows),
            mediators=rows,
        )

    def _pairs(self, timings: Sequence[Timings], plain: Tensor, fast: Tensor) -> tuple[Pair, ...]:
        """Times, and similarity at the size that the model was trained at."""
        similarity: Sequence[Sequence[float | None]] = [(None, None, None)] * len(plain)
        if (self.width, self.height) == self.native:
            scores = (psnr(fast, plain), ssim(fast, plain), foreground_psnr(fast, plain))
            similarity = list(zip(*(score.tolist() for score in scores), strict=True))
        rows = zip(self.settings.prompts, timings, similarity, strict=True)
        return tuple(Pair(prompt, *_figures(times), *alike) for prompt, times, alike in rows)

    def _sheet(
        self, plain: Tensor, fast: Tensor, seconds: tuple[float, float], more: tuple[MediatorRow, ...]
    ) -> Image.Image:
        plain, fast = plain[:SHOWN], fast[:SHOWN]
        difference, factor = amplified(fast, plain)
        kind = f"{self.settings.model}, " if more else ""
        rows = {
            f"{kind}unpatched: {seconds[0]:.2f} s": plain,
            f"{self.settings.method}, {self.settings.preset}: {seconds[1]:.2f} s": fast,
            f"difference, x{factor}" if factor > 1 else "difference": difference,
        } | {f"{MODEL}, {row.name}: {row.seconds:.2f} s": row.pictures for row in more}
        pictures = {label: to_pictures(x) for label, x in rows.items()}
        for picture in chain.from_iterable(pictures.values()):
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet = comparison_sheet(list(pictures.items()), self.settings.prompts[:SHOWN])
        bars = {f"{kind}unpatched": seconds[0], f"{kind}{self.settings.preset}": seconds[1]}
        return with_time_bars(sheet, bars | {f"{MODEL}, {row.name}": row.seconds for row in more})


def run_demo(settings: DemoSettings | None = None, on_picture: Callable[[], None] = lambda: None) -> DemoResult:
    """Draw, time and compare; see `Demo`.

    Args:
        settings: by default those of `diffattn demo`.
        on_picture: called after every picture.
    """
    return Demo(settings or DemoSettings()).run(on_picture)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _figures(times: Timings) -> tuple[float, float, float]:
    """Median seconds unpatched and patched, and the median speed-up of successive pairs."""
    return times.seconds(UNPATCHED).median, times.seconds(PATCHED).median, times.speedup(PATCHED)

"""Speed and quality of one model, drawn exact and accelerated with the same seeds, alternating picture by picture."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffattn.app.jobs.choices import AUTOMATIC, Models, method_and_preset
from diffattn.app.jobs.compare import Collected, MakeWatch, draw, pixels, warm_up
from diffattn.app.jobs.naming import naming
from diffattn.app.jobs.quality_run import REFERENCE_FILE, RUNS_FILE, Line, Measurement, QualityRun, read_runs
from diffattn.app.jobs.speed_up import SpeedUp
from diffattn.drawing.classes import class_ids, draws_classes, num_classes
from diffattn.drawing.draw import prepare
from diffattn.drawing.loading import EMBEDDED
from diffattn.drawing.request import UNPATCHED, Picture, Request
from diffattn.evaluation.quality import Protocol, QualityResult, quality
from diffattn.machine import describe_machine
from diffattn.measure.interleave import Timings, rotated
from diffattn.methods import METHODS
from diffattn.metrics.extractors import FeatureExtractor, load_extractor
from diffattn.metrics.features import features_of
from diffattn.metrics.fid import fid_without
from diffattn.metrics.reference import Reference
from diffattn.patching.default_method import default_method

OTHERWISE = "dinov2"
LEAST = 4  # pictures, for precision and recall of 3 neighbours
CHUNK = 16  # pictures of the reference that are drawn before their features are taken
GROUPS = 20  # at most, of pictures that the jackknife leaves out in turn


@dataclass
class _Measuring:
    """The measurement of one model, in progress."""

    pipe: Any
    asked: Measurement
    request: Request
    prompts: tuple[str, ...]
    watch: MakeWatch
    total: int  # pictures
    done: int = 0

    def draw(self, one: Collected, index: int, what: str) -> Picture:
        """Draw picture `index`, with its prompt and seed."""
        one.request = replace(one.request, prompt=self.prompts[index % len(self.prompts)])
        draw(self.pipe, one, self.asked.seed + index, self.watch, what, self.done, self.total)
        self.done += 1
        return one.pictures.pop()


def measure(pipe: Any, name: str, asked: Measurement, models: Models, watch: MakeWatch) -> QualityRun:
    """Measure one model: N pictures of every variant, each timed, and their scores.

    Without a stored reference the pictures are measured against N exact ones with other seeds (seed + N and up): FID
    and KID then show how far acceleration moves the model's output, and those of exact attention how far chance does.

    Args:
        pipe: on its target device; it is left unpatched.
        name: the model's, one of `asked.models`.
        models: gives its stored reference and prompts.
        watch: makes the `Watch` of one picture, as for `compare`.

    Raises:
        ValueError: no prompts; numbers the model cannot run with; as `load_extractor`, `prepare` and `quality`.
    """
    folder = models.place(name)
    prompts = asked.prompts or own_prompts(pipe, folder)
    request = _first_request(name, prompts, asked)
    extractor = load_extractor(extractor_for(name, asked.extractor, models), device=pipe.device)
    reference = stored_reference(folder, extractor, asked.against)
    total = asked.samples * (asked.num_variants + (reference is None))
    job = _Measuring(pipe, asked, request, prompts, watch, total)
    variants = {label: Collected(one) for label, one in variants_of(default_method(pipe), request, asked).items()}
    for one in variants.values():
        warm_up(pipe, one.request, watch)
    if reference is None:
        reference = _exact_reference(job, variants[UNPATCHED], extractor)
    features, timings = _draw_all(job, variants, extractor)
    lines = tuple(
        _line(job, label, variants[label], features[label], timings, reference, extractor) for label in variants
    )
    title = f"{name}, {asked.samples} pictures, {asked.steps} steps, {datetime.now():%Y-%m-%d %H:%M:%S}"
    return QualityRun(title, name, prompts, describe_machine(pipe.device), lines)


def check_measurable(pipe: Any, name: str, asked: Measurement, models: Models) -> list[Request]:
    """The requests of all variants, as `prepare` fills them in; the pipeline is left unpatched.

    Raises:
        ValueError, TypeError: as `measure` would while it measures.
    """
    prompts = asked.prompts or own_prompts(pipe, models.place(name))
    if draws_classes(pipe):
        class_ids(pipe, prompts)
    found = []
    for one in variants_of(default_method(pipe), _first_request(name, prompts, asked), asked).values():
        ready, patch = prepare(pipe, one)
        if patch:
            patch.remove()
        found.append(ready)
    return found


def _first_request(name: str, prompts: Sequence[str], asked: Measurement) -> Request:
    return Request(name, prompts[0], steps=asked.steps, guidance=asked.guidance, seed=asked.seed)


def own_prompts(pipe: Any, folder: Path | None) -> tuple[str, ...]:
    """The classes of a class-conditional model, or the prompts of its stored runs; `ValueError` if it has none."""
    if draws_classes(pipe):
        return tuple(map(str, range(num_classes(pipe))))
    found = stored_runs(folder)
    if not found:
        raise ValueError("this model has no prompts of its own: enter prompts to draw, one per line")
    return found[0].prompts


def stored_runs(folder: Path | None) -> list[QualityRun]:
    """The runs stored beside a model; raises `ValueError` if their file is damaged."""
    path = folder / RUNS_FILE if folder else None
    return read_runs(path) if path and path.is_file() else []


def stored_reference(folder: Path | None, extractor: FeatureExtractor, against: str) -> Reference | None:
    """The reference stored beside a model; None if there is none for this extractor or exact pictures are requested."""
    found = _reference_of(folder) if against == AUTOMATIC else None
    return found if found and found.extractor_hash == extractor.hash else None


def extractor_for(name: str, chosen: str, models: Models) -> str:
    """The extractor's name: the one chosen, or that of the model's reference, or the one for its pictures.

    Raises:
        ValueError: it would have to be downloaded, which is not allowed.
    """
    allowed, found = models.extractors(), chosen
    if chosen == AUTOMATIC:
        reference = _reference_of(models.place(name))
        own = EMBEDDED[name].extractor if name in EMBEDDED else OTHERWISE
        found = reference.extractor if reference else own
    if found not in allowed:
        raise ValueError(
            f"extractor {found!r} would be downloaded, which is not allowed here; for the pictures of {name!r} "
            f"choose one of {', '.join(allowed)}"
        )
    return found


def has_reference(name: str, asked: Measurement, models: Models) -> bool:
    """Whether a stored reference exists, so that none has to be drawn, judged by names; raises like `extractor_for`."""
    extractor = extractor_for(name, asked.extractor, models)
    reference = _reference_of(models.place(name)) if asked.against == AUTOMATIC else None
    return reference is not None and reference.extractor == extractor


def _reference_of(folder: Path | None) -> Reference | None:
    """The reference stored beside a model, if any; raises `ValueError` if it is damaged."""
    path = folder / REFERENCE_FILE if folder else None
    if path is None or not path.is_file():
        return None
    with naming(path.parent, path.parent.name):
        return Reference.load(path)


def variants_of(method: str, request: Request, asked: Measurement) -> dict[str, Request]:
    """Label -> request of every variant, exact attention first.

    Args:
        method: the model's default, which the numbers of agents or mediators belong to.
        request: everything but the way to draw.
        asked: the ways.
    """
    found = {UNPATCHED: replace(request, method=UNPATCHED)}
    for label in asked.accelerations:
        named, preset = method_and_preset(label)
        found[label] = replace(request, method=named, preset=preset)
    for n in asked.numbers:  # at every noise level and in every layer, whether or not it pays
        options = METHODS[method].options_for_size(n)
        found[f"{method} n={n}"] = replace(request, method=method, preset="fast", options=options)
    return found


def _exact_reference(job: _Measuring, exact: Collected, extractor: FeatureExtractor) -> Reference:
    begin, count = job.asked.samples, job.asked.samples
    seeds = f"seeds {job.asked.seed + begin}..{job.asked.seed + begin + count - 1}"

    def pictures() -> Iterator[Tensor]:
        kept = 0
        for index in range(begin, begin + count):
            picture = job.draw(exact, index, "reference")
            if not picture.blanked:
                kept += 1
                yield _uint8(picture)
        _check_enough(kept, count, "the reference")

    return Reference.of(f"exact pictures of {job.request.model}, {seeds}", pictures(), extractor, CHUNK)


def _draw_all(
    job: _Measuring, variants: dict[str, Collected], extractor: FeatureExtractor
) -> tuple[dict[str, Tensor], Timings]:
    """Features [N, d] of every variant without its blanked pictures, and the seconds of every picture, in turns."""
    order, rounds = list(variants), list[dict[str, float]]()
    features: dict[str, list[Tensor]] = {label: [] for label in variants}
    for i in range(job.asked.samples):
        seconds = dict[str, float]()
        for label in rotated(order, i):
            picture = job.draw(variants[label], i, label)
            seconds[label] = picture.seconds
            if not picture.blanked:
                features[label].append(features_of([_uint8(picture)], extractor))
        rounds.append(seconds)
    for label, found in features.items():
        _check_enough(len(found), job.asked.samples, label)
    return {label: torch.cat(found) for label, found in features.items()}, Timings(UNPATCHED, tuple(rounds))


def _check_enough(kept: int, drawn: int, what: str) -> None:
    """Raise `ValueError` if a safety checker left too few pictures to score."""
    if kept < LEAST:
        raise ValueError(
            f"the model's safety checker blanked {drawn - kept} of {drawn} pictures of {what}: at least {LEAST} others "
            "are needed; choose other prompts"
        )


def _line(
    job: _Measuring, label: str, one: Collected, features: Tensor, timings: Timings, reference: Reference,
    extractor: FeatureExtractor,
) -> Line:  # fmt: skip
    scores, options = quality(features, reference)
    scores["fid_std"] = _std_of_fid(features, reference)
    asked, drawn = job.asked, one.request
    assert drawn.width is not None
    assert drawn.height is not None
    size = {"width": drawn.width, "height": drawn.height, "prompts_crc32": zlib.crc32("\n".join(job.prompts).encode())}
    protocol = Protocol.of(
        len(features), reference, extractor, sampler=type(job.pipe.scheduler).__name__, steps=asked.steps,
        guidance=drawn.guidance, seeds=f"{asked.seed}..{asked.seed + asked.samples - 1}", dtype=job.pipe.dtype,
        device=job.pipe.device.type, options=options | size,
    )  # fmt: skip
    blanked = asked.samples - len(features)
    result = QualityResult(f"{job.request.model} {label}", protocol, scores, {"blanked": blanked} if blanked else {})
    faster = SpeedUp.of(*([of_each[way] for of_each in timings.rounds] for way in (UNPATCHED, label)))
    span = (faster.low, faster.high) if faster is not None and label != UNPATCHED else None
    return Line(label, result, timings.seconds(label), timings.speedup(label), one.gflops, span)


def _std_of_fid(features: Tensor, reference: Reference) -> float:
    """How far other seeds may move FID: its standard deviation by the jackknife (Efron & Tibshirani 1993, eq. 11.5),
    which leaves out one group of pictures at a time. Groups are mixed, since prompts repeat at regular intervals."""
    count = len(features)
    groups = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % min(GROUPS, count)
    without = fid_without(features, reference, groups)
    return float(((len(without) - 1) * without.var(correction=0)).sqrt())


def _uint8(picture: Picture) -> Tensor:
    """[1, 3, H, W]"""
    return (pixels(picture.image) * 255).round().to(torch.uint8)

"""Measures the cost and error of every setting in every layer and band of noise levels of one pipeline.

The expected error of the final latents when setting c runs in layer l and band b alone is

    ε(l, b, c) = a(b) · w(l, b) · e(l, b, c)

with e the relative error of the layer's own output, measured for all settings on the exact trajectory; w the share
of it that reaches the denoiser's (guided) output, measured with one setting per layer; and a how the sampler amplifies
that, measured by whole runs in which all layers run that setting in one band.

Over a whole run the errors of one method compound differently from another's. So every method also gets an order of its
own, a route beside the one that mixes them, and whole runs decide between the routes (`tuning.search`).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from diffattn.architectures import denoisers
from diffattn.measure.flops import count_gflops
from diffattn.measure.interleave import interleave
from diffattn.tuning.config import CannotTune
from diffattn.tuning.ladder import Option, Rung, ladder
from diffattn.tuning.probe import FLOPS, Costs, Log, measure_costs, probing
from diffattn.tuning.runs import Call, PipelineRuns, band_at, bands_of, relative_error
from diffattn.tuning.settings import MIXED, Setting, recipe_of, routes_of

LEAST_SAVING = 0.02  # share of a layer's exact cost, and
LEAST_OF_ALL = 3e-4  # of the denoiser's: settings that save less are within the noise

Weights = Mapping[tuple[str, int], float]
"""(layer, band) -> relative error of the denoiser's output per relative error of the layer's."""


@dataclass(frozen=True)
class Calibration:
    """The measurements."""

    layers: tuple[str, ...]  # every self-attention layer of the denoiser
    bounds: tuple[float, ...]  # lowest noise level of every band, falling to 0
    shares: tuple[int, ...]  # calls of a run in each band
    exact: tuple[Tensor, ...]  # final latents of every prompt
    calls: tuple[tuple[Call, ...], ...]  # per probed prompt, one call per band
    cost: float  # of all denoiser calls of an unpatched run, in seconds or GFLOPs
    routes: Mapping[str, tuple[Rung, ...]]  # see `routes_of`; over (layer, band): what to give up first

    def choice(self, rungs: Sequence[Rung]) -> dict[str, list[int | None]]:
        """The setting of every layer and band after these rungs."""
        found: dict[str, list[int | None]] = {layer: [None] * len(self.bounds) for layer in self.layers}
        for rung in rungs:
            layer, band = rung.place
            found[layer][band] = rung.setting
        return found


def self_attention_layers(runs: PipelineRuns) -> tuple[str, ...]:
    """Names of the self-attention layers of the denoiser."""
    return tuple(spec.name for spec, _ in denoisers.self_attention_layers(runs.denoiser))


def groups_of(layers: Sequence[str]) -> dict[str, list[str]]:
    """Layers whose weight is measured together: those of one stack of transformer blocks."""
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        groups[layer.split(".transformer_blocks.")[0]].append(layer)
    return dict(groups)


def calibrate(
    runs: PipelineRuns, settings: Sequence[Setting], bands: int, probed: int, unit: str, rounds: int
) -> Calibration:
    """Measure everything.

    Args:
        runs: of the unpatched pipeline, watched.
        settings: the choices.
        bands: of noise levels.
        probed: prompts whose errors are analysed; the others only get their exact run.
        unit: of cost.
        rounds: of timing.

    Raises:
        CannotTune: latents that are not finite, unpatched or with every setting; no layer, or no layer in which a
            setting costs less than exact attention.
    """
    layers = self_attention_layers(runs)
    first, calls = _exact_run(runs, 0)
    bounds = bands_of([call.level for call in calls], bands)
    where = [band_at(bounds, call.level) for call in calls]
    shares = tuple(where.count(band) for band in range(len(bounds)))
    middles = [[i for i, b in enumerate(where) if b == band][n // 2] for band, n in enumerate(shares)]
    exact, taken = [first], [tuple(calls[i] for i in middles)]
    for i in range(1, len(runs.requests)):
        latents, calls = _exact_run(runs, i)
        exact.append(latents)
        if i < probed:
            taken.append(tuple(calls[m] for m in middles))
    log = _probe(runs, taken, settings)
    costs = measure_costs(log, settings, unit, rounds, runs.device)
    cost = denoiser_cost(runs, taken[0], shares, unit, rounds)
    useful = _useful(log, costs, len(bounds), LEAST_OF_ALL * cost / len(where))
    typical = {layer: _typical(log, layer, found, len(bounds)) for layer, found in useful.items()}
    weights, spread = _weights(runs, taken, layers, settings, log, typical)
    factors = _factors(runs, exact[:probed], layers, bounds, settings, typical, spread)
    places = {
        (layer, b): [
            Option(i, costs.saving(layer, i) * share, factors[b] * weights[layer, b] * log.error(layer, b, i))
            for i in found
        ]
        for layer, found in useful.items()
        for b, share in enumerate(shares)
    }
    routes = {
        name: tuple(ladder({place: [o for o in options if o.setting in allowed] for place, options in places.items()}))
        for name, allowed in routes_of(settings).items()
    }
    if not routes[MIXED]:
        raise CannotTune("no setting keeps the picture finite, in any layer and band of noise levels")
    usable = {name: rungs for name, rungs in routes.items() if rungs}
    return Calibration(layers, bounds, shares, tuple(exact), tuple(taken), cost, usable)


def _exact_run(runs: PipelineRuns, index: int) -> tuple[Tensor, list[Call]]:
    """Final latents and all calls."""
    try:
        latents, calls = runs.latents_and_calls(index)
    except ValueError as error:  # some bad input, such as the number of steps, is only noticed by the scheduler
        raise CannotTune(f"the unpatched pipeline cannot draw {runs.requests[index].prompt!r}: {error}") from error
    if not bool(torch.isfinite(latents).all()):
        raise CannotTune(f"the unpatched pipeline draws values that are not finite: {runs.requests[index].prompt!r}")
    return latents, calls


def denoiser_cost(runs: PipelineRuns, calls: Sequence[Call], shares: Sequence[int], unit: str, rounds: int) -> float:
    """The cost of all denoiser calls of a run of the pipeline in its current state, from one call per band."""
    if unit == FLOPS:
        return sum(n * count_gflops(lambda c=c: runs.replay(c)) for n, c in zip(shares, calls, strict=True))
    timings = interleave({str(b): lambda c=c: runs.replay(c) for b, c in enumerate(calls)}, rounds, device=runs.device)
    return sum(n * timings.seconds(str(b)).median for b, n in enumerate(shares))


def _probe(runs: PipelineRuns, taken: Sequence[Sequence[Call]], settings: Sequence[Setting]) -> Log:
    log = Log()
    with ExitStack() as stack:
        try:
            stack.enter_context(probing(runs.pipe, settings, log))
        except ValueError as error:
            raise CannotTune(str(error)) from None
        for calls in taken:
            for log.band, call in enumerate(calls):
                runs.replay(call)
    return log


def _useful(log: Log, costs: Costs, bands: int, least: float) -> dict[str, list[int]]:
    """Layer -> the settings that save time and always give finite values."""
    found: dict[str, list[int]] = defaultdict(list)
    for layer, i in sorted(costs.settings):
        finite = all(math.isfinite(log.error(layer, b, i)) for b in range(bands))
        if finite and costs.saving(layer, i) > max(LEAST_SAVING * costs.exact[layer], least):
            found[layer].append(i)
    if not found:
        raise CannotTune("no setting costs less than exact attention in any layer, at this size and on this device")
    return dict(found)


def _typical(log: Log, layer: str, settings: Sequence[int], bands: int) -> int:
    """The setting with the median error of the layer's output."""
    ranked = sorted(settings, key=lambda i: sum(log.error(layer, b, i) for b in range(bands)))
    return ranked[len(ranked) // 2]


def _weights(
    runs: PipelineRuns,
    taken: Sequence[Sequence[Call]],
    layers: Sequence[str],
    settings: Sequence[Setting],
    log: Log,
    typical: Mapping[str, int],
) -> tuple[Weights, list[float]]:
    """The weights, and per band the expected relative error of the denoiser's output with all `typical` settings."""
    exact = [[runs.replay(call) for call in calls] for calls in taken]
    weights, squares = {}, [0.0] * len(taken[0])
    for members in groups_of(list(typical)).values():
        choice = {layer: [typical[layer] if layer in members else None] for layer in layers}
        with runs.patched(recipe_of(choice, (0.0,), settings)):
            found = [[runs.replay(call) for call in calls] for calls in taken]
        for b in range(len(squares)):
            reached = _root_mean_square([relative_error(f[b], e[b]) for f, e in zip(found, exact, strict=True)])
            local = math.hypot(*(log.error(layer, b, typical[layer]) for layer in members))
            weights |= {(layer, b): reached / local if local > 0 else 0.0 for layer in members}
            squares[b] += reached**2
    return weights, [math.sqrt(square) for square in squares]


def _factors(
    runs: PipelineRuns,
    exact: Sequence[Tensor],
    layers: Sequence[str],
    bounds: Sequence[float],
    settings: Sequence[Setting],
    typical: Mapping[str, int],
    spread: Sequence[float],
) -> list[float]:
    """Per band: relative error of the final latents per relative error of the denoiser's output within the band."""
    factors = []
    for band in range(len(bounds)):
        choice = {layer: [typical.get(layer) if b == band else None for b in range(len(bounds))] for layer in layers}
        with runs.patched(recipe_of(choice, bounds, settings)):
            final = _root_mean_square([relative_error(runs.latents(i), x) for i, x in enumerate(exact)])
        factors.append(final / spread[band] if spread[band] > 0 else 0.0)
    return factors


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))

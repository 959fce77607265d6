"""The result of a preflight: shares of time, bounds, and the rule that decides whether patching pays off."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from diffattn.machine import where
from diffattn.measure.interleave import Spread
from diffattn.tables import text_table

MIN_SHARE = 0.1

RULE = (
    "patching is worth it where the attention of the layers that the preset accelerates, projections aside, takes "
    f"{MIN_SHARE:.0%} of a call or more, and a patched call took less time in three quarters of the rounds"
)

GROUP_HEAD = ("layers", "level", "tokens", "ms each", "share", "core", "GFLOPs", "patched")
HEAD = ("self-attention layer", "level", "tokens", "ms", "IQR", "share", "core", "GFLOPs", "patched")


@dataclass(frozen=True)
class LayerTime:
    """One self-attention layer in one call of the denoiser."""

    name: str
    level: int
    tokens: int
    seconds: Spread  # of the whole layer, projections included
    share: Spread  # of the call's time, in the same round
    core_share: Spread  # likewise without the layer's projections
    gflops: float | None  # of the whole layer
    why_exact: str | None  # why the preset leaves it exact in this call; None: accelerated


@dataclass(frozen=True)
class Phase:
    """What the preset accelerates from this noise level (1 noise, 0 data) up to the next phase's."""

    noise_level: float
    layers: int


@dataclass(frozen=True)
class Preflight:
    """The cost of one denoiser call on this machine, and what patching could save. `str()` is a table.

    Attributes:
        model: class of the denoiser.
        height, width: of the picture in pixels; of the latents, if the denoiser was given without a pipeline.
        rounds: how often each kind of call was timed; medians and quartiles are over them.
        seconds: of a call without any hook or patch.
        share: of a call's time in all self-attention layers.
        core_share: likewise without their projections, which methods such as agents keep.
        covered_share: likewise in the layers that the preset accelerates.
        time_ratio: of a patched call over an unpatched one in the same round; None where the preset covers no layer.
        layers: all self-attention layers, without cross-attention.
        phases: what the preset accelerates over a run.
        gflops: counted for a call, a multiply-add counts as two; None if the model cannot be counted.
        peak_mib: peak memory of a call beyond weights and inputs; None if unknown.
        weights_mib: memory of the denoiser's weights.
    """

    model: str
    height: int
    width: int
    batch: int
    device: str
    dtype: str
    method: str
    preset: str
    rounds: int
    seconds: Spread
    share: Spread
    core_share: Spread
    covered_share: Spread
    time_ratio: Spread | None
    layers: tuple[LayerTime, ...]
    phases: tuple[Phase, ...]
    gflops: float | None
    peak_mib: float | None
    weights_mib: float
    machine: Mapping[str, Any]

    @property
    def covered(self) -> tuple[LayerTime, ...]:
        """The layers that the preset accelerates in this call."""
        return tuple(layer for layer in self.layers if layer.why_exact is None)

    @property
    def bound(self) -> float | None:
        """The largest speed-up of any method: without self-attention and its projections altogether."""
        return bound(self.share.median)

    @property
    def core_bound(self) -> float | None:
        """The largest speed-up of methods that keep the projections."""
        return bound(self.core_share.median)

    @property
    def covered_bound(self) -> float | None:
        """The largest speed-up in the layers that the preset accelerates: those above this device's thresholds."""
        return bound(self.covered_share.median)

    @property
    def attention_gflops(self) -> float | None:
        """GFLOPs counted in all self-attention layers."""
        counted = [layer.gflops for layer in self.layers if layer.gflops is not None]
        return sum(counted) if len(counted) == len(self.layers) else None

    @property
    def worth_it(self) -> bool:
        """Whether patching is worth it according to `RULE`."""
        ratio = self.time_ratio
        return bool(self.covered) and self.covered_share.median >= MIN_SHARE and ratio is not None and ratio.q75 < 1

    @property
    def verdict(self) -> str:
        """One sentence: whether patching pays off on this machine, and which part of `RULE` decided."""
        name, at_most = f"{self.method} ({self.preset})", _times(self.covered_bound)
        if not self.covered or self.time_ratio is None:
            why = max(self.layers, key=lambda layer: layer.tokens).why_exact
            return (
                f"Not worth patching here: {name} accelerates none of the {len(self.layers)} self-attention layers "
                f"({why}); no method could be more than {_times(self.bound)} as fast."
            )
        share = (
            f"attention takes {self.covered_share.median:.1%} of a call in the {len(self.covered)} of "
            f"{len(self.layers)} layers that {name} accelerates, so at most {at_most} the speed"
        )
        ratio = self.time_ratio
        measured = f"{1 / ratio.median:.2f}x (middle half {1 / ratio.q75:.2f}x to {1 / ratio.q25:.2f}x)"
        if self.covered_share.median < MIN_SHARE:
            return f"Not worth patching here: {share}, measured {measured}."
        if ratio.q75 >= 1:
            return f"Not worth patching here: a patched call was not clearly faster, {measured}, though {share}."
        return f"Worth patching here: {measured} the speed of an unpatched call; {share}."

    def summary(self) -> dict[str, str]:
        """The figures of the whole call, with labels, to be printed."""
        ms, machine = _scaled(self.seconds, 1e3), where(dict(self.machine))
        kept = f"{_percent(self.core_share)} without the projections: at most {_times(self.core_bound)} as fast"
        figures = {
            "denoiser": f"{self.model}, {self.height}x{self.width}, batch {self.batch}",
            "measured on": f"{self.device} ({machine}), {self.dtype}, {self.rounds} rounds",
            "one call": f"{ms.median:.4g} ms (IQR {ms.q25:.4g}-{ms.q75:.4g})",
            "in self-attention": f"{_percent(self.share)}: no method could be more than {_times(self.bound)} as fast",
            "its core": kept,
            f"of that, {self.preset}": (
                f"{_percent(self.covered_share)} in {len(self.covered)} of {len(self.layers)} layers: "
                f"at most {_times(self.covered_bound)} as fast"
            ),
            "over a run": "; ".join(f"noise level {p.noise_level:g} up: {p.layers} layers" for p in self.phases),
            "memory": f"weights {self.weights_mib:.1f} MiB" + _and("a call's peak {:.1f} MiB", self.peak_mib),
        }
        if self.gflops is not None:
            figures["GFLOPs"] = f"{self.gflops:.4g}" + _and("in self-attention {:.4g}", self.attention_gflops)
        return figures

    def rows(self) -> list[tuple[str, ...]]:
        """One row per layer, under `HEAD`."""
        return [_row(layer) for layer in self.layers]

    def group_rows(self) -> list[tuple[str, ...]]:
        """`GROUP_HEAD`, then one row per group of a level's layers treated alike; shares are sums of medians."""
        groups: dict[tuple[int, int, str | None], list[LayerTime]] = {}
        for layer in sorted(self.layers, key=lambda layer: layer.level):
            groups.setdefault((layer.level, layer.tokens, layer.why_exact), []).append(layer)
        return [GROUP_HEAD, *(_group_row(layers) for layers in groups.values())]

    def __str__(self) -> str:
        figures = "\n".join(f"{name}: {text}" for name, text in self.summary().items())
        return "\n\n".join([text_table(HEAD, self.rows()), figures, self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON types, with bounds, rule and verdict; the inverse is `from_dict`."""
        derived = ("bound", "core_bound", "covered_bound", "attention_gflops", "worth_it", "verdict")
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {name: None if plain[name] is None else plain[name].to_dict() for name in _SPREADS}
        plain |= {"layers": [_layer_to_dict(layer) for layer in self.layers], "machine": dict(self.machine)}
        plain |= {"phases": [asdict(phase) for phase in self.phases]}
        return plain | {name: getattr(self, name) for name in derived} | {"rule": RULE}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        own = {f.name: values[f.name] for f in fields(cls)}
        own |= {name: _spread(own[name]) for name in _SPREADS}
        own["layers"] = tuple(_layer_from_dict(layer) for layer in own["layers"])
        own["phases"] = tuple(Phase(**phase) for phase in own["phases"])
        return cls(**own)


_SPREADS = ("seconds", "share", "core_share", "covered_share", "time_ratio")


def bound(share: float) -> float | None:
    """1 / (1 - share): how many times as fast a call is without the part with this share. None for a share of 1."""
    return 1 / (1 - share) if share < 1 else None


def _row(layer: LayerTime) -> tuple[str, ...]:
    ms = _scaled(layer.seconds, 1e3)
    return (
        layer.name,
        str(layer.level),
        str(layer.tokens),
        f"{ms.median:.4g}",
        f"{ms.q25:.4g}-{ms.q75:.4g}",
        f"{layer.share.median:.1%}",
        f"{layer.core_share.median:.1%}",
        "" if layer.gflops is None else f"{layer.gflops:.3g}",
        _fate(layer),
    )


def _group_row(layers: Sequence[LayerTime]) -> tuple[str, ...]:
    first, gflops = layers[0], [layer.gflops for layer in layers if layer.gflops is not None]
    return (
        str(len(layers)),
        str(first.level),
        str(first.tokens),
        f"{1e3 * sum(layer.seconds.median for layer in layers) / len(layers):.4g}",
        f"{sum(layer.share.median for layer in layers):.1%}",
        f"{sum(layer.core_share.median for layer in layers):.1%}",
        f"{sum(gflops):.3g}" if gflops else "",
        _fate(first),
    )


def _fate(layer: LayerTime) -> str:
    return "accelerated" if layer.why_exact is None else f"exact: {layer.why_exact}"


def _layer_to_dict(layer: LayerTime) -> dict[str, Any]:
    return {f.name: x.to_dict() if isinstance(x := getattr(layer, f.name), Spread) else x for f in fields(layer)}


def _layer_from_dict(values: Mapping[str, Any]) -> LayerTime:
    return LayerTime(**{name: _spread(x) if isinstance(x, Mapping) else x for name, x in values.items()})


def _spread(values: Mapping[str, Any] | None) -> Any:
    return None if values is None else Spread(values["median"], *values["iqr"])


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(spread.median * factor, spread.q25 * factor, spread.q75 * factor)


def _percent(spread: Spread) -> str:
    return f"{spread.median:.1%} (IQR {spread.q25:.1%}-{spread.q75:.1%})"


def _times(number: float | None) -> str:
    return "any number of times" if number is None else f"{number:.2f}x"


def _and(text: str, number: float | None) -> str:
    return "" if number is None else ", " + text.format(number)


def shares(part: Sequence[float], whole: Sequence[float]) -> Spread:
    """Part over whole, round by round."""
    return Spread.of([p / w for p, w in zip(part, whole, strict=True)])

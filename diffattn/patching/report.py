"""What a patch did, layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from diffattn.tables import text_table


@dataclass(frozen=True)
class LayerReport:
    """One attention layer of a patched model."""

    name: str
    level: int
    method: str  # the method's name, or "-" for a layer left alone
    tokens: int | None = None  # image tokens at the size of the last run, None before the first
    accelerated: int = 0  # calls
    exact_heads: int = 0  # over all samples: heads that ran exact in accelerated calls
    passed_through: Mapping[str, int] = field(default_factory=dict)  # reason -> calls
    timed: Mapping[str, str] = field(default_factory=dict)  # kind of call -> both times, and their origin
    left_alone: str | None = None  # why the layer was not patched
    displaced_by: str | None = None  # class of the processor that replaced ours

    @property
    def note(self) -> str:
        """Everything that kept the layer exact, as text."""
        if self.left_alone:
            return f"left alone: {self.left_alone}"
        notes = [f"{n} x {reason}" for reason, n in sorted(self.passed_through.items())]
        if self.exact_heads:
            notes.append(
                f"{self.exact_heads / self.accelerated:.3g} heads per accelerated call fell back to exact attention"
            )
        if self.displaced_by:
            notes.insert(0, f"displaced by {self.displaced_by}")
        return "; ".join(notes)


@dataclass(frozen=True)
class Report:
    """What a patch covers and what ran accelerated so far. `str()` is a table, `to_dict()` has JSON types."""

    model: str
    method: str
    preset: str | None
    layers: tuple[LayerReport, ...]
    runs: int  # runs started; a rising noise level starts one
    calls: int  # calls of the denoiser
    removed: bool
    notes: tuple[str, ...] = ()

    @property
    def layers_patched(self) -> int:
        """Layers that carry our processor, displaced ones excluded."""
        return sum(layer.left_alone is None and layer.displaced_by is None for layer in self.layers)

    @property
    def layers_accelerated(self) -> int:
        """Layers with at least one accelerated call."""
        return sum(layer.accelerated > 0 for layer in self.layers)

    @property
    def calls_accelerated(self) -> int:
        """Accelerated calls of all layers."""
        return sum(layer.accelerated for layer in self.layers)

    @property
    def calls_passed_through(self) -> int:
        """Calls of patched layers that ran exact."""
        return sum(sum(layer.passed_through.values()) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Every field and total as JSON types."""
        totals = ("layers_patched", "layers_accelerated", "calls_accelerated", "calls_passed_through")
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def __str__(self) -> str:
        head = ("layer", "level", "tokens", "method", "accelerated", "exact", "time of a call", "why exact")
        rows = [_row(layer) for layer in self.layers if layer.left_alone is None]
        preset = f", preset {self.preset}" if self.preset else ""
        state = " (removed)" if self.removed else ""
        return "\n".join(
            [
                f"{self.model}: {self.method}{preset}{state}",
                text_table(head, rows, drop_empty=False),
                f"{self.layers_patched} layers patched, {self.layers_accelerated} ran accelerated; "
                f"{self.calls_accelerated} calls accelerated, {self.calls_passed_through} exact; "
                f"{self.runs} runs, {self.calls} denoiser calls",
                *_left_alone(self.layers),
                *self.notes,
            ]
        )


def _row(layer: LayerReport) -> tuple[str, ...]:
    tokens = "-" if layer.tokens is None else str(layer.tokens)
    exact = sum(layer.passed_through.values())
    return (
        layer.name,
        str(layer.level),
        tokens,
        layer.method,
        str(layer.accelerated),
        str(exact),
        "; ".join(dict.fromkeys(layer.timed.values())) or "-",
        layer.note,
    )


def _left_alone(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line per reason, for the layers that were never patched."""
    reasons: dict[str, int] = {}
    for layer in layers:
        if layer.left_alone:
            reasons[layer.left_alone] = reasons.get(layer.left_alone, 0) + 1
    return [f"{count} layers left alone: {reason}" for reason, count in reasons.items()]

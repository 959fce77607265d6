"""From what the user asked for to a checked plan, before any model is looked at."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from diffattn.methods import METHODS
from diffattn.methods.base import AttentionMethod, LayerSpec
from diffattn.schedules import EXACT, NoiseSchedule, Schedule, constant, read_schedule

DEFAULT_PRESET = "balanced"
RECIPE_KEYS = ("method", "preset", "options", "layers", "schedule")

LayerFilter = Collection[str] | Callable[[LayerSpec], bool]


@dataclass(frozen=True)
class Plan:
    """What to patch and how."""

    method: str
    preset: str | None
    methods: tuple[AttentionMethod | None, ...]  # one per phase of the schedule; None is exact
    schedule: Schedule
    layers: LayerFilter | None
    options: Mapping[str, Any]  # those the user gave

    @classmethod
    def read(
        cls,
        method: str,
        preset: str | None,
        recipe: str | Path | Mapping[str, Any] | None,
        layers: LayerFilter | None,
        schedule: Schedule | Mapping[Any, Any] | None,
        options: Mapping[str, Any],
    ) -> Self:
        """The plan for the arguments of `patch`, which documents them; raises `ValueError` as it does."""
        if recipe is not None:
            recipe = read_recipe(recipe)
            method = recipe.get("method", method)
            preset = preset or recipe.get("preset")
            layers = layers if layers is not None else recipe.get("layers")
            schedule = schedule if schedule is not None else recipe.get("schedule")
            options = {**recipe.get("options", {}), **options}
        elif preset is None and schedule is None:
            preset = DEFAULT_PRESET
        kind = _lookup("method", method, METHODS)
        base: Mapping[str, Any] = {}
        if preset is not None:
            base = _lookup(f"preset of method {method!r}", preset, kind.presets).options
        kind.from_options({**base, **options})  # names every bad option, even one that no phase uses
        if schedule is None:  # the preset's own schedule gives way to the user's options
            entries = kind.presets[preset].schedule if preset is not None else None
            chosen: Schedule = NoiseSchedule(entries) if entries else constant()
            phases = [None if p is None else {**base, **p, **options} for p in chosen.phases]
        else:
            chosen = _schedule(schedule)
            phases = [None if p is None else {**base, **options, **p} for p in chosen.phases]
        methods = tuple(None if p is None else kind.from_options(p) for p in phases)
        if not any(methods):
            raise ValueError("the schedule is exact at every noise level: nothing would be accelerated")
        return cls(method, preset, methods, chosen, layers, dict(options))

    def fit(self, layers: Sequence[LayerSpec]) -> Self:
        """The plan for the layers of one model.

        Raises:
            ValueError: an option that these layers do not allow.
        """
        return replace(self, methods=tuple(m and m.fit(layers) for m in self.methods))

    def why_not(self, layer: LayerSpec) -> str | None:
        """Why the method can do nothing for the layer in any phase, or None."""
        reasons = [m.why_not(layer) for m in self.methods if m is not None]
        return reasons[0] if all(reasons) else None

    def options_at(self, phase: int) -> dict[str, Any] | str:
        """What applies in a phase as JSON types: "exact", or the options that are not the method's defaults."""
        method = self.methods[phase]
        if method is None:
            return EXACT
        values = {f.name: (getattr(method, f.name), f.default) for f in fields(method)}  # type: ignore[arg-type]
        return {name: value for name, (value, default) in values.items() if value != default}

    def chooses(self, layer: LayerSpec) -> bool:
        """Whether the layer is among those asked for."""
        if self.layers is None:
            return True
        return bool(self.layers(layer)) if callable(self.layers) else layer.name in self.layers

    def check_names(self, names: Collection[str]) -> None:
        """Raise `ValueError` if `layers` names one that the model does not have."""
        if self.layers is None or callable(self.layers):
            return
        wrong = [self.layers] if isinstance(self.layers, str) else sorted(set(self.layers) - set(names))
        if wrong:
            raise ValueError(f"layers names {', '.join(wrong)}; the self-attention layers are: {', '.join(names)}")


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe as a mapping, read from a JSON file if it is a path.

    Raises:
        ValueError: not readable as JSON, or with keys other than `RECIPE_KEYS` and "protocol" (which is for
            people: how the recipe was found).
    """
    if isinstance(recipe, str | Path):
        try:
            recipe = json.loads(Path(recipe).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"recipe {str(recipe)!r} is not a readable JSON file: {error}") from None
    if not isinstance(recipe, Mapping):
        raise ValueError(f"a recipe is a mapping with the keys {', '.join(RECIPE_KEYS)}, got {recipe!r}")
    if unknown := sorted(set(recipe) - {*RECIPE_KEYS, "protocol"}):
        raise ValueError(f"unknown recipe key {', '.join(unknown)}; allowed: {', '.join(RECIPE_KEYS)}")
    if not isinstance(recipe.get("options", {}), Mapping):
        raise ValueError(f"a recipe's options are a mapping from name to value, got {recipe['options']!r}")
    return recipe


def _schedule(schedule: Any) -> Schedule:
    if isinstance(schedule, Mapping):
        return read_schedule(schedule)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule or a mapping from noise level to options, got {schedule!r}")
    return schedule


def _lookup(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what}: {name!r}; allowed: {', '.join(table)}")
    return table[name]

"""Turns the user's arguments into a checked plan, before any model is inspected."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from diffattn.architectures.decisions import Decision, read_given
from diffattn.methods import METHODS, method_for
from diffattn.methods.base import AttentionMethod, LayerSpec
from diffattn.patching.recipe import LayerRecipe, is_tuned, names_of, read_recipe
from diffattn.schedules import EXACT, NoiseSchedule, Schedule, constant, read_schedule

DEFAULT_PRESET = "balanced"

LayerFilter = Collection[str] | Callable[[LayerSpec], bool]


@dataclass(frozen=True)
class Plan:
    """What to patch and how."""

    method: str
    preset: str | None
    methods: tuple[AttentionMethod | None, ...]  # one per phase of the schedule; None is exact
    schedule: Schedule
    layers: LayerFilter | None
    options: Mapping[str, Any]  # as given by the user
    by_layer: LayerRecipe | None = None  # a tuned recipe, which has its own methods for every layer
    decisions: Mapping[str, Decision] = field(default_factory=dict)  # given, so that they are not made again

    @classmethod
    def read(
        cls,
        method: str | None,
        preset: str | None,
        recipe: str | Path | Mapping[str, Any] | None,
        layers: LayerFilter | None,
        schedule: Schedule | Mapping[Any, Any] | None,
        options: Mapping[str, Any],
        of_model: Sequence[LayerSpec] = (),
        decisions: Mapping[str, bool | float] | None = None,
    ) -> Self:
        """The plan for the arguments of `patch`, which documents them and the `ValueError`s.

        Args:
            of_model: the layers of the model, used to choose a method if neither `method` nor the recipe names
                one.
        """
        if recipe is not None:
            recipe = read_recipe(recipe)
            if is_tuned(recipe):
                alone = preset is None and schedule is None and not options
                return replace(cls._tuned(recipe, layers, alone), decisions=read_given(decisions))
            decisions = decisions if decisions is not None else recipe.get("decisions")
            method = method if recipe.get("method") is None else recipe["method"]
            preset = preset or recipe.get("preset")
            layers = layers if layers is not None else recipe.get("layers")
            schedule = schedule if schedule is not None else recipe.get("schedule")
            options = {**recipe.get("options", {}), **options}
        elif preset is None and schedule is None:
            preset = DEFAULT_PRESET
        _check_filter(layers)
        if method is None:
            method = method_for([layer for layer in of_model if _is_chosen(layer, layers)] or of_model)
        kind = _lookup("method", method, METHODS)
        base: Mapping[str, Any] = {}
        if preset is not None:
            base = _lookup(f"preset of method {method!r}", preset, kind.presets).options
        kind.from_options({**base, **options})  # report every bad option, even one that no phase uses
        if schedule is None:  # the user's options replace the preset's own schedule
            entries = kind.presets[preset].schedule if preset is not None else None
            chosen: Schedule = NoiseSchedule(entries) if entries else constant()
            phases = [None if p is None else {**base, **p, **options} for p in chosen.phases]
        else:
            chosen = _schedule(schedule)
            phases = [None if p is None else {**base, **options, **p} for p in chosen.phases]
        methods = tuple(None if p is None else kind.from_options(p) for p in phases)
        if not any(methods):
            raise ValueError("the schedule is exact at every noise level: nothing would be accelerated")
        return cls(method, preset, methods, chosen, layers, dict(options), decisions=read_given(decisions))

    @classmethod
    def _tuned(cls, recipe: Mapping[str, Any], layers: LayerFilter | None, alone: bool) -> Self:
        """The plan of a tuned recipe. In each phase, `methods` has the method of the first accelerated layer."""
        if not alone:
            raise ValueError("a tuned recipe is complete: it cannot be combined with a preset, schedule or options")
        _check_filter(layers)
        found = LayerRecipe.read(recipe)
        phases = range(len(found.schedule.phases))
        methods = tuple(next((m[p] for m in found.methods.values() if m[p]), None) for p in phases)
        return cls(found.method_names, None, methods, found.schedule, layers, {}, found)

    def methods_of(self, layer: LayerSpec) -> tuple[AttentionMethod | None, ...]:
        """The method of a layer in every phase, None where it runs exact."""
        methods = self.methods
        if self.by_layer is not None:
            methods = self.by_layer.methods.get(layer.name, (None,) * len(methods))
        return tuple(m if m is not None and not m.reason_layer(layer) else None for m in methods)

    def method_name(self, layer: LayerSpec) -> str:
        """The name of the method that covers a layer; several names are joined by "+"."""
        return self.method if self.by_layer is None else names_of(self.methods_of(layer))

    def fit(self, layers: Sequence[LayerSpec]) -> Self:
        """The plan for the layers of one model.

        Raises:
            ValueError: an option that these layers do not allow.
        """
        fitted = replace(self, methods=tuple(m and m.fit(layers) for m in self.methods))
        if self.by_layer is None:
            return fitted
        of_layer = {layer.name: layer for layer in layers}
        methods = {
            name: tuple(m and m.fit([of_layer[name]]) for m in entry) for name, entry in self.by_layer.methods.items()
        }
        return replace(fitted, by_layer=replace(self.by_layer, methods=methods))

    def reason_exact(self, layer: LayerSpec) -> str | None:
        """Why the layer runs exact in every phase, or None."""
        if not _is_chosen(layer, self.layers):
            return "not among the chosen layers"
        methods = self.methods if self.by_layer is None else self.by_layer.methods.get(layer.name, ())
        reasons = [m.reason_layer(layer) for m in methods if m is not None]
        if not reasons:
            return "exact by recipe"
        return reasons[0] if all(reasons) else None

    def options_at(self, phase: int) -> dict[str, Any] | str:
        """The setting of a phase as JSON types: "exact", or the options that differ from the method's defaults.

        For a tuned recipe, this is a mapping from every layer's name to its setting.
        """
        if self.by_layer is not None and self.methods[phase] is not None:
            return {name: _non_defaults(methods[phase]) for name, methods in self.by_layer.methods.items()}
        return _non_defaults(self.methods[phase])

    def out_of_range(self, num_tokens: int) -> str | None:
        """What is wrong with an option of the user that leaves nothing to accelerate, or None.

        Args:
            num_tokens: tokens of the largest layer at this picture size.
        """
        found = (method.out_of_range(self.options, num_tokens) for method in self.methods if method is not None)
        return next((message for message in found if message), None)

    def check_names(self, names: Collection[str]) -> None:
        """Raise `ValueError` if `layers` or the recipe names one that the model does not have."""
        if self.by_layer is not None:
            self.by_layer.check_layers(names)
        if self.layers is None or callable(self.layers):
            return
        wrong = [self.layers] if isinstance(self.layers, str) else sorted(set(self.layers) - set(names))
        if wrong:
            raise ValueError(
                f"layers must be a list of self-attention layers of this model, got {', '.join(wrong)}; "
                f"they are: {', '.join(names)}"
            )


def _check_filter(layers: Any) -> None:
    """Raise `ValueError` if this does not select layers."""
    is_names = isinstance(layers, Collection) and all(isinstance(name, str) for name in layers)
    if layers is not None and not callable(layers) and not is_names:
        raise ValueError(f"layers must be a list of names, or a function of a LayerSpec, got {layers!r}")


def _is_chosen(layer: LayerSpec, layers: LayerFilter | None) -> bool:
    """Whether a filter selects a layer; None selects all."""
    if layers is None:
        return True
    return bool(layers(layer)) if callable(layers) else layer.name in layers


def _non_defaults(method: AttentionMethod | None) -> dict[str, Any] | str:
    """The options that differ from the defaults, or "exact"."""
    if method is None:
        return EXACT
    values = {f.name: (getattr(method, f.name), f.default) for f in fields(method)}  # type: ignore[arg-type]
    return {name: value for name, (value, default) in values.items() if value != default}


def _schedule(schedule: Any) -> Schedule:
    if isinstance(schedule, Mapping):
        return read_schedule(schedule)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule or a mapping from noise level to options, got {schedule!r}")
    return schedule


def _lookup(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {what}: {name!r}; allowed: {', '.join(table)}")
    return table[name]

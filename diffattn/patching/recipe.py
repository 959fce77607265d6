"""Recipes for `diffattn.patch(recipe=...)`, written by hand or by `diffattn.tune`.

A handwritten recipe contains arguments of `patch`. A tuned one gives the setting of every self-attention layer by
noise level:

    {"diffattn_recipe": 1,
     "settings": {"agent-1": {"method": "agent", "options": {"num_agents": null, "agent_ratio": 0.9375}}},
     "layers": {"mid_block.attentions.0.transformer_blocks.0.attn1": {"0.6": "agent-1", "0.0": "exact"}, ...},
     "promised": {...}, "verified": {...}, "protocol": {...}}

"layers" are read like the entries of a `NoiseSchedule`; the last three are for people and for programs that compare.
"""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from diffattn.files import decode_text, read_text
from diffattn.methods import METHODS
from diffattn.methods.base import AttentionMethod
from diffattn.schedules import EXACT, MAX_PHASES, NoiseSchedule

VERSION_KEY, VERSION = "diffattn_recipe", 1
"""The key that marks a tuned recipe, and the version written and read here."""

KEYS = ("method", "preset", "options", "layers", "schedule", "decisions")
"""Keys of a handwritten recipe; "protocol" says how it was made."""

TUNED_KEYS = (VERSION_KEY, "settings", "layers", "promised", "verified", "protocol")

SHOWN = 4  # names in an error message
MAX_NAMES = 1024  # of layers or settings: more than any model has


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe as a mapping, read from a JSON file if it is a path.

    Raises:
        ValueError: not readable as JSON; keys that no recipe has, or values of another type; a tuned one of another
            version.
    """
    if isinstance(recipe, str | Path):
        try:
            recipe = read_text(decode_text(Path(recipe).read_bytes()))
        except (OSError, ValueError) as error:
            raise ValueError(f"recipe {str(recipe)!r} is not a readable JSON file: {error}") from None
    if not isinstance(recipe, Mapping):
        raise ValueError(f"a recipe must be a mapping with any of the keys {', '.join(KEYS)}, got {_short(recipe)}")
    version = recipe.get(VERSION_KEY, VERSION)
    if type(version) is not int or version != VERSION:
        raise ValueError(f"recipe has version {_short(version)}; this diffattn reads version {VERSION}")
    allowed = TUNED_KEYS if is_tuned(recipe) else (*KEYS, "protocol")
    if unknown := sorted(map(str, set(recipe) - set(allowed))):
        raise ValueError(f"unknown recipe key {_some(unknown)}; allowed: {', '.join(allowed)}")
    if not is_tuned(recipe):
        _check_types(recipe)
    return recipe


def _check_types(recipe: Mapping[str, Any]) -> None:
    """Check a handwritten recipe; the meaning of its names is checked where they are looked up."""
    for key in ("method", "preset"):
        if not isinstance(recipe.get(key, ""), str | None):
            raise ValueError(f"a recipe's {key} must be a name, got {_short(recipe[key])}")
    if not isinstance(recipe.get("options", {}), Mapping):
        raise ValueError(f"a recipe's options must be a mapping from name to value, got {_short(recipe['options'])}")
    layers = recipe.get("layers")
    if layers is None or isinstance(layers, str) or callable(layers):
        return
    if not isinstance(layers, Collection) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"a recipe's layers must be a list of names, got {_short(layers)}")
    _check_number("layers", layers)


def _short(value: object) -> str:
    """A value shortened for a message; layer names stay whole."""
    found = reprlib.Repr()
    found.maxstring = 100
    return found.repr(value)


def _some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(str(name)[:100] for name in names[:SHOWN]) + rest


def _check_number(what: str, names: Collection[Any]) -> None:
    if len(names) > MAX_NAMES:
        raise ValueError(f"a recipe may have at most {MAX_NAMES} {what}, got {len(names)}")


def is_tuned(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe has its own settings for every layer."""
    return VERSION_KEY in recipe


@dataclass(frozen=True)
class LayerRecipe:
    """The content of a tuned recipe: a method, or None for exact attention, per layer and phase."""

    schedule: NoiseSchedule  # the phases: all bounds of all layers
    methods: Mapping[str, tuple[AttentionMethod | None, ...]]  # layer -> one per phase

    @classmethod
    def read(cls, recipe: Mapping[str, Any]) -> Self:
        """Parse a mapping returned by `read_recipe`.

        Raises:
            ValueError: settings or layers that are missing or not of the form above; a method, option or noise level
                that is not allowed; exact attention everywhere.
        """
        settings = {name: _method(name, entry) for name, entry in _mapping(recipe, "settings").items()}
        layers = {name: _schedule(name, entry, settings) for name, entry in _mapping(recipe, "layers").items()}
        bounds = sorted({bound for schedule in layers.values() for bound in schedule.bounds}, reverse=True)
        if len(bounds) > MAX_PHASES:
            raise ValueError(f"the layers of a recipe may have at most {MAX_PHASES} noise levels, got {len(bounds)}")
        methods = {
            name: tuple(_setting_at(schedule, bound, settings) for bound in bounds) for name, schedule in layers.items()
        }
        used = [any(m[phase] for m in methods.values()) for phase in range(len(bounds))]
        if not any(used):
            raise ValueError("the recipe is exact in every layer and at every noise level: nothing to accelerate")
        return cls(NoiseSchedule({b: {} if u else EXACT for b, u in zip(bounds, used, strict=True)}), methods)

    @property
    def method_names(self) -> str:
        """Names of all its methods, such as "agent" or "agent+corrected"."""
        return names_of(m for methods in self.methods.values() for m in methods)

    def check_layers(self, names: Collection[str]) -> None:
        """Raise `ValueError` unless the model has exactly these self-attention layers; ControlNets are ignored."""
        own = [name for name in names if not name.startswith("controlnet.")]
        missing = [name for name in self.methods if name not in own]
        unexpected = [name for name in own if name not in self.methods]
        if missing or unexpected:
            problems = [_listed("the model lacks", missing), _listed("the recipe does not know", unexpected)]
            raise ValueError(f"the recipe was tuned for another model: {'; '.join(filter(None, problems))}")


def names_of(methods: Any) -> str:
    """The names of some methods, each once, joined by "+"."""
    return "+".join(sorted({m.name for m in methods if m is not None}))


def _mapping(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = recipe.get(key)
    if not isinstance(found, Mapping) or (key == "layers" and not found):
        raise ValueError(f"a tuned recipe's {key} must be a mapping with names as keys, got {_short(found)}")
    _check_number(key, found)
    return found


def _method(name: str, entry: Any) -> AttentionMethod:
    if not isinstance(entry, Mapping) or set(entry) != {"method", "options"}:
        raise ValueError(f"setting {_short(name)} of a recipe must have a method and options, got {_short(entry)}")
    if not isinstance(entry["method"], str) or entry["method"] not in METHODS:
        raise ValueError(f"unknown method: {_short(entry['method'])}; allowed: {', '.join(METHODS)}")
    if not isinstance(entry["options"], Mapping):
        options = _short(entry["options"])
        raise ValueError(f"options of setting {_short(name)} must be a mapping from name to value, got {options}")
    return METHODS[entry["method"]].from_options(entry["options"])


def _schedule(layer: str, entry: Any, settings: Mapping[str, AttentionMethod]) -> NoiseSchedule:
    """The entries as options {"setting": name}, so that `NoiseSchedule` checks their noise levels."""
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"layer {_short(layer)} of a recipe needs a mapping from noise level to setting, got {_short(entry)}"
        )
    for found in entry.values():
        if found != EXACT and (not isinstance(found, str) or found not in settings):
            allowed = f"{_some([*settings])}, {EXACT}"
            raise ValueError(f"layer {_short(layer)} of a recipe: unknown setting {_short(found)}; allowed: {allowed}")
    return NoiseSchedule({bound: EXACT if s == EXACT else {"setting": s} for bound, s in entry.items()})


def _setting_at(
    schedule: NoiseSchedule, bound: float, settings: Mapping[str, AttentionMethod]
) -> AttentionMethod | None:
    options = schedule.phases[schedule.phase_at(bound)]
    return None if options is None else settings[options["setting"]]


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what} {_some(names)}"

"""The settings that the tuner chooses from, and recipes made from its choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.methods import METHODS
from diffattn.methods.base import AttentionMethod
from diffattn.patching.recipe import VERSION, VERSION_KEY
from diffattn.schedules import EXACT

MIXED = "mixed"
"""The route that may use every setting."""

Choice = Mapping[str, Sequence[int | None]]
"""Layer -> the index of a setting, or None for exact attention, per band of noise levels, the noisiest first."""


@dataclass(frozen=True)
class Setting:
    """A method with options, with its own name in the recipe."""

    name: str
    method: AttentionMethod
    options: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The method, and where it has several sources of agents, which: errors within a family compound alike."""
        source = getattr(self.method, "source", None)
        return f"{self.method.name}/{source}" if source else self.method.name


def settings_of(candidates: Sequence[tuple[str, Mapping[str, Any]]] | None = None) -> list[Setting]:
    """Settings from pairs of a method's name and options.

    Args:
        candidates: None: each method's own suggestions, see `AttentionMethod.candidates`.

    Raises:
        ValueError: an unknown method, invalid options, or no candidates.
    """
    if candidates is None:
        candidates = [(name, options) for name in METHODS for options in METHODS[name].candidates()]
    settings: list[Setting] = []
    for name, options in candidates:
        if name not in METHODS:
            raise ValueError(f"unknown method: {name!r}; allowed: {', '.join(METHODS)}")
        number = 1 + sum(s.method.name == name for s in settings)
        settings.append(Setting(f"{name}-{number}", METHODS[name].from_options(options), dict(options)))
    if not settings:
        raise ValueError("there is nothing to choose from: no candidates")
    return settings


def routes_of(settings: Sequence[Setting]) -> dict[str, list[int]]:
    """Name -> the settings it may use: `MIXED` has all; if there are several families, each also has its own."""
    families: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        families.setdefault(setting.family, []).append(i)
    return {MIXED: list(range(len(settings)))} | (families if len(families) > 1 else {})


def recipe_of(choice: Choice, bounds: Sequence[float], settings: Sequence[Setting]) -> dict[str, Any]:
    """A tuned recipe for `diffattn.patch`, without its promises.

    Args:
        choice: for every self-attention layer of the model.
        bounds: the lowest noise level of each band, falling to 0.
        settings: what the indices of `choice` mean; only those used are written.
    """
    used = sorted({index for entry in choice.values() for index in entry if index is not None})
    return {
        VERSION_KEY: VERSION,
        "settings": {
            settings[i].name: {"method": settings[i].method.name, "options": dict(settings[i].options)} for i in used
        },
        "layers": {name: _entries(entry, bounds, settings) for name, entry in choice.items()},
    }


def _entries(entry: Sequence[int | None], bounds: Sequence[float], settings: Sequence[Setting]) -> dict[str, str]:
    """The entries {lowest noise level: name}, with adjacent bands of the same setting merged."""
    names = [EXACT if i is None else settings[i].name for i in entry]
    following = [*names[1:], None]
    return {
        str(b): name
        for b, name, after in zip(bounds, names, following, strict=True)
        if name != after or b == bounds[-1]
    }

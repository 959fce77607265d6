"""Which accelerations work for a model, judged by its files alone: nothing is loaded, no weights are read."""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from diffattn.app.jobs.choices import AUTOMATIC, Models, accelerations
from diffattn.architectures.denoisers import self_attention_layers
from diffattn.drawing.request import UNPATCHED
from diffattn.files import read_json
from diffattn.methods import METHODS, method_for
from diffattn.methods.base import LayerSpec
from diffattn.models import DiT

DENOISERS = ("unet", "transformer")
REMEMBERED = 32  # models


def suited_accelerations(folder: Path | None) -> list[str]:
    """The values of `accelerations` that can accelerate some layer of the model in a folder.

    All of them if the folder is None, or if its files do not identify the denoiser; `patch` checks again.
    """
    layers = _layers(folder) if folder is not None else None
    if layers is None:
        return accelerations()
    working = [name for name, kind in METHODS.items() if _works(name, layers)]
    named = [f"{name}/{preset}" for name in working for preset in METHODS[name].presets]
    return [*([AUTOMATIC] if named else []), UNPATCHED, *named]


def suited_to_all(folders: Iterable[Path | None]) -> list[str]:
    """The values of `accelerations` that work for all of these models: perhaps only "automatic", which may be another
    method for each."""
    found = [suited_accelerations(folder) for folder in folders]
    return [name for name in accelerations() if all(name in working for working in found)]


def check_suited(models: Models, name: str, chosen: Collection[str]) -> None:
    """Raise `ValueError` for an acceleration that cannot work for a model, naming those that can."""
    working = suited_accelerations(models.place(name))
    for acceleration in chosen:
        if acceleration in accelerations() and acceleration not in working:
            allowed = ", ".join(working)
            raise ValueError(f"{acceleration!r} does not work for model {name!r}; choose from: {allowed}")


def own_method(folder: Path | None) -> str | None:
    """The default method of the model in a folder; None if its files do not identify the denoiser."""
    layers = _layers(folder) if folder is not None else None
    return None if layers is None else method_for(layers)


def compared_at_first(folder: Path | None) -> list[str]:
    """The accelerations preselected in a comparison: balanced and fast of the model's default method; if that is not
    known, whatever suits it; none if no acceleration works for it."""
    method, working = own_method(folder), suited_accelerations(folder)
    if method is None:
        return [AUTOMATIC]
    return [name for name in (f"{method}/balanced", f"{method}/fast") if name in working]


def plain_name(acceleration: str, own: str | None = None) -> str:
    """The words for an acceleration: "Exact (no acceleration)", "Balanced", "Fast", "Pooled (agent)".

    Args:
        acceleration: one of `accelerations`, or another name, which stays as it is.
        own: the model's default method, whose name is omitted.
    """
    if acceleration == UNPATCHED:
        return "Exact (no acceleration)"
    if acceleration not in accelerations():
        return acceleration
    method, _, preset = acceleration.partition("/")
    if not preset:
        return acceleration.capitalize()
    return preset.capitalize() if method == own else f"{preset.capitalize()} ({method})"


def _works(name: str, layers: tuple[LayerSpec, ...]) -> bool:
    kind = METHODS[name]
    return kind.suits(layers) and any(layer.kind == kind.replaces for layer in layers)


def _layers(folder: Path) -> tuple[LayerSpec, ...] | None:
    """The self-attention layers of a model's denoiser; None if its files do not identify it."""
    for part in DENOISERS:
        path = folder / part / "config.json"
        if path.is_file():
            try:
                return _layers_of(json.dumps(read_json(path), sort_keys=True))
            except ValueError:
                return None
    return None


@lru_cache(maxsize=REMEMBERED)
def _layers_of(config: str) -> tuple[LayerSpec, ...] | None:
    """The layers of a denoiser with this configuration, built without memory for its weights."""
    found: Mapping[str, Any] = json.loads(config)
    kind = _kind(found.get("_class_name"))
    if kind is None:
        return None
    try:
        with torch.device("meta"):
            model = kind.from_config(dict(found))
        return tuple(spec for spec, _ in self_attention_layers(model))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError, ZeroDivisionError):
        return None  # a configuration that no model can have; loading it says why


def _kind(name: object) -> Any:
    """The class of a denoiser: ours, or one of diffusers' models; no other class is ever looked up."""
    if name == DiT.__name__:
        return DiT
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None

"""The capabilities of this installation, as JSON types."""

from dataclasses import fields
from typing import Any

import torch

from diffattn.architectures import ARCHITECTURES
from diffattn.drawing.loading import EMBEDDED, embedded_models
from diffattn.files import is_there
from diffattn.machine import describe_devices, versions
from diffattn.methods import METHODS
from diffattn.methods.base import AttentionMethod
from diffattn.methods.thresholds import load_thresholds, user_file
from diffattn.models.attention import ATTENTION
from diffattn.patching.decision_cache import cache_for


def capabilities() -> dict[str, Any]:
    """Versions, devices, denoisers, methods with options, embedded models, thresholds, decisions; JSON types.

    Raises:
        ValueError: this machine's file of thresholds or decisions is damaged.
    """
    own = user_file()
    return {
        "versions": versions(),
        "devices": describe_devices(),
        "architectures": [architecture.title for architecture in ARCHITECTURES],
        "backbone_attention": {name: _summary(kind) for name, kind in ATTENTION.items()},
        "methods": {name: _describe(method) for name, method in METHODS.items()},
        "embedded_models": {
            name: {"what": model.what, "installed": name in embedded_models()} for name, model in EMBEDDED.items()
        },
        "decisions": _decisions(),
        "thresholds": {"file": str(own) if is_there(own) else "shipped with diffattn", "devices": load_thresholds()},
    }


def _decisions() -> dict[str, Any]:
    """Where `diffattn.patch` stores what is faster, and how many kinds of calls are known on each device."""
    cache = cache_for(None)
    if cache is None:
        return {"file": None, "known": {}}
    return {
        "file": str(cache.path),
        "known": {name: len(cache.read(torch.device(name))) for name in describe_devices()},
    }


def _summary(kind: type) -> str:
    """The first sentence of a class's docstring."""
    return " ".join((kind.__doc__ or "").split(".\n")[0].split()).rstrip(".")


def _describe(method: type[AttentionMethod]) -> dict[str, Any]:
    """Options with their defaults, and for each preset what it sets and its options by noise level."""
    return {
        "options": {f.name: f.default for f in fields(method)},  # type: ignore[arg-type]
        "presets": {
            name: {
                "options": dict(preset.options),
                "schedule": None if preset.schedule is None else {str(u): x for u, x in preset.schedule.items()},
            }
            for name, preset in method.presets.items()
        },
    }

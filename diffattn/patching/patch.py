"""`patch` and `unpatch`; only they and the `Patch` they create modify a user's model."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffattn.architectures.denoisers import Pipeline, denoisers_of, draws, uncompiled
from diffattn.patching.default_method import layers_of
from diffattn.patching.denoiser import runs_of
from diffattn.patching.handle import CHANGING, Patch
from diffattn.patching.hook import hooks_of
from diffattn.patching.plan import LayerFilter, Plan
from diffattn.schedules import Schedule

__all__ = ["Patch", "find_patch", "patch", "unpatch"]

_MADE: weakref.WeakSet[Patch] = weakref.WeakSet()
"""Every patch, also of what its pipeline no longer draws with."""


def patch(
    pipe_or_model: Pipeline | nn.Module,
    method: str | None = None,
    *,
    preset: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    layers: LayerFilter | None = None,
    schedule: Schedule | Mapping[Any, Any] | None = None,
    calibrate: bool | str | Path | None = None,
    decisions: Mapping[str, bool | float] | None = None,
    **options: Any,
) -> Patch:
    """Make a diffusers or diffattn pipeline, or its denoiser, use another attention.

    Undo it with `patch.remove()`, `unpatch`, or by leaving the `with` block. A pipeline made with `from_pipe`
    shares the denoiser and hence the patch. Compile first, then patch.

    Args:
        pipe_or_model: a pipeline with a supported denoiser, or a denoiser. The ControlNets that the pipeline has now
            are patched with it, except those that belong to the patch of another pipeline.
        method: a name in `diffattn.METHODS`; None: the one that suits the model, see `default_method`.
        preset: a named set of options; "balanced" if neither `preset`, `recipe` nor `schedule` is given.
        recipe: a mapping, or the path of a JSON file, with any of method, preset, options, layers, schedule.
            Other arguments override it, except `method`. A recipe from `diffattn.tune` has settings for every layer;
            it may only be combined with `layers`, which leaves all other layers exact.
        layers: names of layers (as in the report), or a predicate on `LayerSpec`; default: all supported ones.
        schedule: options by noise level (1 noise ... 0 data) or by the latents' change: a `Schedule`, the mapping of
            `NoiseSchedule`, or that of `LatentChangeSchedule.to_dict`.
        calibrate: whether to time the method and exact attention at the first call of each kind (device, dtype, sizes),
            and to use the faster one from then on. The answers are kept in the user's cache (`~/.cache/diffattn`), or
            in the file whose path is given. False: follow the package's own table and `decisions`. None: True, unless
            the environment variable `DIFFATTN_CALIBRATE` is "0" or a path. The option `min_tokens` overrides both; in
            compiled code, with gradients and in several processes nothing is timed.
        decisions: what `Patch.decisions` returned, to repeat them.
        **options: fields of the method's configuration; they override the preset's.

    Returns:
        The handle: `report()`, `remove()`, and a context manager.

    Raises:
        TypeError: the architecture is not supported.
        ValueError: unknown method, preset, option or layer; an option out of range; a recipe that cannot be read or
            was tuned for a model with other layers; no layer to patch; a model that is already patched; decisions of
            another form; a damaged cache.
    """
    every = denoisers_of(pipe_or_model)
    with CHANGING:
        for prefix, model in every.items():
            if draws(prefix) and _patches_of(model):
                raise ValueError(
                    f"this {type(uncompiled(model)).__name__} is already patched, perhaps through a pipeline that "
                    "shares it; call diffattn.unpatch first"
                )
        for found in _left_behind(pipe_or_model):
            found.remove()
        patched = [prefix for prefix, model in every.items() if _patches_of(model)]
        denoisers = {prefix: model for prefix, model in every.items() if prefix not in patched}
        plan = Plan.read(method, preset, recipe, layers, schedule, options, layers_of(denoisers), decisions)
        left_out = [prefix.removesuffix(".") for prefix in patched]
        made = Patch(pipe_or_model, denoisers, plan, calibrate, left_out)
        _MADE.add(made)
    return made


def unpatch(pipe_or_model: Pipeline | nn.Module) -> None:
    """Remove the patch of a pipeline or denoiser, if it has one; also where the pipeline's denoiser was replaced since.
    A ControlNet that belongs to the patch of another pipeline stays patched.

    Raises:
        TypeError: the architecture is not supported.
    """
    with CHANGING:
        for found in (*_drawing_patches(pipe_or_model), *_left_behind(pipe_or_model)):
            found.remove()


def find_patch(pipe_or_model: Pipeline | nn.Module) -> Patch | None:
    """The patch of a pipeline or denoiser, if it has one.

    Raises:
        TypeError: the architecture is not supported.
    """
    return next(iter(_drawing_patches(pipe_or_model)), None)


def _left_behind(pipe_or_model: Pipeline | nn.Module) -> list[Patch]:
    """Patches of a pipeline on what it no longer draws with, and on its ControlNets those whose pipeline is gone."""
    steering = [model for prefix, model in denoisers_of(pipe_or_model).items() if not draws(prefix)]
    orphans = [found for model in steering for found in _patches_of(model) if found.subject is None]
    now = _drawing_patches(pipe_or_model)
    own = [found for found in list(_MADE) if found.subject is pipe_or_model and found not in now]
    return [*orphans, *own]


def _drawing_patches(pipe_or_model: Pipeline | nn.Module) -> list[Patch]:
    """The patches on what a pipeline draws with."""
    found = denoisers_of(pipe_or_model).items()
    return [patch for prefix, model in found if draws(prefix) for patch in _patches_of(model)]


def _patches_of(model: nn.Module) -> list[Patch]:
    """The patches on a denoiser, identified by their hooks and processors."""
    inner = uncompiled(model)
    owners = [hook.owner for hook in hooks_of(model)]
    for module in inner.modules():
        runs = runs_of(getattr(module, "processor", None))
        if runs is not None and isinstance(runs.owner, Patch) and runs.active:
            owners.append(runs.owner)
    return list({id(owner): owner for owner in owners}.values())

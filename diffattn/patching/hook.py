"""The hooks of one denoiser: they report each call to the run, from outside any compiled code."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffattn.architectures.base import Size
from diffattn.architectures.denoisers import argument_names, uncompiled
from diffattn.architectures.run_state import NotPickled
from diffattn.patching.denoiser import PatchedDenoiser

_outside_compiled: Any = torch.compiler.disable


class DiffAttnWarning(UserWarning):
    """A patched model does something that the user may not expect."""


class Listener(Protocol):
    """What the hooks of a denoiser report to."""

    def begin_call(
        self, denoiser: PatchedDenoiser, sample: Tensor, time: Any, *, size: Size, mask_rows: int, traced: bool
    ) -> bool:
        """Called before a call on latents `sample` [B, ...] of this size; `traced`: from inside a compiled caller.
        Returns whether the denoiser is to be called once more, uncompiled and for `end_look` only."""
        ...

    def end_look(self, denoiser: PatchedDenoiser) -> None:
        """That call is over."""
        ...

    def end_call(self) -> None:
        """The call is over."""
        ...

    def enter_forward(self, denoiser: PatchedDenoiser) -> None:
        """Called when the denoiser's forward runs, with or without a preceding `begin_call`."""
        ...


class RunHook(NotPickled):
    """The hooks of one denoiser; the object itself is its forward pre-hook."""

    def __init__(self, owner: Any, listener: Listener, denoiser: PatchedDenoiser) -> None:
        """`owner`: the patch reported for the denoiser."""
        self.owner = owner
        self.listener = listener
        self.denoiser = denoiser
        self.outside: OutsideCompiled | None = None
        self._names = argument_names(uncompiled(denoiser.model))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Registered with `register_forward_pre_hook(..., with_kwargs=True)`."""
        _refuse_export()
        if not self._is_traced_inside(module):
            self.begin_call(args, kwargs, torch.compiler.is_compiling())

    def after(self, module: nn.Module, *_: Any) -> None:
        """Registered with `register_forward_hook(..., always_call=True)`."""
        if not self._is_traced_inside(module):
            self.end_call()

    def enter(self, *_: Any) -> None:
        """Registered before the part of the denoiser that every forward runs first."""
        _refuse_export()
        if not torch.compiler.is_compiling():
            self.listener.enter_forward(self.denoiser)

    @_outside_compiled
    def begin_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], traced: bool = False) -> None:
        """Report that the denoiser is about to be called with these arguments."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        architecture = self.denoiser.architecture
        model = uncompiled(self.denoiser.model)
        looks = self.listener.begin_call(
            self.denoiser,
            architecture.sample(given),
            architecture.timestep(given),
            size=architecture.size(model, given),
            mask_rows=int(given.get("attention_mask") is not None),
            traced=traced,
        )
        if looks:
            with torch.compiler.set_stance("force_eager"):
                model.forward(*args, **kwargs)
            self.listener.end_look(self.denoiser)

    @_outside_compiled
    def end_call(self) -> None:
        """The call is over."""
        self.listener.end_call()

    def _is_traced_inside(self, module: nn.Module) -> bool:
        """Whether `OutsideCompiled` calls the hook, so that this call is only traced."""
        return self.outside is not None and module._compiled_call_impl is self.outside

    def register(self) -> None:
        """Put the hooks in place; outside the compiled code if `module.compile()` was called."""
        model = self.denoiser.model
        if model._compiled_call_impl is not None:
            self.outside = OutsideCompiled(self, model._compiled_call_impl)
            model._compiled_call_impl = self.outside  # type: ignore[assignment]
        model.register_forward_pre_hook(self, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)
        self.denoiser.entry.register_forward_pre_hook(self.enter)

    def unregister(self) -> None:
        """Undo `register`. Also works on deep copies, whose hook handles are dangling."""
        model = self.denoiser.model
        for module in uncompiled(model).modules():
            _forget(module, "pre", self.enter)
        _forget(model, "pre", self)
        _forget(model, "post", self.after)
        if self.outside is not None and model._compiled_call_impl is self.outside:
            model._compiled_call_impl = self.outside.compiled
        self.outside = None


class OutsideCompiled(NotPickled):
    """Replaces the `_compiled_call_impl` set by `module.compile()`, to run the hooks outside of it."""

    def __init__(self, hook: RunHook, compiled: Any) -> None:
        self.hook = hook
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_export()
        try:
            self.hook.begin_call(args, kwargs)
            return self.compiled(*args, **kwargs)
        finally:
            self.hook.end_call()


def hooks_of(model: nn.Module) -> list[RunHook]:
    """Our hooks on a denoiser, compiled or not."""
    return [h for m in (model, uncompiled(model)) for h in m._forward_pre_hooks.values() if isinstance(h, RunHook)]


def _forget(module: nn.Module, when: str, hook: Any) -> None:
    """Remove a hook from a module, as `RemovableHandle.remove` would."""
    hooks, more = {
        "pre": (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        "post": (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    }[when]
    for key in [key for key, found in hooks.items() if found == hook]:
        for table in (hooks, *more):
            table.pop(key, None)


def _refuse_export() -> None:
    """Raise `RuntimeError` while the model is exported or traced: a static graph cannot follow a run."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise RuntimeError(
            "a model patched by diffattn cannot be exported (torch.export, ONNX) or traced (torch.jit.trace): "
            "call diffattn.unpatch first, export, then patch again"
        )

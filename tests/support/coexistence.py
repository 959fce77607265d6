"""What the tests of coexistence share: tiny pipelines and models by the class of their denoiser, and the decorator that
makes a test a row of the table in docs/coexistence.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import diffattn
from diffattn.architectures.denoisers import denoiser_of, self_attention_layers
from support import tiny, tiny_joint
from support.denoisers import CASES
from support.denoisers.case import Case

FEW: dict[str, Any] = {"num_agents": 6, "min_tokens": 0, "max_head_error": float("1e9"), "damping": 1e-3}
"""A patch that accelerates every layer. The damping keeps differences of rounding small."""

GPU = "a GPU"


def coexists(
    neighbour: str, how: str, *, on: Sequence[str], holds: str, needs: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of a patch beside something else, and a row of the table in docs/coexistence.md.

    The table is read from the source, so that the arguments are literals.

    Args:
        neighbour: what else changes the denoiser or its calls.
        how: in which way and order.
        on: the classes of denoisers; the test is given a `Subject` for each.
        holds: what the test asserts.
        needs: a package or `GPU`, without which the test is skipped. The table says so.
    """
    missing = needs is not None and (not torch.cuda.is_available() if needs == GPU else find_spec(needs) is None)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test = pytest.mark.parametrize("subject", on, indirect=True)(test)
        return pytest.mark.skipif(missing, reason=f"needs {needs}")(test)

    assert neighbour
    assert how
    assert holds
    return decorate


class Subject:
    """A tiny pipeline, or a denoiser in a sampling loop.

    Attributes:
        target: what is patched.
        arguments: of every drawing.
    """

    def __init__(self, target: Any, arguments: Mapping[str, Any]) -> None:
        self.target = target
        self.arguments = dict(arguments)

    @property
    def denoiser(self) -> Any:
        return self.target if isinstance(self.target, nn.Module) else denoiser_of(self.target)

    @property
    def num_layers(self) -> int:
        """Self-attention layers, ControlNets excluded."""
        return sum(spec.exact is None for spec, _ in self_attention_layers(self.denoiser))

    def draw(self, **overrides: Any) -> Tensor:
        """The latents of a short run, always from the same noise."""
        given = {"generator": torch.Generator().manual_seed(0)} | self.arguments | overrides
        torch.manual_seed(0)  # some pipelines encode pictures without their generator
        allowed = inspect.signature(type(self.target).__call__).parameters
        return self.target(**{name: value for name, value in given.items() if name in allowed or name in overrides})[0]

    def patch(self, **more: Any) -> diffattn.Patch:
        return diffattn.patch(self.target, **(FEW | more))

    def draw_patched(self, **overrides: Any) -> Tensor:
        """What the patch draws, with the neighbours there are at present."""
        with self.patch():
            return self.draw(**overrides)


class Loop(Subject):
    """A denoiser on its own, which takes the steps of its scheduler."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.build(), {})
        self.case = case
        self.time = 0.0  # the scheduler's time step under way

    def draw(self, num_inference_steps: int = 4) -> Tensor:  # type: ignore[override]
        case, given = self.case, self.case.inputs(2, torch.Generator().manual_seed(1))
        scheduler = case.scheduler()
        scheduler.set_timesteps(num_inference_steps)
        latents = given["hidden_states"]
        for t in scheduler.timesteps:
            self.time = float(t)
            with self.target.cache_context("cond"):
                out = case.call(self.target, given | {"hidden_states": latents}, level=self.time / 1000)
            if out.shape != latents.shape:  # the variance beside it
                out = out.chunk(2, dim=1)[0]
            latents = scheduler.step(out, t, latents, return_dict=False)[0]
        self.target._reset_stateful_cache()  # as pipelines do at their end
        return latents


def make(name: str, folder: Path) -> Subject:
    """The subject of a denoiser's class: a pipeline, or a model with a loop; `folder` is for a tokenizer's files."""
    prompt = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    small = prompt | {"height": tiny.SIZE, "width": tiny.SIZE, "guidance_scale": 3.0}
    if name == "UNet2DConditionModel":
        return Subject(tiny.pipeline("sd", folder), small)
    if name == "SD3Transformer2DModel":
        return Subject(tiny_joint.sd3_pipeline(folder), small | {"max_sequence_length": 16})
    if name == "FluxTransformer2DModel":
        size = {"height": 48, "width": 48, "max_sequence_length": 8}
        return Subject(tiny_joint.flux_pipeline(folder), prompt | size)
    return Loop(next(case for case in CASES if case.name == name))


def agree(one: Tensor, other: Tensor) -> None:
    """The same but for rounding."""
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def differ(one: Tensor, other: Tensor) -> None:
    """More than rounding apart."""
    assert one.isfinite().all()
    assert one.shape == other.shape
    assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


class Drawn(NamedTuple):
    """The latents without and with a patch."""

    exact: Tensor
    accelerated: Tensor


def check(subject: Subject, **overrides: Any) -> Drawn:
    """Patch a subject beside its neighbours: every layer is accelerated in every call, the latents change, and removing
    the patch brings back the processors and the latents bit by bit."""
    exact, before = subject.draw(**overrides), processors(subject)
    handle = subject.patch()
    accelerated = subject.draw(**overrides)
    assert_all_accelerated(handle, subject)
    differ(accelerated, exact)
    handle.remove()
    assert processors(subject) == before
    assert torch.equal(subject.draw(**overrides), exact)
    return Drawn(exact, accelerated)


def processors(subject: Subject) -> dict[str, Any]:
    """The processor of every layer of the denoiser."""
    return {name: m.processor for name, m in subject.denoiser.named_modules() if hasattr(m, "processor")}


def assert_all_accelerated(handle: diffattn.Patch, subject: Subject) -> None:
    """Every layer is patched, and ran accelerated in every call."""
    report = handle.report()
    assert report.layers_accelerated == report.layers_patched == subject.num_layers > 0, str(report)
    assert report.calls_passed_through == 0, str(report)


def reasons(handle: diffattn.Patch) -> set[str]:
    """Why calls ran exact."""
    return {reason for layer in handle.report().layers for reason in layer.passed_through}

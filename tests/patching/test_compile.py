"""torch.compile: no graph break added, one graph per phase, nothing recompiled per step, counts stay right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from support import tiny
from support.compiling import WAYS, in_place, outer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import diffattn

SCHEDULE = {0.7: {"num_agents": 4}, 0.4: {}, 0.0: "exact"}  # three phases
OPTIONS: dict[str, Any] = dict(min_tokens=0, num_agents=8, max_head_error=1e9, schedule=SCHEDULE)
"""Compiled code does not check heads; with so few agents uncompiled code would run some of them exact."""
TIMESTEPS = (900, 700, 500, 300, 100, 20)
LAYERS = 7  # self-attention layers of the tiny UNet

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@torch.no_grad()
def steps(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 16, tiny.WIDTH, generator=generator)
    return [model(latents, torch.tensor(t), text).sample for t in TIMESTEPS]


def eager() -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the uncompiled model: exact, and patched."""
    model = tiny.unet()
    exact = steps(model)
    with diffattn.patch(model, **OPTIONS):
        return exact, steps(model)


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_compile_then_patch_is_one_graph_per_phase(way: Callable[..., nn.Module]) -> None:
    exact, patched = eager()
    unpatched_counter = CompileCounter()
    steps(way(tiny.unet(), unpatched_counter))
    assert sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()

    counter = CompileCounter()
    model = way(tiny.unet(), counter)
    patch = diffattn.patch(model, **OPTIONS)
    assert_close(steps(model), patched)
    assert counter.frame_count == 3 * unpatched_counter.frame_count
    assert sum(counters["graph_break"].values()) == 0
    steps(model)  # a second run compiles nothing
    assert counter.frame_count == 3 * unpatched_counter.frame_count

    patch.remove()
    assert_close(steps(model), exact)


@pytest.mark.parametrize("way", WAYS)
def test_calls_are_counted_in_compiled_code(way: Callable[..., nn.Module]) -> None:
    model = way(tiny.unet(), CompileCounter())
    with diffattn.patch(model, **OPTIONS) as patch:
        steps(model)
    report = patch.report()
    assert report.calls == len(TIMESTEPS)
    assert report.calls_accelerated == 4 * LAYERS  # noise levels of 900, 700, 500 and 300 are above 0.4
    assert report.calls_passed_through == 2 * LAYERS


@pytest.mark.parametrize("way", [outer, in_place])
def test_patch_then_compile_works_without_recompiling_per_step(way: Callable[..., nn.Module]) -> None:
    exact, patched = eager()
    counter = CompileCounter()
    inner = tiny.unet()
    patch = diffattn.patch(inner, **OPTIONS)
    model = way(inner, counter)
    assert_close(steps(model), patched)
    frames = counter.frame_count
    steps(model)
    assert counter.frame_count == frames == 3
    assert patch.report().calls_accelerated == 2 * 4 * LAYERS
    patch.remove()
    assert_close(steps(model), exact)


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_found_again_and_restored(way: Callable[..., nn.Module]) -> None:
    model = way(tiny.unet(), CompileCounter())
    inner = getattr(model, "_orig_mod", model)
    before = (inner._compiled_call_impl, dict(model._forward_pre_hooks), dict(inner._forward_pre_hooks))
    diffattn.patch(model, **OPTIONS)
    with pytest.raises(ValueError, match="already patched"):
        diffattn.patch(inner, **OPTIONS)
    diffattn.unpatch(inner)
    assert before == (inner._compiled_call_impl, dict(model._forward_pre_hooks), dict(inner._forward_pre_hooks))

"""torch.compile: no graph break added, one graph per phase, nothing recompiled per step, counts stay right."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers.hooks import HookRegistry, ModelHook
from support import tiny
from support.compiling import WAYS, in_place, outer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import diffattn

SCHEDULE = {0.7: {"num_agents": 4}, 0.4: {}, 0.0: "exact"}  # three phases
OPTIONS: dict[str, Any] = dict(min_tokens=0, num_agents=8, max_head_error=1e9, schedule=SCHEDULE)
"""With so few agents, some heads would otherwise run exact."""
TIMESTEPS = (900, 700, 500, 300, 100, 20)
LIMIT = 0.3  # some heads of some layers are further off than this
SHAPES = (2, 4, 16, 16), (2, 16, tiny.WIDTH)
LAYERS = 4  # self-attention layers of the UNet

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def unet() -> Any:
    """With attention at its first level and in the middle: the fewer layers, the sooner it is compiled."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return tiny.unet(down_block_types=down, up_block_types=up)


@torch.no_grad()
def steps(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 16, tiny.WIDTH, generator=generator)
    return [model(latents, torch.tensor(t), text).sample for t in TIMESTEPS]


def run(model: nn.Module) -> Tensor:
    """The outputs of one run [6·2, 4, 16, 16], at the time steps of a scheduler."""
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(6)
    latents, text = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES)
    with torch.no_grad():
        return torch.cat([model(latents, t, text).sample for t in scheduler.timesteps])


def eager() -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the uncompiled model: exact, and patched."""
    model = unet()
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
    steps(way(unet(), unpatched_counter))
    assert sum(counters["graph_break"].values()) == 0
    torch._dynamo.reset()

    counter = CompileCounter()
    model = way(unet(), counter)
    patch = diffattn.patch(model, **OPTIONS)
    assert_close(steps(model), patched)
    assert counter.frame_count == 3 * unpatched_counter.frame_count
    assert sum(counters["graph_break"].values()) == 0
    steps(model)  # a second run compiles nothing
    assert counter.frame_count == 3 * unpatched_counter.frame_count

    patch.remove()
    assert_close(steps(model), exact)


@pytest.mark.filterwarnings("ignore:diffattn accelerates no layer")
@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_under_autocast_the_report_follows_the_precision_that_layers_compute_in(faster: torch.dtype) -> None:
    def draw() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return steps(model)

    model = unet()
    options: dict[str, Any] = dict(num_agents=8, max_head_error=math.inf)
    with diffattn.patch(model, **options, calibrate=False) as patch:
        draw()
        kinds = {kind.replace("bfloat16", "{}") for kind in patch.decisions()}
    assert all("{}" in kind for kind in kinds)
    model.compile(backend="eager")
    exact = draw()
    decided = {kind.format(name): name in str(faster) for kind in kinds for name in ("float32", "bfloat16")}
    patch = diffattn.patch(model, **options, calibrate=False, decisions=decided)
    found = draw()
    assert torch.equal(torch.stack(found), torch.stack(exact)) is (faster is torch.float32)
    assert bool(patch.report().calls_accelerated) is (faster is torch.bfloat16)


@pytest.mark.parametrize("way", WAYS)
def test_calls_are_counted_in_compiled_code(way: Callable[..., nn.Module]) -> None:
    model = way(unet(), CompileCounter())
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
    inner = unet()
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
def test_heads_that_run_exact_are_found_before_anything_is_compiled(way: Callable[..., nn.Module]) -> None:
    drawn = {}
    for limit in (LIMIT, 1e-9, math.inf):
        torch._dynamo.reset()
        counter = CompileCounter()
        model = way(unet(), counter)
        with (
            diffattn.patch(model, min_tokens=0, num_agents=6, schedule={0.0: {}}, max_head_error=limit) as patch,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", diffattn.DiffAttnWarning)
            drawn[limit] = run(model)
            frames = counter.frame_count
            torch.testing.assert_close(run(model), drawn[limit], atol=1e-5, rtol=1e-4)
            assert counter.frame_count == frames
            layers = [layer for layer in patch.report().layers if layer.left_alone is None]
        assert sum(counters["graph_break"].values()) == 0
        calls = 2 * 6
        if limit == LIMIT:
            assert any(layer.accelerated == calls and layer.exact_heads == 2 * calls for layer in layers)
            assert any(layer.accelerated == calls and not layer.exact_heads for layer in layers)
        elif limit == 1e-9:
            why = {"most heads are too far from exact attention": calls}
            assert all(layer.passed_through == why and not layer.accelerated for layer in layers)
        else:
            assert all(layer.accelerated == calls and not layer.exact_heads for layer in layers)
    exact = run(unet())
    errors = [torch.dist(drawn[limit], exact).item() for limit in (1e-9, LIMIT, math.inf)]
    assert errors[0] < errors[1] < errors[2]


def few(model: nn.Module, limit: float = LIMIT) -> Any:
    """The patch that lets some heads run exact; the model must compile whole."""
    return diffattn.patch(model, min_tokens=0, num_agents=6, schedule={0.0: {}}, max_head_error=limit)


def test_heads_are_not_looked_for_where_a_hook_of_diffusers_would_count_the_call() -> None:
    calls: list[int] = []

    class Counts(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(calls))
            return args, kwargs

    inner = unet()
    HookRegistry.check_if_exists_or_initialize(inner.mid_block.attentions[0]).register_hook(Counts(), "counts")
    model = in_place(inner, CompileCounter())
    with few(model) as patch:
        run(model)
        assert len(calls) == 6  # one for each step
        assert not any(layer.exact_heads for layer in patch.report().layers)


@pytest.mark.parametrize("way", [outer, in_place])
def test_a_call_that_fails_while_heads_are_looked_for_leaves_nothing_behind(way: Callable[..., nn.Module]) -> None:
    model = way(unet(), CompileCounter())
    with few(model) as expected:
        drawn = run(model)
    torch._dynamo.reset()
    model = way(unet(), CompileCounter())
    with few(model) as patch:
        scheduler = tiny.scheduler()
        scheduler.set_timesteps(6)
        with torch.no_grad(), pytest.raises(RuntimeError):
            model(torch.randn(SHAPES[0]), scheduler.timesteps[0], torch.randn(2, 16, tiny.WIDTH + 1))
        assert not patch.report().calls_accelerated
        torch.testing.assert_close(run(model), drawn, atol=1e-4, rtol=1e-3)
        found, before = patch.report(), expected.report()
    assert [layer.exact_heads for layer in found.layers] == [layer.exact_heads for layer in before.layers]
    assert sum(layer.exact_heads for layer in found.layers) > 0


def test_heads_that_were_found_stay_when_processors_are_replaced() -> None:
    model = outer(inner := unet(), CompileCounter())
    with few(model) as patch:
        drawn = run(model)
        exact_heads = [layer.exact_heads for layer in patch.report().layers]
        inner.set_default_attn_processor()
        torch.testing.assert_close(run(model), drawn, atol=1e-4, rtol=1e-3)
    assert [layer.exact_heads for layer in patch.report().layers] == [2 * heads for heads in exact_heads]


@pytest.mark.parametrize(("share", "is_accelerated"), [(0.4, False), (0.5, True)])
def test_compiled_layers_accelerate_as_many_heads_as_was_decided(share: float, is_accelerated: bool) -> None:
    options: dict[str, Any] = {"num_agents": 6, "schedule": {0.0: {}}, "max_head_error": LIMIT, "calibrate": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffattn.DiffAttnWarning)
        with diffattn.patch(model := unet(), **options) as patch:
            run(model)
            kinds = patch.decisions()
        model = outer(unet(), CompileCounter())
        with diffattn.patch(model, **options, decisions=dict.fromkeys(kinds, share)) as patch:
            run(model)
            layers = [layer for layer in patch.report().layers if layer.left_alone is None]
    assert any(layer.accelerated and not layer.exact_heads for layer in layers)
    assert any(layer.exact_heads for layer in layers) is is_accelerated  # one of two heads, in some layers
    assert all(layer.accelerated for layer in layers) is is_accelerated


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_found_again_and_restored(way: Callable[..., nn.Module]) -> None:
    model = way(unet(), CompileCounter())
    inner = getattr(model, "_orig_mod", model)
    before = (inner._compiled_call_impl, dict(model._forward_pre_hooks), dict(inner._forward_pre_hooks))
    diffattn.patch(model, **OPTIONS)
    with pytest.raises(ValueError, match="already patched"):
        diffattn.patch(inner, **OPTIONS)
    diffattn.unpatch(inner)
    assert before == (inner._compiled_call_impl, dict(model._forward_pre_hooks), dict(inner._forward_pre_hooks))

"""diffusers' own DiT and PixArt: what is patched in them, on which grid, and at which noise level."""

from typing import Any

import pytest
import torch
from diffusers import PriorTransformer
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from support import tiny, tiny_transformers
from support.patching import ALWAYS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import diffattn
from diffattn.architectures import architecture_of
from diffattn.measure.denoiser_inputs import make_denoiser_inputs
from diffattn.noise_level import discrete, dit_alphas_cumprod
from diffattn.patching.hook import DiffAttnWarning
from diffattn.preflight.run import preflight

MODELS = {"dit": tiny_transformers.dit, "pixart": tiny_transformers.pixart}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@torch.no_grad()
def call(model: nn.Module, size: tuple[int, int] = (16, 16), time: Any = None, **more: Any) -> Tensor:
    """One call with two samples, always the same."""
    args, kwargs = make_denoiser_inputs(model, *size, batch=2)
    kwargs = kwargs | {"return_dict": False} | more | ({} if time is None else {"timestep": torch.tensor(time)})
    return model(*args, **kwargs)[0]


def test_self_attention_is_patched_and_cross_attention_left_alone(model: Any) -> None:
    exact = call(model)
    originals = {name: m.processor for name, m in model.named_modules() if isinstance(m, Attention)}
    handle = diffattn.patch(model, **ALWAYS)
    assert not torch.allclose(call(model), exact, atol=1e-4)
    for layer in handle.report().layers:
        kind = layer.name.rpartition(".")[2]
        assert layer.left_alone == {"attn1": None, "attn2": "cross-attention"}[kind]
        assert (layer.level, layer.tokens, layer.accelerated) == (0, 64, 1) or kind == "attn2"
        assert (model.get_submodule(layer.name).processor is originals[layer.name]) == (kind == "attn2")
    assert handle.report().layers_accelerated == 2
    handle.remove()
    assert {name: m.processor for name, m in model.named_modules() if isinstance(m, Attention)} == originals
    assert torch.equal(call(model), exact)


@pytest.mark.parametrize(
    ("name", "size", "patch_size", "grid"),
    [
        ("dit", (16, 16), 2, (8, 8)), ("dit", (32, 32), 4, (8, 8)), ("dit", (8, 8), 1, (8, 8)),
        ("pixart", (16, 24), 2, (8, 12)), ("pixart", (17, 9), 2, (8, 4)), ("pixart", (32, 16), 4, (8, 4)),
    ],
)  # fmt: skip
def test_the_grid_is_that_of_the_patches(
    name: str, size: tuple[int, int], patch_size: int, grid: tuple[int, int]
) -> None:
    model = MODELS[name](patch_size=patch_size, sample_size=size[0])
    assert architecture_of(model).grids(model, *size) == [grid]
    handle = diffattn.patch(model, **ALWAYS)
    assert call(model, size).shape[-2:] == (grid[0] * patch_size, grid[1] * patch_size)
    assert [x.tokens for x in handle.report().layers if x.left_alone is None] == [grid[0] * grid[1]] * 2
    assert handle.report().layers_accelerated == 2


def test_layers_say_their_heads_and_whether_they_ask_for_upcasting(model: Any) -> None:
    specs = [spec for spec, _ in architecture_of(model).layers(model)]
    assert {(s.level, s.num_heads, s.head_dim, s.upcast) for s in specs} == {(0, 2, 16, False)}
    assert {s.name.rpartition(".")[2]: s.is_cross_attention for s in specs} in (
        {"attn1": False}, {"attn1": False, "attn2": True},
    )  # fmt: skip
    upcasting = type(model).from_config(model.config, upcast_attention=True)
    assert all(spec.upcast for spec, _ in architecture_of(upcasting).layers(upcasting))


@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart-sigma"])
def test_time_steps_are_those_of_the_pipelines_scheduler(kind: str, make_pipeline: Any) -> None:
    pipe = make_pipeline(kind)
    with diffattn.patch(pipe, **ALWAYS) as handle:
        tiny.run(pipe)
        level = discrete(pipe.scheduler.alphas_cumprod.tolist())
        expected = [level(t) for t in pipe.scheduler.timesteps.tolist()]
        assert [entry["noise_level"] for entry in handle.trace()] == pytest.approx(expected)
        tiny.run(pipe)
        assert handle.report().runs == 2


@pytest.mark.parametrize("time", [[981], [981, 981], [981, 20]])
def test_without_a_pipeline_they_are_dits_own(model: Any, time: list[int]) -> None:
    handle = diffattn.patch(model, **(ALWAYS | {"schedule": {0.5: {}, 0.0: "exact"}}))
    model_time = time * 2 if len(time) == 1 else time
    call(model, time=model_time)
    found = handle.trace()[-1]
    levels = [discrete(dit_alphas_cumprod())(t) for t in dict.fromkeys(time)]
    assert found["noise_level"] == (pytest.approx(levels) if len(levels) > 1 else pytest.approx(levels[0]))
    assert found["phase"] == ([0, 1] if len(levels) > 1 else 0)


def test_dits_schedule_differs_from_stable_diffusions(model: Any) -> None:
    """Step 300 is noisier there: 0.56 against 0.41."""
    handle = diffattn.patch(model, **(ALWAYS | {"schedule": {0.5: {}, 0.0: "exact"}}))
    call(model, time=[300, 300])
    assert handle.report().calls_accelerated == 2


def test_a_mask_over_the_keys_of_a_pixart_is_honoured() -> None:
    model = tiny_transformers.pixart()
    mask = torch.ones(2, 64)
    mask[:, 40:] = 0
    exact = call(model, attention_mask=mask)
    handle = diffattn.patch(model, **ALWAYS)
    masked = call(model, attention_mask=mask)
    assert handle.report().calls_accelerated == 2
    torch.testing.assert_close(masked, exact, atol=0.1, rtol=0.1)
    errors = [torch.dist(x, exact) for x in (masked, call(model))]
    assert errors[0] < errors[1] / 2  # what the mask hides does not count


def test_fused_projections_are_used_whether_installed_before_patching_or_after() -> None:
    model = tiny_transformers.pixart()
    exact = call(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(call(model), exact)
    handle = diffattn.patch(model, **ALWAYS)
    accelerated = call(model)
    assert not torch.allclose(accelerated, exact, atol=1e-4)
    model.set_attn_processor(FusedAttnProcessor2_0())
    handle.expect_new_run()
    assert torch.equal(call(model), accelerated)
    assert handle.report().calls_accelerated == 4
    handle.remove()
    torch.testing.assert_close(call(model), exact)
    assert {type(m.processor) for m in model.modules() if isinstance(m, Attention)} == {FusedAttnProcessor2_0}


def test_class_dropout_in_training_is_as_it_was() -> None:
    model = tiny_transformers.dit().train()
    torch.manual_seed(5)
    exact = [call(model) for _ in range(8)]
    assert not all(torch.equal(x, exact[0]) for x in exact)  # labels are dropped at random
    diffattn.patch(model, **(ALWAYS | {"min_tokens": 65}))
    torch.manual_seed(5)
    with pytest.warns(DiffAttnWarning, match="exact attention is faster below 65"):
        found = [call(model) for _ in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_gradients_flow_and_may_be_recomputed(model: Any) -> None:
    args, kwargs = make_denoiser_inputs(model, 16, 16, batch=2)
    diffattn.patch(model, **ALWAYS)
    found = []
    for recompute in (False, True):
        if recompute:
            model.enable_gradient_checkpointing()
        x = args[0].clone().requires_grad_()
        output: Any = model(x, *args[1:], **(kwargs | {"return_dict": False}))
        output[0].square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["outer", "in place", "blocks"])
def test_compiled_before_patching_gives_one_graph_per_phase(model: Any, way: str) -> None:
    torch._dynamo.reset()
    options = ALWAYS | {"schedule": {0.7: {}, 0.0: "exact"}}
    times = [[900, 900], [800, 800], [100, 100], [20, 20]]
    with diffattn.patch(model, **options):
        eager = [call(model, time=t) for t in times]
    counter = CompileCounter()
    args, kwargs = make_denoiser_inputs(model, 16, 16, batch=2)
    compiled: Any = torch.compile(model, backend=counter) if way == "outer" else model
    parts = {"outer": [], "in place": [model], "blocks": model.transformer_blocks}[way]
    for part in parts:
        part.compile(backend=counter)
    with diffattn.patch(compiled, **options) as handle, torch.no_grad():
        for t, expected in zip(times, eager, strict=True):
            found = compiled(*args, **(kwargs | {"return_dict": False, "timestep": torch.tensor(t)}))[0]
            torch.testing.assert_close(found, expected)
        assert counter.frame_count <= 2 * (2 if way == "blocks" else 1)
        assert (handle.report().calls_accelerated, handle.report().runs) == (4, 1)
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_preflight_times_them(make_pipeline: Any) -> None:
    for kind, tokens in (("dit", 64), ("pixart", 64)):
        found = preflight(make_pipeline(kind), rounds=1)
        assert (found.height, found.width, [x.tokens for x in found.layers]) == (32, 32, [tokens] * 2)
        assert found.gflops is not None
    big = tiny_transformers.pixart(use_additional_conditions=True, attention_head_dim=24, cross_attention_dim=48)
    assert len(preflight(big, 32, 48, rounds=1).layers) == 2


def test_other_transformers_are_refused_by_name() -> None:
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=8)
    with pytest.raises(TypeError, match="nothing to accelerate in PriorTransformer: one-dimensional"):
        diffattn.patch(model)

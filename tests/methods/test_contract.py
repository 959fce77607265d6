"""What every method must fulfil on every kind of pipeline. A new method adds an entry to `VARIANTS`."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    EDMEulerScheduler,
    PixArtAlphaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from support import tiny
from support.watching import Watching
from torch import Tensor, nn

import diffattn
from diffattn.sampling import SiTPipeline

KINDS = ("sd", "sdxl", "img2img", "inpaint", "controlnet", "dit", "pixart", "sit")


@dataclass(frozen=True)
class Variant:
    """One way to use a method, such that the tiny pipelines of some kinds are accelerated."""

    method: str
    options: Mapping[str, Any]
    other: Mapping[str, Any]  # options of another picture
    phases: tuple[Mapping[str, Any], Mapping[str, Any]]  # of two noise levels; the third is exact
    kinds: tuple[str, ...] = KINDS

    @property
    def schedule(self) -> dict[float, Any]:
        return dict(zip((0.6, 0.3, 0.0), (*self.phases, "exact"), strict=True))


@dataclass(frozen=True)
class AgentVariant(Variant):
    method: str = "agent"
    options: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=lambda: {"num_agents": 20})
    phases: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"num_agents": 4}, {"num_agents": 24})


FEW: dict[str, Any] = {"num_agents": 6, "agent_ratio": None, "max_head_error": float("inf"), "min_tokens": 0}
VARIANTS: dict[str, Variant] = {
    "agent pool": AgentVariant(options=FEW | {"agents": "pool"}),
    "agent landmarks": AgentVariant(options=FEW | {"agents": "landmarks"}),
    "agent merge": AgentVariant(options=FEW | {"agents": "merge", "merge_ratio": 0.4}),
    "inline": Variant(
        "inline", {"max_head_error": float("inf"), "min_tokens": 0}, {"max_head_error": 0.02},
        ({"max_head_error": float("inf")}, {"max_head_error": 0.02}),
    ),
    "keys": Variant(
        "keys", {"factor": 2, "min_tokens": 0}, {"factor": 4},
        ({"factor": 2}, {"factor": 4}),
    ),
    "keys pooled": Variant(
        "keys", {"factor": 2, "pooled": True, "min_tokens": 0}, {"factor": 4},
        ({"factor": 2}, {"factor": 3}),
    ),
    "tiles": Variant(
        "tiles", {"tiles": 2, "min_tokens": 0}, {"tiles": 3},
        ({"tiles": 2}, {"tile_size": 2}),
    ),
    "mediator": Variant(
        "mediator", {"num_mediators": 4}, {"num_mediators": 16}, ({"num_mediators": 4}, {"num_mediators": 25}),
        kinds=("sit-mediators",),
    ),
}  # fmt: skip
CASES = [(name, kind) for name, variant in VARIANTS.items() for kind in variant.kinds]
FEWER = [(name, kind) for name, kind in CASES if name in ("agent landmarks", "mediator") or kind in ("sd", "sit")]
"""Every method in a UNet and in a transformer, and every kind of pipeline with the default method."""
BATCHED: Any = {"atol": 5e-4, "rtol": 1e-3}  # sums in another order, and an inverse behind them

Make = Callable[[str], DiffusionPipeline]


class Patch:
    """`diffattn.patch` with the options of one variant."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def __call__(self, target: Any, **overrides: Any) -> diffattn.Patch:
        options: dict[str, Any] = dict(self.variant.options) | overrides
        return diffattn.patch(target, self.variant.method, **options)


@pytest.fixture(params=CASES, ids=" on ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A variant and a kind of pipeline that it is for."""
    return request.param


with_fewer_cases = pytest.mark.parametrize("case", FEWER, ids=" on ".join)
"""For what depends on the pipeline and on the patch rather than on what the method computes."""


@pytest.fixture
def pipe(case: tuple[str, str], make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline(case[1])


@pytest.fixture
def patched(case: tuple[str, str]) -> Patch:
    return Patch(VARIANTS[case[0]])


@pytest.fixture(params=[name for name, variant in VARIANTS.items() if "sd" in variant.kinds])
def patched_sd(request: pytest.FixtureRequest) -> Patch:
    """Of the variants for Stable Diffusion."""
    return Patch(VARIANTS[request.param])


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: pipe.components[name] for name in ("unet", "transformer", "controlnet") if name in pipe.components}


def denoiser(pipe: DiffusionPipeline) -> Any:
    """The main one."""
    return next(iter(denoisers(pipe).values()))


def processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "set_processor")]


def anatomy(pipe: DiffusionPipeline, attention: bool = True) -> dict[str, Any]:
    """Everything of the denoisers that a patch could have changed; without what it must change while it is there."""
    seen: dict[Any, Any] = {}
    for part, network in denoisers(pipe).items():
        seen[part] = tuple(network.state_dict())
        for name, module in network.named_modules():
            own = {k: v for k, v in vars(module).items() if attention or k != "processor"}
            hooks = {k: dict(v) for k, v in own.items() if "hooks" in k and isinstance(v, dict)}
            if not attention:
                hooks = {k: v for k, v in hooks.items() if not k.startswith("_forward")}
            others = {k: id(v) for k, v in own.items() if not isinstance(v, dict | int | float | str | bool)}
            parts = {k: id(v) for k, v in module._modules.items()}
            seen[part, name] = (type(module), type(module).__mro__, sorted(own), hooks, others, parts)
    return seen


CLASS_METHODS = [(AttnProcessor2_0, "__call__"), (nn.Module, "__call__"), (nn.Module, "forward")]


@pytest.fixture(autouse=True)
def _classes_stay_as_they_are() -> Iterator[None]:
    before = [getattr(owner, name) for owner, name in CLASS_METHODS]
    yield
    assert [getattr(owner, name) for owner, name in CLASS_METHODS] == before


def test_changes_the_output_and_gives_it_back_bit_by_bit(pipe: DiffusionPipeline, patched: Patch) -> None:
    original = tiny.run(pipe)
    handle = patched(pipe)
    accelerated = tiny.run(pipe)
    assert accelerated.isfinite().all()
    assert not torch.allclose(accelerated, original, atol=1e-4)
    assert handle.report().layers_accelerated == handle.report().layers_patched > 0
    handle.remove()
    assert torch.equal(tiny.run(pipe), original)


@with_fewer_cases
def test_leaves_no_trace(pipe: DiffusionPipeline, patched: Patch) -> None:
    before, before_outside = anatomy(pipe), anatomy(pipe, attention=False)
    handle = patched(pipe)
    tiny.run(pipe)
    assert anatomy(pipe, attention=False) == before_outside
    handle.remove()
    assert anatomy(pipe) == before


@with_fewer_cases
def test_adds_nothing_to_the_state_dict(pipe: DiffusionPipeline, patched: Patch) -> None:
    before = {k: v.clone() for part in denoisers(pipe).values() for k, v in part.state_dict().items()}
    patched(pipe)
    tiny.run(pipe)
    after = {k: v for part in denoisers(pipe).values() for k, v in part.state_dict().items()}
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@with_fewer_cases
def test_a_seed_gives_one_picture(pipe: DiffusionPipeline, patched: Patch) -> None:
    patched(pipe)
    first, second, other = tiny.run(pipe, seed=1), tiny.run(pipe, seed=1), tiny.run(pipe, seed=2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@with_fewer_cases
def test_a_removed_patch_can_be_made_again(pipe: DiffusionPipeline, patched: Patch) -> None:
    patched(pipe)
    first = tiny.run(pipe)
    diffattn.unpatch(pipe)
    patched(pipe)
    assert torch.equal(tiny.run(pipe), first)


@with_fewer_cases
def test_with_block_and_removing_twice(pipe: DiffusionPipeline, patched: Patch) -> None:
    original = tiny.run(pipe)
    with patched(pipe) as handle:
        assert not torch.equal(tiny.run(pipe), original)
    assert torch.equal(tiny.run(pipe), original)
    before = anatomy(pipe)
    handle.remove()
    diffattn.unpatch(pipe)
    assert anatomy(pipe) == before


@with_fewer_cases
def test_patching_twice_is_refused_and_changes_nothing(pipe: DiffusionPipeline, patched: Patch) -> None:
    patched(pipe)
    accelerated, before = tiny.run(pipe), anatomy(pipe)
    for target in (pipe, denoiser(pipe)):
        with pytest.raises(ValueError, match="already patched"):
            patched(target)
    assert anatomy(pipe) == before
    assert torch.equal(tiny.run(pipe), accelerated)


class Stop(Exception):
    pass


def run_until(pipe: DiffusionPipeline, at: int) -> None:
    """A run that raises `Stop` in step `at`: out of the callback, or where there is none out of the denoiser."""
    steps = iter(range(at + 1))

    def stop(*_: Any) -> None:
        if next(steps) == at:
            raise Stop

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        tiny.run(pipe, callback_on_step_end=lambda *_: stop() or {})
    else:
        with denoiser(pipe).register_forward_hook(stop):
            tiny.run(pipe)


@with_fewer_cases
@pytest.mark.parametrize("at", [0, 2])
def test_an_exception_in_a_run_leaves_a_pipeline_that_can_be_used_and_unpatched(
    pipe: DiffusionPipeline, patched: Patch, at: int
) -> None:
    original = tiny.run(pipe)
    before = anatomy(pipe)
    patched(pipe)
    accelerated = tiny.run(pipe)
    with pytest.raises(Stop):
        run_until(pipe, at)
    assert torch.equal(tiny.run(pipe), accelerated)
    with pytest.raises(Stop):
        run_until(pipe, at)
    diffattn.unpatch(pipe)
    assert anatomy(pipe) == before
    assert torch.equal(tiny.run(pipe), original)


@with_fewer_cases
def test_an_exception_inside_a_with_block_passes_and_restores(pipe: DiffusionPipeline, patched: Patch) -> None:
    before = anatomy(pipe)
    with pytest.raises(Stop), patched(pipe):
        raise Stop
    assert anatomy(pipe) == before


@with_fewer_cases
def test_pipelines_patched_differently_are_independent(pipe: DiffusionPipeline, patched: Patch) -> None:
    original = tiny.run(pipe)
    other = copy.deepcopy(pipe)
    patched(pipe)
    accelerated = tiny.run(pipe)
    assert torch.equal(tiny.run(other), original)
    patched(other, **patched.variant.other)
    assert torch.equal(tiny.run(pipe), accelerated)
    assert not torch.equal(tiny.run(other), accelerated)
    diffattn.unpatch(pipe)
    assert torch.equal(tiny.run(pipe), original)
    assert not torch.equal(tiny.run(other), original)


# Copies.


@with_fewer_cases
def test_a_deep_copy_is_patched_and_independent(pipe: DiffusionPipeline, patched: Patch) -> None:
    original = tiny.run(pipe)
    handle = patched(pipe)
    accelerated = tiny.run(pipe)
    calls = handle.report().calls
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.run(twin), accelerated)
    assert handle.report().calls == calls  # the copy counts for itself
    diffattn.unpatch(twin)
    assert torch.equal(tiny.run(twin), original)
    assert torch.equal(tiny.run(pipe), accelerated)
    again = copy.deepcopy(pipe)
    handle.remove()
    assert torch.equal(tiny.run(pipe), original)
    assert torch.equal(tiny.run(again), accelerated)


@with_fewer_cases
def test_a_deep_copy_outlives_the_original(pipe: DiffusionPipeline, patched: Patch) -> None:
    before = {type(processor) for processor in processors(denoiser(pipe))}
    patched(pipe)
    accelerated = tiny.run(pipe)
    copied = copy.deepcopy(denoiser(pipe))
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.run(twin), accelerated)
    shares_nothing = {id(m) for m in denoiser(pipe).modules()}.isdisjoint(id(m) for m in copied.modules())
    assert shares_nothing
    diffattn.unpatch(copied)
    assert not copied._forward_pre_hooks
    assert {type(processor) for processor in processors(copied)} == before
    assert torch.equal(tiny.run(pipe), accelerated)


def test_a_deep_copy_reads_its_own_scheduler(make_pipeline: Make, patched_sd: Patch) -> None:
    pipe = make_pipeline("sd")
    patched_sd(pipe, schedule=patched_sd.variant.schedule)
    twin = copy.deepcopy(pipe)
    twin.scheduler = EDMEulerScheduler()  # its time steps, a quarter of log σ, would all be data to the other
    other = make_pipeline("sd")
    other.scheduler = EDMEulerScheduler()
    patched_sd(other, schedule=patched_sd.variant.schedule)
    assert torch.equal(tiny.run(twin), tiny.run(other))


# Batches.


def inputs_of(pipe: DiffusionPipeline, batch: int) -> dict[str, Tensor]:
    """What a denoiser is given beside its time step, in its own words."""
    generator = torch.Generator().manual_seed(7)
    config = denoiser(pipe).config
    x = torch.randn(batch, config.in_channels, 16, 16, generator=generator)
    if isinstance(pipe, SiTPipeline):
        return {"x": x, "y": torch.arange(batch) % config.num_classes}
    if isinstance(pipe, DiTPipeline):
        return {"hidden_states": x, "class_labels": torch.arange(batch)}
    inputs = {
        "hidden_states" if isinstance(pipe, PixArtAlphaPipeline) else "sample": x,
        "encoder_hidden_states": torch.randn(batch, 16, config.cross_attention_dim, generator=generator),
    }
    if isinstance(pipe, PixArtAlphaPipeline):
        inputs["encoder_attention_mask"] = torch.ones(batch, 16)
    if isinstance(pipe, StableDiffusionXLPipeline):
        inputs["text_embeds"] = torch.randn(batch, tiny.WIDTH, generator=generator)
        inputs["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(batch, 1)
    if hasattr(pipe, "controlnet"):
        inputs["controlnet_cond"] = torch.rand(batch, 3, 32, 32, generator=generator)
    return inputs


@torch.no_grad()
def denoise(pipe: DiffusionPipeline, timestep: Any, inputs: dict[str, Tensor]) -> Tensor:
    """One evaluation, as the pipeline makes it; a SiT takes a time from 0 (noise) to 1 for the time step."""
    given = dict(inputs)
    if isinstance(pipe, SiTPipeline):
        times = 1 - (torch.as_tensor(timestep) / 1000).sqrt()
        return pipe.transformer(t=times.expand(len(given["x"])), **given).sample
    if hasattr(pipe, "transformer"):
        times = torch.as_tensor(timestep).expand(len(given["hidden_states"]))
        return pipe.transformer(timestep=times, **given).sample
    added = {k: given.pop(k) for k in ("text_embeds", "time_ids") if k in given}
    residuals: dict[str, Any] = {}
    if "controlnet_cond" in given:
        condition = given.pop("controlnet_cond")
        down, mid = pipe.controlnet(timestep=timestep, controlnet_cond=condition, return_dict=False, **given)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return pipe.unet(timestep=timestep, added_cond_kwargs=added or None, **residuals, **given).sample


def rows(inputs: dict[str, Tensor], *index: int) -> dict[str, Tensor]:
    return {name: x[list(index)] for name, x in inputs.items()}


@pytest.mark.parametrize("timestep", [901, 401])
def test_samples_of_a_batch_do_not_see_each_other(pipe: DiffusionPipeline, patched: Patch, timestep: int) -> None:
    patched(pipe, schedule={0.0: {}})
    inputs = inputs_of(pipe, 3)
    together = denoise(pipe, timestep, inputs)
    alone = [denoise(pipe, timestep, rows(inputs, i)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), **BATCHED)


def test_guidance_in_one_batch_equals_separate_passes(pipe: DiffusionPipeline, patched: Patch) -> None:
    patched(pipe, schedule={0.0: {}})
    inputs = rows(inputs_of(pipe, 1), 0, 0)  # one latent, two contexts
    condition = next(name for name in ("class_labels", "encoder_hidden_states", "y") if name in inputs)
    inputs[condition] = inputs_of(pipe, 2)[condition]
    both = denoise(pipe, 801, inputs)
    assert not torch.allclose(both[0], both[1])
    torch.testing.assert_close(both, torch.cat([denoise(pipe, 801, rows(inputs, i)) for i in range(2)]), **BATCHED)


def test_a_batch_of_three_pictures_equals_three_of_one(make_pipeline: Make, patched_sd: Patch) -> None:
    pipe = make_pipeline("sd")
    patched_sd(pipe, schedule={0.5: {}, 0.0: "exact"})
    prompts = ["a cat", "a dog", ""]
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = tiny.run(pipe, prompt=prompts, generator=seeds)
    alone = [tiny.run(pipe, prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=1e-3)


STEPS = [981, 20, 280, 981, 300, 700]  # of all three phases on every schedule, out of order


def test_a_time_step_per_sample_equals_each_sample_alone(pipe: DiffusionPipeline, patched: Patch) -> None:
    schedule = Watching(patched.variant.schedule)
    patched(pipe, schedule=schedule)
    inputs = inputs_of(pipe, len(STEPS))
    together = denoise(pipe, torch.tensor(STEPS), inputs)
    assert set(schedule.seen_phases) == {(0, 2, 1, 0, 1, 0)}
    alone = torch.cat([denoise(pipe, torch.tensor([t]), rows(inputs, i)) for i, t in enumerate(STEPS)])
    torch.testing.assert_close(together, alone, **BATCHED)


def test_a_time_step_per_sample_of_one_phase_needs_no_groups(make_pipeline: Make, patched_sd: Patch) -> None:
    pipe = make_pipeline("sd")
    schedule = Watching(patched_sd.variant.schedule)
    patched_sd(pipe, schedule=schedule)
    denoise(pipe, torch.tensor([981, 970, 960]), inputs_of(pipe, 3))
    assert schedule.seen_phases == [0]


@pytest.mark.parametrize("timestep", [981, 981.0, torch.tensor(981), torch.tensor([981]), torch.tensor([981, 981])])
def test_a_bare_denoiser_called_by_hand(timestep: Any, make_pipeline: Make, patched_sd: Patch) -> None:
    pipe = make_pipeline("sd")
    inputs = inputs_of(pipe, 2)
    exact = denoise(pipe, timestep, inputs)
    handle = patched_sd(pipe.unet, schedule={0.9: {}, 0.0: "exact"})
    accelerated = denoise(pipe, timestep, inputs)
    assert handle.report().calls_accelerated == handle.report().layers_patched == 7
    assert not torch.allclose(accelerated, exact, atol=1e-4)
    assert torch.equal(denoise(pipe, 20, inputs), denoise(pipe, torch.tensor(20), inputs))
    assert handle.report().calls_accelerated == 7
    handle.remove()
    assert torch.equal(denoise(pipe, timestep, inputs), exact)


def test_positional_arguments_are_understood(make_pipeline: Make, patched_sd: Patch) -> None:
    unet = make_pipeline("sd").unet
    patched_sd(unet, schedule={0.0: {}})
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 16, tiny.WIDTH)
    with torch.no_grad():
        assert torch.equal(unet(x, 500, context).sample, unet(x, timestep=500, encoder_hidden_states=context).sample)


def test_gradients_flow_through_a_patched_denoiser(make_pipeline: Make, patched_sd: Patch) -> None:
    unet = make_pipeline("sd").unet
    patched_sd(unet, schedule={0.6: {}, 0.0: "exact"})
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    unet(x, torch.tensor([981, 20]), torch.randn(2, 16, tiny.WIDTH)).sample.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    weights = [p for name, p in unet.named_parameters() if "attn1" in name]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)


# Pipelines that share a denoiser.


def test_a_sibling_made_with_from_pipe_is_patched_too(make_pipeline: Make, patched_sd: Patch) -> None:
    pipe = make_pipeline("sd")
    before = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    exact = tiny.run(before)
    handle = patched_sd(pipe)
    after = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    for sibling in (before, after):
        sibling.set_progress_bar_config(disable=True)
        assert not torch.equal(tiny.run(sibling), exact)
        with pytest.raises(ValueError, match="already patched, perhaps through a pipeline that shares it"):
            patched_sd(sibling)
    assert any("from_pipe" in note for note in handle.report().notes)
    assert "from_pipe" in str(handle.report())
    diffattn.unpatch(after)
    assert torch.equal(tiny.run(before), exact)
    assert handle.report().removed


def test_a_patched_denoiser_can_move_to_another_pipeline(make_pipeline: Make, patched_sd: Patch) -> None:
    pipe, other = make_pipeline("sd"), make_pipeline("sd")
    exact = tiny.run(other)
    patched_sd(pipe)
    accelerated = tiny.run(pipe)
    other.unet = pipe.unet
    del pipe
    assert torch.equal(tiny.run(other), accelerated)
    diffattn.unpatch(other)
    assert torch.equal(tiny.run(other), exact)


def test_every_method_has_a_variant() -> None:
    assert {variant.method for variant in VARIANTS.values()} == set(diffattn.METHODS)

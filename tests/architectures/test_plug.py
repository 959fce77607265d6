"""The plug: diffusers' own processors with only their call of attention replaced."""

import copy
import dis
import inspect
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from support import tiny
from support.patching import ALWAYS, FEW, MID, Make, call, self_attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import diffattn
from diffattn.architectures import plain_attention, plug
from diffattn.architectures.layer_plug import LayerPlug
from diffattn.architectures.run_state import ACCELERATED, DenoiserCall, Latest, RunState, Tally
from diffattn.functional import agent_attention, landmark_attention, pool_tokens, sample_tokens
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerSpec

GRID = (8, 8)
SPEC = LayerSpec("layer", level=0, num_heads=2, head_dim=8)
PROCESSORS: dict[str, Callable[[], Any]] = {
    "AttnProcessor2_0": AttnProcessor2_0,
    "AttnProcessor": AttnProcessor,
    "SlicedAttnProcessor": lambda: SlicedAttnProcessor(2),
    "JointAttnProcessor2_0": JointAttnProcessor2_0,
    "FluxAttnProcessor": FluxAttnProcessor,
    "FluxIPAdapterAttnProcessor": lambda: FluxIPAdapterAttnProcessor(16, 16),  # a module with weights
    "WanAttnProcessor": WanAttnProcessor,
}


def made(original: Any = None, **options: Any) -> Any:
    """A plugged processor within a call of a denoiser of 8x8 tokens; (its plug is `processor.diffattn`)."""
    run = RunState(Latest())
    run.begin(DenoiserCall(phase=0, grids=[GRID], compiled=False))
    landmarks: dict[str, Any] = (
        {} if "agents" in options else {"max_head_error": 100.0}
    )  # no head falls back to exact attention
    method = AgentAttention.from_options({"num_agents": 4, "min_tokens": 0} | landmarks | options)
    original = AttnProcessor2_0() if original is None else original
    parts = {"layer": SPEC, "methods": [method], "run": run, "tally": Tally()}
    return plain_attention.replaced(original=original, **parts).processor


def layer(**flags: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, **flags).eval()


def tokens(heads: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(2, heads, 64, 8, generator=torch.Generator().manual_seed(seed))


def counts(processor: Any) -> dict[str, int]:
    return processor.diffattn.tally.of(SPEC.name)


# What a plugged processor is to others.


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_it_answers_for_the_class_and_has_the_attributes_of_the_original(make: Callable[[], Any]) -> None:
    original = make()
    kind = type(original)
    processor = made(original)
    assert processor.__class__ is kind
    assert isinstance(processor, kind)
    assert {type(processor)} == {kind}  # as `type(processor) == kind`
    assert {kind} == {type(processor)}
    assert type(processor) is not kind
    assert {type(processor)} != {nn.Linear}
    assert type(processor.__class__() if kind in (AttnProcessor, AttnProcessor2_0) else make()) is kind
    original.told = "by the original"
    assert processor.told == "by the original"
    processor.told = "by the plugged"
    assert original.told == "by the plugged"
    assert not hasattr(original, plug.SLOT)
    assert processor.diffattn.original is original
    assert plug.plug_of(original) is None


def test_the_weights_of_a_processor_are_still_those_of_the_model() -> None:
    original = FluxIPAdapterAttnProcessor(16, 16)
    processor = made(original)
    assert list(processor.parameters()) == list(original.parameters()) != []
    processor.to(torch.float64)
    assert {p.dtype for p in original.parameters()} == {torch.float64}


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_a_deep_copy_is_another_one_of_the_same_kind(make: Callable[[], Any]) -> None:
    original = make()
    original.list = [1]
    processor = made(original)
    twin = copy.deepcopy(processor)
    assert type(twin) is type(processor)
    assert twin.diffattn is not processor.diffattn
    assert twin.diffattn.original is not original
    twin.list.append(2)
    assert (original.list, twin.diffattn.original.list) == ([1], [1, 2])


def test_a_copied_model_has_the_processors_that_its_patch_knows() -> None:
    unet = tiny.unet()
    diffattn.patch(unet, **FEW)
    twin = copy.deepcopy(unet)
    patch = diffattn.patching.patch.find_patch(twin)
    assert patch is not diffattn.patching.patch.find_patch(unet)
    ours = [layer for layer in patch._layers if layer.runs is not None]
    assert len(ours) == 7
    assert all(layer.module.processor is layer.processor for layer in ours)
    assert all(plug.plug_of(layer.processor) is layer.runs for layer in ours)


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_pickling_is_refused_and_says_what_to_do(make: Callable[[], Any]) -> None:
    with pytest.raises(pickle.PicklingError, match=r"diffattn\.unpatch first"):
        pickle.dumps(made(make()))


# Every processor of diffusers.


def all_processors() -> Iterator[type]:
    """The classes of diffusers that attend between projections, by their signature."""
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for name in dir(package):
            getattr(package, name)  # imported when asked for
    for name, module in sorted(sys.modules.items()):
        if name.startswith("diffusers.models.") and module is not None:
            for kind in vars(module).values():
                is_own = inspect.isclass(kind) and kind.__module__ == name and "Processor" in kind.__name__
                if is_own and inspect.isfunction(inspect.getattr_static(kind, "__call__", None)):
                    yield kind


@pytest.mark.slow
def test_every_processor_that_calls_attention_keeps_its_signature_and_its_place_in_the_source() -> None:
    found, refused = 0, {}
    for kind in all_processors():
        try:
            ours: Any = plug.plugged_class(kind).__call__
        except plug.PluggedError as error:
            refused[kind.__name__] = str(error)
            continue
        found += 1
        theirs: Any = kind.__call__
        assert inspect.signature(ours) == inspect.signature(theirs), kind
        if kind not in plug.STAND_INS:
            if plug.CACHE in inspect.signature(theirs).parameters:  # chosen between in each call
                ours = inspect.getclosurevars(ours).nonlocals["plugged"]
            places = [(c.co_filename, c.co_firstlineno, c.co_name) for c in (ours.__code__, theirs.__code__)]
            assert places[0] == places[1]
            assert (ours.__defaults__, ours.__globals__) == (theirs.__defaults__, theirs.__globals__)
            assert ours.__annotations__ == theirs.__annotations__
    assert found > 60
    assert all("makes no call of attention" in why or "is a closure" in why for why in refused.values()), refused


@pytest.mark.parametrize("kind", [IPAdapterAttnProcessor2_0, FluxIPAdapterAttnProcessor, WanAttnProcessor])
def test_of_several_calls_of_attention_only_that_over_the_layers_own_tokens_is_handed_over(kind: Any) -> None:
    name = "dispatch_attention_fn" if kind is not IPAdapterAttnProcessor2_0 else "scaled_dot_product_attention"
    source = inspect.getsource(kind.__call__)
    before, after = source.count(name + "("), 0
    for instruction in _instructions(plug.plugged_class(kind).__call__.__code__):
        after += instruction == "attend"
    assert before > 1
    assert after == 1


def _instructions(code: Any) -> list[Any]:
    return [x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_METHOD", "LOAD_ATTR")]


def test_perturbed_attention_is_accelerated_where_it_attends_and_kept_where_it_does_not() -> None:
    attn, x = layer(), torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(0))
    original: Any = PAGIdentitySelfAttnProcessor2_0()
    processor = made(original)
    plain, perturbed = processor(attn, x).chunk(2)
    exact = original(attn, x).chunk(2)
    torch.testing.assert_close(perturbed, exact[1])
    assert not torch.allclose(plain, exact[0], atol=1e-5)
    torch.testing.assert_close(plain, made()(attn, x[:2]))
    assert counts(processor) == {ACCELERATED: 1}


def test_a_traceback_shows_diffusers_own_line() -> None:
    processor = made(AttnProcessor2_0(), min_tokens=1000)
    attn, x = layer(), torch.randn(2, 64, 16)
    with pytest.raises(RuntimeError) as caught:
        processor(attn, x, attention_mask=torch.zeros(2 * 2, 1, 63))  # for 64 keys
    frames = traceback.extract_tb(caught.value.__traceback__)
    inside = [f for f in frames if f.filename == attention_processor.__file__ and f.name == "__call__"][-1]
    source, first = inspect.getsourcelines(AttnProcessor2_0.__call__)
    number, column = inside.lineno or 0, inside.colno or 0
    assert first < number < first + len(source)
    assert source[number - first][column:].startswith("F.scaled_dot_product_attention(")


@pytest.mark.slow
def test_nothing_of_diffusers_or_of_the_loaded_modules_changes(make_pipeline: Make) -> None:
    pipe = make_pipeline("sd")
    tiny.run(pipe)
    with diffattn.patch(pipe, **FEW):
        tiny.run(pipe)  # imports what is imported late
    modules = {name: module for name, module in sys.modules.items() if name.startswith(("diffusers", "torch.nn"))}
    contents = {name: dict(vars(module)) for name, module in modules.items()}
    kinds = {kind: dict(vars(kind)) for kind in (*all_processors(), Attention, AttentionModuleMixin)}
    names = set(sys.modules)
    handle = diffattn.patch(pipe, **FEW)
    pipe.enable_attention_slicing(1)
    tiny.run(pipe)
    assert handle.report().calls_accelerated == 4 * 7
    for after in ("patched", "removed"):
        assert set(sys.modules) == names, after
        for name, module in modules.items():
            found = vars(module)
            assert found.keys() == contents[name].keys(), (name, after)
            assert all(found[k] is v for k, v in contents[name].items()), (name, after)
        for kind, before in kinds.items():
            assert dict(vars(kind)) == before, (kind, after)
        handle.remove()


def test_a_gradient_flows_through_it_as_through_the_original() -> None:
    attn, x = layer(), torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for processor in (AttnProcessor2_0(), made(min_tokens=1000), made(num_agents=31)):
        attn.zero_grad()
        given = x.clone().requires_grad_()
        processor(attn, given).square().sum().backward()
        gradients.append([given.grad, *(p.grad.clone() for p in attn.parameters())])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))
    assert all(b.isfinite().all() and not torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True)
               if a.abs().max() > 1e-3)  # fmt: skip


# Threads.


@contextmanager
def all_at_once(run: Callable[[int], None], number: int) -> Iterator[None]:
    """Run a function in threads that start together; errors are raised here."""
    barrier, errors = threading.Barrier(number), []

    def one(i: int) -> None:
        barrier.wait()
        try:
            run(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    yield


@pytest.mark.slow
def test_threads_that_find_displaced_layers_together_plug_each_of_them_once() -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **ALWAYS)
    expected = [call(unet, timestep=901 - i) for i in range(4)]
    theirs = AttnProcessor()
    unet.set_attn_processor(theirs)
    found: dict[int, Tensor] = {}
    with all_at_once(lambda i: found.update({i: call(unet, timestep=901 - i)}), 4):
        pass
    for i in range(4):
        torch.testing.assert_close(found[i], expected[i], atol=1e-4, rtol=1e-3)
    for attn in self_attention(unet).values():
        ours = plug.plug_of(attn.processor)
        assert ours is not None
        assert ours.original is theirs
    handle.remove()
    assert {*unet.attn_processors.values()} == {theirs}


# Attention backends.


def flux() -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
def flux_call(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(64, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(8), torch.arange(8)).float()
    return model(
        hidden_states=torch.randn(1, 64, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 6, 16, generator=generator),
        pooled_projections=torch.randn(1, 16, generator=generator),
        timestep=torch.tensor([0.9]), img_ids=ids, txt_ids=torch.zeros(6, 3), return_dict=False,
    )[0]  # fmt: skip


@pytest.fixture
def _backends() -> Iterator[None]:
    """`set_attention_backend` also sets diffusers' default, which is restored here."""
    with attention_backend(AttentionBackendName.NATIVE):
        yield


def kernels(model: Any) -> tuple[Tensor, set[str]]:
    """The output, and the kernels of attention that ran."""
    with torch.profiler.profile() as profile:
        out = flux_call(model)
    return out, {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}


@pytest.mark.slow
@pytest.mark.usefixtures("_backends")
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_chosen_backend_reaches_the_exact_path(order: str) -> None:
    model = flux()
    default, ran = kernels(model)
    assert "aten::_scaled_dot_product_attention_math" not in ran
    if order == "before":
        model.set_attention_backend("_native_math")
    handle = diffattn.patch(model, num_agents=6, min_tokens=1000)
    handle.quiet()
    if order == "after":
        assert torch.equal(flux_call(model), default)
        model.set_attention_backend("_native_math")
    found, ran = kernels(model)
    assert ran == {"aten::_scaled_dot_product_attention_math"}
    handle.remove()
    assert torch.equal(kernels(model)[0], found)
    assert kernels(model)[1] == ran


@pytest.mark.usefixtures("_backends")
def test_a_chosen_backend_leaves_layers_accelerated() -> None:
    model = flux()
    handle = diffattn.patch(model, num_agents=6, min_tokens=0)
    accelerated = flux_call(model)
    model.set_attention_backend("_native_math")
    handle.expect_new_run()
    torch.testing.assert_close(flux_call(model), accelerated)
    assert handle.report().calls_accelerated == 4


# The arguments of the call.


def exact(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    """What a processor calls, with an argument besides."""
    given.pop("parallel_config", None)
    return scaled_dot_product_attention(q, k, v, **given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dropout_p": 0.5}, "dropout"),
        ({"is_causal": True}, "causal"),
        ({"parallel_config": object()}, "context parallel"),
        ({"scale": 0.0}, "a scale of 0.0"),
        ({"attn_mask": torch.ones(64, 64, dtype=torch.bool).tril()}, "a mask of 2 dimensions"),
        ({"attn_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()}, "masked: the mask differs between queries"),
    ],
)
def test_what_the_method_cannot_follow_runs_as_it_was_called(given: dict[str, Any], reason: str) -> None:
    q, k, v = (tokens(seed=i) for i in range(3))
    processor, attn = made(), layer()
    torch.manual_seed(0)
    found = processor.diffattn.attend(exact, True, attn, None, q, k, v, **given)
    torch.manual_seed(0)
    assert torch.equal(found, exact(q, k, v, **given))
    assert counts(processor) == {reason: 1}


def test_a_mask_of_another_type_is_passed_on() -> None:
    class Blocks:
        """As a `BlockMask` of flex attention."""

    given: list[Any] = []

    def flex(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any) -> Tensor:
        given.append(attn_mask)
        return v

    processor, blocks = made(), Blocks()
    q, k, v = (tokens(seed=i) for i in range(3))
    assert processor.diffattn.attend(flex, True, layer(), None, q, k, v, attn_mask=blocks) is v
    assert given == [blocks]
    assert counts(processor) == {"masked by a Blocks": 1}


@pytest.mark.parametrize("positional", [True, False])
def test_dropout_of_zero_and_other_defaults_are_no_reason(positional: bool) -> None:
    q, k, v = (tokens(seed=i) for i in range(3))
    processor = made()
    args, named = ((None, 0.0, False), {}) if positional else ((), {"dropout_p": 0.0, "is_causal": False})
    processor.diffattn.attend(exact, True, layer(), None, q, k, v, *args, **named)
    assert counts(processor) == {ACCELERATED: 1}


@pytest.mark.parametrize("scale", [0.1, 0.9])
def test_the_scale_of_the_call_is_that_of_the_logits(scale: float) -> None:
    q, k, v = (tokens(seed=i) for i in range(3))
    attend = made(num_agents=16).diffattn.attend
    found = attend(exact, True, layer(), None, q, k, v, scale=scale)
    expected = attend(exact, True, layer(), None, q * (scale * 8**0.5), k, v)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(found, attend(exact, True, layer(), None, q, k, v), atol=1e-2)


@pytest.mark.parametrize("heads_first", [True, False])
def test_keys_that_several_heads_share_are_repeated(heads_first: bool) -> None:
    q, (k, v) = tokens(4), (tokens(2, seed=i) for i in (1, 2))
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    attend = made(num_agents=16).diffattn.attend
    expected = attend(exact, True, layer(), None, q, *repeated)
    if heads_first:
        found = attend(exact, True, layer(), None, q, k, v, enable_gqa=True)
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found = attend(exact, False, layer(), None, q, k, v, enable_gqa=True).transpose(1, 2)
    assert torch.equal(found, expected)


# Masks over keys.


def key_mask(hidden: list[int], additive: bool) -> Tensor:
    """[2, 1, 1, 64]: the same tokens of every sample are hidden."""
    keep = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    keep[..., hidden] = False
    return torch.zeros(keep.shape).masked_fill(~keep, -torch.inf) if additive else keep


CORNERS = [8 * row + column for row in (0, 3, 4, 7) for column in (0, 3, 4, 7)]
"""Tokens that four landmarks on 8x8 tokens are not sampled from: those are the inner ones of 4x4 cells."""


@pytest.mark.parametrize("additive", [True, False])
def test_landmarks_beside_hidden_keys_are_those_of_the_other_keys_alone(additive: bool) -> None:
    q, k, v = (tokens(seed=i) for i in range(3))
    kept = [i for i in range(64) if i not in CORNERS]
    mask = key_mask(CORNERS, additive)
    processor = made(num_agents=4)
    found = processor.diffattn.attend(exact, True, layer(), None, q, k, v, attn_mask=mask)
    sampled = [sample_tokens(x, GRID, 4) for x in (q, k)]
    expected = landmark_attention(q, k[:, :, kept], v[:, :, kept], *sampled)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, processor.diffattn.attend(exact, True, layer(), None, q, k, v), atol=1e-2)
    assert counts(processor)[ACCELERATED] == 2


@pytest.mark.parametrize("additive", [True, False])
def test_pooled_agents_beside_hidden_keys_are_those_of_the_other_keys_alone(additive: bool) -> None:
    q, k, v = (tokens(seed=i) for i in range(3))
    hidden = list(range(20, 64))
    processor = made(agents="pool", scale_exponent=0.5, shortcut=0.0)
    found = processor.diffattn.attend(exact, True, layer(), None, q, k, v, attn_mask=key_mask(hidden, additive))
    agents = pool_tokens(q, GRID, 4)
    expected = agent_attention(q, k[:, :, :20], v[:, :, :20], agents, scale_exponent=0.5, shortcut=0.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("agents", ["landmarks", "pool"])
def test_what_a_mask_hides_does_not_count(agents: str) -> None:
    q, k, v = (tokens(seed=i) for i in range(3))
    hidden = list(range(40, 64))
    mask = key_mask(hidden, additive=False)
    attend = made(agents=agents, num_agents=16, shortcut=0.0 if agents == "pool" else None).diffattn.attend
    before = attend(exact, True, layer(), None, q, k, v, attn_mask=mask)
    k[:, :, hidden], v[:, :, hidden] = 5.0, -7.0
    torch.testing.assert_close(attend(exact, True, layer(), None, q, k, v, attn_mask=mask), before)


def test_a_layer_that_is_called_outside_the_denoiser_runs_exact() -> None:
    unet = tiny.unet()
    attn = self_attention(unet)[MID]
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        expected = attn(x)
        handle = diffattn.patch(unet, **ALWAYS)
        assert torch.equal(attn(x), expected)
    assert isinstance(plug.plug_of(attn.processor), LayerPlug)
    row = next(x for x in handle.report().layers if x.name == MID)
    assert row.passed_through == {"called outside a call of the denoiser, for instance by model.forward": 1}

"""The compared methods: each runs, does what it says, and leaves the pipeline as it was."""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from support import tiny, tiny_joint
from support.peer_packages import needs
from support.reference import cases

import diffattn
from diffattn.patching.patch import find_patch

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

from peers import VARIANTS, LeftOut, Setting, apply, check_names
from peers.downsampling import SHRINK, DownsampledKeys, shrink
from peers.pictures import builtin_prompts

SETTING = Setting(levels=(0, 1), steps=20, min_tokens=0)
OTHERS = ("floor", "steps-14+deepcache-2", "tgate+agent-fast", "sada+tgate", "deepcache-3+sada")
ALL = (*(name for name in VARIANTS if name != "steps-17"), *OTHERS)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory):
    """Its latents are 16x16: 256 tokens at level 0, 64 at level 1."""
    return tiny.pipeline("sd", tmp_path_factory.mktemp("pipe"))


def arguments(steps: int) -> dict:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return dict(prompt=["a", "b"], num_inference_steps=steps, guidance_scale=3.0, generator=generators,
                output_type="latent", height=32, width=32)  # fmt: skip


def latents(draw, steps: int = 10) -> torch.Tensor:
    return draw(**arguments(steps)).images


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory):
    """A Stable Diffusion 3 of 256 tokens."""
    return tiny_joint.sd3_pipeline(tmp_path_factory.mktemp("sd3"))


def sd3_latents(draw, steps: int = 10) -> torch.Tensor:
    """With few tokens of T5, beside which agents can pay off."""
    given = {k: v for k, v in arguments(steps).items() if k not in ("height", "width")}
    return draw(max_sequence_length=8, **given).images


@pytest.mark.parametrize(
    "name",
    ["sdpa", "agent", "agent-pooled", "keys-sampled", "keys-pooled", "tiles-2", "steps-14", "cachedit-100",
     "agent+cachedit-100"],
)  # fmt: skip
def test_a_variant_for_transformers_changes_the_latents_and_leaves_them_as_they_were(sd3, name):
    needs(name)
    setting = Setting(levels=(0,), steps=10, min_tokens=0)
    before = sd3_latents(sd3)
    with apply(name, sd3, setting) as draw:
        found, again = sd3_latents(draw), sd3_latents(draw)
    assert found.isfinite().all()
    assert torch.equal(found, again)
    assert torch.equal(found, before) == (name == "sdpa")
    assert torch.equal(sd3_latents(sd3), before)


@pytest.mark.parametrize("name", ["tome-0.5", "deepcache-2", "tgate", "sada", "floor"])
def test_a_variant_that_cannot_follow_a_transformer_is_left_out(sd3, name):
    needs(name)
    with pytest.raises(LeftOut), apply(name, sd3, Setting(levels=(0,), steps=20, min_tokens=0)):
        pass


def test_cache_dit_is_left_out_of_unets(pipe):
    needs("cachedit-0.1")
    refused = pytest.raises(LeftOut, match="made for transformers, not for UNet2DConditionModel")
    with refused, apply("cachedit-0.1", pipe, SETTING):
        pass


@pytest.fixture(scope="module")
def exact(pipe) -> dict[int, torch.Tensor]:
    """By number of steps."""
    return {steps: latents(pipe, steps) for steps in (4, 10)}


def state(pipe) -> list:
    """Everything that a variant could leave changed."""
    modules = [
        (id(m), type(m), id(getattr(m, "processor", None)), sorted(m.__dict__), len(m._forward_pre_hooks))
        for m in pipe.unet.modules()
    ]
    return [sorted(pipe.__dict__), torch.get_rng_state().tolist(), *modules]


@pytest.mark.parametrize("name", ALL)
def test_a_variant_changes_the_latents_and_leaves_everything_as_it_was(pipe, exact, name):
    needs(name)
    before = state(pipe)
    steps = 10 if "steps" in name or "sada" in name else 4
    with apply(name, pipe, SETTING) as draw:
        found, again = latents(draw, steps), latents(draw, steps)
    assert found.isfinite().all()
    assert torch.equal(found, again), "a second run is not the first"
    assert torch.equal(found, exact[steps]) == (name == "sdpa")
    assert state(pipe) == before


@pytest.mark.parametrize(
    "name", ["agent+deepcache-3", "agent+tgate", "agent+sada", "tome-0.5", "keys-sampled", "tiles-2"]
)
def test_a_variant_is_undone_after_an_exception(pipe, name):
    needs(name)
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt), apply(name, pipe, SETTING) as draw:
        draw(callback_on_step_end=interrupt, **arguments(10))
    assert state(pipe) == before


def interrupt(pipe, step, timestep, kwargs):
    if step == 2:
        raise KeyboardInterrupt
    return {}


def test_tgate_asks_the_processors_of_agents_and_only_those(pipe):
    pytest.importorskip("tgate")
    with apply("tgate", pipe, SETTING) as draw:
        alone = latents(draw)
    with apply("agent+tgate", pipe, SETTING) as draw:
        latents(draw)
        handle = find_patch(pipe)
        assert handle is not None
        report = handle.report()
    accelerated = [layer for layer in report.layers if layer.accelerated]
    assert {layer.level for layer in accelerated} == {0}  # level 1 has as many tokens as there are agents
    with diffattn.patch(pipe, min_tokens=10**9), warnings.catch_warnings():  # every layer passes through
        warnings.simplefilter("ignore", diffattn.DiffAttnWarning)
        with apply("tgate", pipe, SETTING) as draw:
            assert torch.equal(latents(draw), alone)


def test_deepcache_with_a_full_step_every_time_is_exact(pipe, exact):
    pytest.importorskip("DeepCache")
    with apply("deepcache-1", pipe, SETTING) as draw:
        assert torch.equal(latents(draw), exact[10])


def test_deepcache_skips_layers_in_the_steps_between(pipe):
    pytest.importorskip("DeepCache")
    calls = []
    hook = pipe.unet.mid_block.attentions[0].register_forward_hook(lambda *_: calls.append(1))
    with apply("deepcache-3", pipe, SETTING) as draw:
        latents(draw)
    hook.remove()
    assert len(calls) == 4  # of 10 steps: 0, 3, 6, 9


def oracle(x: torch.Tensor, allowed: torch.Tensor, attn) -> torch.Tensor:
    """Self-attention of one layer where token i sees the tokens that row i of `allowed` names."""
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def layer(pipe):
    """(attention of level 0, tokens [2, 64, C], rows [64], columns [64])"""
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 64, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    place = torch.arange(64)
    return attn, x, place // 8, place % 8


def test_sampled_keys_are_those_of_every_second_row_and_column(layer):
    attn, x, row, column = layer
    allowed = ((row % 2 == 0) & (column % 2 == 0)).expand(64, 64)
    found = DownsampledKeys(AttnProcessor2_0(), SHRINK["sampled"])(attn, x)
    torch.testing.assert_close(found, oracle(x, allowed, attn))


@cases("todo_")
def test_sampled_keys_match_the_published_implementation(case):
    p = case.params
    attn = Attention(query_dim=p["C"], heads=p["heads"], dim_head=p["dim_head"])
    attn.load_state_dict({name.removeprefix("w."): x for name, x in case.tensors.items() if name.startswith("w.")})
    case.assert_close(shrink(case["in.x"], p["factor"]), "out.downsampled")
    found = DownsampledKeys(AttnProcessor2_0(), partial(shrink, factor=p["factor"]))(attn, case["in.x"])
    case.assert_close(found, "out.y")


def test_tokens_of_a_tile_see_each_other_and_no_others(pipe, layer):
    attn, x, row, column = layer
    tile = row // 4 * 2 + column // 4
    seen = []
    hook = attn.register_forward_hook(lambda module, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    with apply("tiles-2", pipe, SETTING) as draw:
        draw(**(arguments(1) | {"height": 16, "width": 16}))  # a grid of 8x8 at level 0
    hook.remove()
    x, found = seen[0]
    torch.testing.assert_close(found, oracle(x, tile[:, None] == tile, attn))


@pytest.mark.parametrize("name", ["keys-sampled", "keys-pooled"])
def test_downsampled_keys_draw_what_the_method_draws(pipe, name):
    """The peer projects fewer tokens, the method all of them; the pictures agree."""
    with apply(name, pipe, SETTING) as draw:
        found = latents(draw, 4)
    with diffattn.patch(pipe, "keys", pooled=name == "keys-pooled", min_tokens=0):
        torch.testing.assert_close(latents(pipe, 4), found, atol=1e-3, rtol=1e-3)


def test_a_recipe_is_drawn_as_it_is_written(pipe, tmp_path):
    written = {"method": "keys", "options": {"factor": 4, "min_tokens": 0}}
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    with apply(f"recipe-{tmp_path}/recipe.json", pipe, SETTING) as draw:
        found = latents(draw, 4)
    with diffattn.patch(pipe, recipe=written):
        assert torch.equal(latents(pipe, 4), found)
    with pytest.raises(LeftOut, match="missing"), apply("recipe-missing.json", pipe, SETTING):
        pass


def test_pooled_keys_are_means_of_projected_keys(layer):
    attn, x, row, column = layer
    cell = row // 2 * 4 + column // 2
    mean = torch.nn.functional.one_hot(cell).float().T / 4  # [16, 64]
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    out = (q @ (mean @ k).mT * q.shape[-1] ** -0.5).softmax(-1) @ (mean @ v)
    found = DownsampledKeys(AttnProcessor2_0(), SHRINK["pooled"])(attn, x)
    torch.testing.assert_close(found, attn.to_out[0](out.transpose(1, 2).flatten(2)))


def test_grids_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square pictures only"):
        shrink(torch.zeros(1, 8, 4), 2)


@pytest.mark.parametrize("name", ["nonsense", "tome", "tome-x", "keys-halved", "agent-best", "agent+", "steps-ten"])
def test_unknown_variants(name):
    with pytest.raises(ValueError, match="unknown variant"):
        check_names([name])


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("steps-17", 10, "17 of 20 is no whole number of 10 steps"),
        ("deepcache-5", 6, "2 of 6 steps would be full, of 20 steps 4"),
    ],
)
def test_what_a_short_run_cannot_stand_for_is_left_out(pipe, name, steps, message):
    needs(name)
    with pytest.raises(LeftOut, match=message), apply(name, pipe, Setting(steps=steps)):
        pass


@pytest.mark.parametrize(
    ("name", "package"), [("tome-0.5", "tomesd"), ("deepcache-3", "DeepCache"), ("tgate", "tgate")]
)
def test_peers_that_are_not_installed_say_how_to_get_them(pipe, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LeftOut, match=f"pip install --no-deps .*{package}=="), apply(name, pipe, SETTING):
        pass


def test_the_built_in_prompts_do_not_overlap():
    trained, held_out = builtin_prompts("trained"), builtin_prompts("held-out")
    assert len(set(trained)) == len(set(held_out)) == 64
    assert not set(trained) & set(held_out)

"""Situations in which a patched layer, or the hooks, are not called as usual: what runs, and what is reported."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DiffusionPipeline,
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from support import tiny
from support.patching import ALWAYS, FEW, MID, Make, call, self_attention
from torch import Tensor, nn

import diffattn
from diffattn import DiffAttnWarning
from diffattn.functional import agent_attention, pool_tokens

PHASES = FEW | {"schedule": {0.5: {}, 0.0: "exact"}}


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


def row(handle: diffattn.Patch, name: str = MID) -> Any:
    return next(layer for layer in handle.report().layers if layer.name == name)


# The scale, the grid and the batch of a layer are its own.


@pytest.mark.parametrize(("kind", "honours"), [(AttnProcessor, True), (AttnProcessor2_0, False)])
def test_a_scale_changed_by_the_user_counts_where_the_original_honours_it(kind: type, honours: bool) -> None:
    unet = tiny.unet()
    unet.set_attn_processor(kind())
    plain = call(unet)
    for layer in self_attention(unet).values():
        layer.scale *= 3
    assert torch.equal(call(unet), plain) is not honours
    attn = self_attention(unet)[MID]
    with diffattn.patch(unet, **ALWAYS, agents="pool"):
        seen: list[Tensor] = []
        attn.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
        call(unet)
    x, out = seen
    q, k, v = (to(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v))
    root = 3**0.5 if honours else 1.0  # on both sides of every product
    agents = pool_tokens(q * root, (8, 8), 6)
    expected = agent_attention(q * root, k * root, v, agents).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, attn.to_out[0](expected), atol=1e-5, rtol=1e-4)


def test_a_scale_of_zero_runs_exact() -> None:
    unet = tiny.unet()
    unet.set_attn_processor(SlicedAttnProcessor(2))
    self_attention(unet)[MID].scale = 0.0
    exact = call(unet)
    handle = diffattn.patch(unet, **ALWAYS, layers=[MID])
    assert torch.equal(call(unet), exact)
    assert row(handle).passed_through == {"attn.scale is 0.0, not a number above 0": 1}


def merging(block: Any, keep: slice) -> None:
    """As token merging does on top: a layer sees some of its tokens."""
    inner = block.attn1.forward
    block.attn1.forward = lambda x, *args, **kwargs: inner(x[:, keep], *args, **kwargs).repeat_interleave(
        x.shape[1] // x[:, keep].shape[1], dim=1
    )


def test_tokens_as_many_as_at_another_level_are_not_taken_for_its_grid() -> None:
    unet: Any = tiny.unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    merging(block, slice(None, None, 4))  # 64 of 256 tokens, as many as level 1 has
    handle = diffattn.patch(unet, **ALWAYS)
    call(unet)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert row(handle, name).passed_through == {"64 tokens do not form the layer's grid of 16x16": 1}
    assert handle.report().calls_accelerated == 6


def test_windows_with_samples_in_phases_of_their_own_run_exact() -> None:
    """A layer's batch is a multiple of the denoiser's, and its tokens are as many as at level 1."""
    unet: Any = tiny.unet()
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    inner = attn.forward

    def in_windows(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        windows = x.unflatten(1, (4, -1)).flatten(0, 1)
        return inner(windows, *args, **kwargs).unflatten(0, (-1, 4)).flatten(1, 2)

    attn.forward = in_windows
    times = (901, torch.tensor([901, 20]))
    exact = [call(unet, timestep=t) for t in times]
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    handle = diffattn.patch(unet, **PHASES, layers=[name])
    assert all(torch.equal(call(unet, timestep=t), e) for t, e in zip(times, exact, strict=True))
    assert row(handle, name).passed_through == {
        "64 tokens do not form the layer's grid of 16x16": 1,
        "a batch of 8 where 2 samples are in phases of their own": 1,
    }


# Processors that a pipeline swaps within each call.


def pag_pipeline(pipe: DiffusionPipeline) -> Any:
    pag = StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"])
    pag.set_progress_bar_config(disable=True)
    return pag


@pytest.mark.slow
def test_layers_of_perturbed_attention_guidance_are_accelerated(pipe: DiffusionPipeline) -> None:
    pag = pag_pipeline(pipe)

    def draw() -> Tensor:
        return tiny.run(pag, num_inference_steps=3, pag_scale=2.0)

    exact = draw()
    for _ in range(2):  # patching again changes nothing
        handle = diffattn.patch(pag, **FEW)
        drawn = [draw() for _ in range(2)]  # the pipeline installs its processors, and restores ours, in each
        assert torch.equal(*drawn)
        assert row(handle).passed_through == {}
        assert (handle.report().layers_accelerated, handle.report().calls_accelerated) == (7, 42)
        handle.remove()
        assert all(type(p) is AttnProcessor2_0 for p in pag.unet.attn_processors.values())
    assert torch.equal(draw(), exact)


def test_a_processor_that_calls_ours_does_not_displace_it() -> None:
    class Around:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.inner(attn, hidden_states, *args, **kwargs)

    unet = tiny.unet()
    handle = diffattn.patch(unet, **ALWAYS)
    attn = self_attention(unet)[MID]
    attn.set_processor(Around(attn.processor))
    call(unet)
    assert (row(handle).accelerated, row(handle).note) == (1, "")


# Pickling, bypassed hooks, export.


@pytest.mark.parametrize("what", [pickle.dumps, lambda x: torch.save(x, io.BytesIO())], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("part", ["pipeline", "denoiser", "handle"])
def test_a_patched_model_cannot_be_pickled_and_says_what_to_do(
    pipe: Any, what: Callable[[Any], Any], part: str
) -> None:
    handle = diffattn.patch(pipe, **FEW)
    with pytest.raises(pickle.PicklingError, match=r"diffattn\.unpatch"):
        what({"pipeline": pipe, "denoiser": pipe.unet, "handle": handle}[part])
    torch.save(pipe.unet.state_dict(), io.BytesIO())
    tiny.run(copy.deepcopy(pipe))
    handle.remove()
    pickle.dumps(pipe)


def test_a_copy_of_a_patched_processor_is_one_of_the_original(pipe: Any) -> None:
    attn = self_attention(pipe.unet)[MID]
    kind = type(attn.processor)
    diffattn.patch(pipe, **FEW)
    assert type(copy.copy(attn.processor)).__mro__ == kind.__mro__


def test_nor_be_sent_to_another_process(pipe: Any) -> None:
    diffattn.patch(pipe, **FEW)
    process = multiprocessing.get_context("spawn").Process(target=print, args=(pipe.unet,))
    with pytest.raises(pickle.PicklingError, match=r"diffattn\.unpatch"):
        process.start()


@torch.no_grad()
def forward(unet: Any, timestep: int) -> Tensor:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return unet.forward(x, timestep, encoder_hidden_states=torch.ones(2, 7, tiny.WIDTH)).sample


@pytest.mark.filterwarnings("error::diffattn.DiffAttnWarning")
def test_a_forward_without_the_hooks_runs_exact_and_is_said_once() -> None:
    unet = tiny.unet()
    exact = [forward(unet, t) for t in (900, 10, 900)]
    handle = diffattn.patch(unet, **PHASES)
    with pytest.warns(DiffAttnWarning, match=r"forward was called directly"):
        found = [forward(unet, 900)]
    call(unet, timestep=900)
    found += [forward(unet, 10), forward(unet, 900)]
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert handle.report().calls_accelerated == 7
    reason = "called outside a call of the denoiser, for instance by model.forward"
    assert row(handle).passed_through == {reason: 3}


def test_after_an_interrupted_call_a_forward_without_the_hooks_is_exact() -> None:
    unet = tiny.unet()
    exact = forward(unet, 900)
    handle = diffattn.patch(unet, **PHASES)
    expected = call(unet, timestep=900)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    stopping = unet.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(unet, timestep=900)
    stopping.remove()
    with pytest.warns(DiffAttnWarning, match=r"forward was called directly"):
        assert torch.equal(forward(unet, 900), exact)
    assert row(handle).accelerated == 1
    assert torch.equal(call(unet, timestep=900), expected)


def test_a_forward_without_the_hooks_is_exact_with_gradients_too() -> None:
    unet: Any = tiny.unet()
    diffattn.patch(unet, **PHASES)
    x, context = torch.randn(2, 4, 16, 16), torch.ones(2, 7, tiny.WIDTH)
    unet(x, 900, encoder_hidden_states=context)
    with pytest.warns(DiffAttnWarning, match="forward was called directly"):
        found = unet.forward(x, 900, encoder_hidden_states=context).sample
    diffattn.unpatch(unet)
    assert torch.equal(found, unet(x, 900, encoder_hidden_states=context).sample)


def test_a_layer_called_by_hand_after_a_run_is_exact() -> None:
    unet = tiny.unet()
    attn, x = self_attention(unet)[MID], torch.randn(2, 64, 32)
    with torch.no_grad():
        exact = attn(x)
        diffattn.patch(unet, **ALWAYS)
        call(unet)
        assert torch.equal(attn(x), exact)


class Plain(nn.Module):
    """A denoiser that gives a tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]


EXPORTS: dict[str, Callable[..., Any]] = {
    "export": lambda model, args: torch.export.export(model, args),
    "strict export": lambda model, args: torch.export.export(model, args, strict=True),
    "jit.trace": lambda model, args: torch.jit.trace(model, args, check_trace=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_a_patched_model_is_not_exported_and_says_what_to_do(export: Callable[..., Any]) -> None:
    args = (torch.randn(1, 4, 16, 16), torch.tensor(900), torch.randn(1, 7, tiny.WIDTH))
    model = Plain(unet := tiny.unet()).eval()
    expected = call(unet)
    handle = diffattn.patch(unet, **FEW)
    with torch.no_grad(), pytest.raises(Exception, match=r"diffattn\.unpatch"):
        export(model, args)
    call(unet)
    assert handle.report().calls_accelerated == 7
    handle.remove()
    assert torch.equal(call(unet), expected)


# Control networks.


def union() -> ControlNetUnionModel:
    torch.manual_seed(0)
    return ControlNetUnionModel(
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        transformer_layers_per_block=(1, 1, 2),  # type: ignore[arg-type]
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        conditioning_embedding_out_channels=(8, 8),
        num_trans_channel=16,
        num_trans_head=2,
        num_control_type=6,
        num_proj_channel=16,
    ).eval()


def controlled(handle: diffattn.Patch) -> list[Any]:
    return [x for x in handle.report().layers if x.name.startswith("controlnet.") and x.left_alone is None]


def test_a_union_of_control_networks_is_patched(make_pipeline: Make) -> None:
    parts = make_pipeline("sdxl").components
    pipe = StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=union())
    pipe.set_progress_bar_config(disable=True)
    run = lambda: tiny.run(pipe, control_image=[tiny.picture()], control_mode=[0])  # noqa: E731
    exact = run()
    handle = diffattn.patch(pipe, **FEW)
    run()
    assert len(controlled(handle)) == 5
    assert all(x.accelerated == 4 for x in controlled(handle))
    handle.remove()
    assert torch.equal(run(), exact)


def test_several_control_networks_are_patched(make_pipeline: Make) -> None:
    pipe: Any = make_pipeline("controlnet")
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(8, 8)
    ).eval()])  # fmt: skip
    handle = diffattn.patch(pipe, **FEW)
    tiny.run(pipe, image=[tiny.picture(), tiny.picture(1)])
    assert {x.name.split(".")[1] for x in controlled(handle)} == {"0", "1"}
    assert all(x.accelerated == 4 for x in controlled(handle))


def test_a_t2i_adapter_is_in_the_report(pipe: DiffusionPipeline) -> None:
    adapter = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    handle = diffattn.patch(StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False))
    assert "adapter (T2IAdapter) runs unpatched: it has no attention layers" in handle.report().notes


def test_control_networks_of_other_architectures_are_in_the_report(pipe: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

    pipe.register_modules(controlnet=Other())
    handle = diffattn.patch(pipe, **FEW)
    assert "controlnet (Other) runs unpatched: its architecture is not supported" in str(handle.report())


@pytest.mark.slow
def test_a_unet_with_control_net_xs_in_it_is_patched(pipe: Any) -> None:
    unet: Any = tiny.unet(layers_per_block=2)
    two: Any = (8, 8)
    adapter = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, conditioning_embedding_out_channels=two)
    parts: dict[str, Any] = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"unet": unet}
    steered = StableDiffusionControlNetXSPipeline(**parts, controlnet=adapter, requires_safety_checker=False)
    steered.set_progress_bar_config(disable=True)
    run = lambda: tiny.run(steered, image=tiny.picture())  # noqa: E731
    exact = run()
    handle = diffattn.patch(steered, **FEW)
    run()
    patched = [x for x in handle.report().layers if x.left_alone is None]
    assert len(patched) >= 10
    assert all(x.accelerated == 4 for x in patched)
    handle.remove()
    assert torch.equal(run(), exact)

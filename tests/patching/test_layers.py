"""Masks, layers of other shapes, sizes, devices and precision: what patched layers compute."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, UNet2DConditionModel
from support import tiny
from support.patching import ALWAYS, FEW, MID, Make, call, self_attention
from torch import Tensor, nn

import diffattn


@pytest.fixture
def pipe(make_pipeline: Make) -> DiffusionPipeline:
    return make_pipeline("sd")


# Masks and layers of other shapes: our output by hand.


def by_hand(attn: Any, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None, kappa: float = 0.3) -> Tensor:
    """One attention layer with agents pooled to 2x3, written out with explicit matrices."""
    residual = x
    if x.ndim == 4:
        x = x.flatten(2).mT
    if attn.group_norm is not None:
        x = attn.group_norm(x.mT).mT

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = (heads(to(x)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    image = q.mT.flatten(0, 1).unflatten(2, grid)
    agents = nn.functional.adaptive_avg_pool2d(image, (2, 3)).flatten(2).mT.unflatten(0, q.shape[:2])
    scale = q.shape[-1] ** -0.5
    logits = agents @ k.mT * scale
    logits = logits if mask is None else logits + mask[:, None, None, :]
    out = (q @ agents.mT * scale**kappa).softmax(-1) @ logits.softmax(-1) @ v + 0.075 * v
    out = attn.to_out[0](out.transpose(1, 2).flatten(2))
    if residual.ndim == 4:
        out = out.mT.reshape(residual.shape)
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


def captured(unet: Any, **more: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """(layer, its input, its output) of every self-attention layer in one call of a UNet."""
    seen: list[tuple[Any, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], out: Tensor) -> None:
        seen.append((module, args[0], out))

    hooks = [
        m.register_forward_hook(keep, with_kwargs=True)
        for name, m in unet.named_modules()
        if hasattr(m, "set_processor") and "attn2" not in name
    ]
    call(unet, **more)
    for hook in hooks:
        hook.remove()
    return seen


HEIGHT, WIDTH = 12, 18  # 6 agents become 2x3 on this grid and on its half


def check_by_hand(unet: nn.Module, layers: int, mask: Tensor | None = None, **more: Any) -> None:
    handle = diffattn.patch(unet, **ALWAYS, agents="pool")
    seen = captured(unet, size=(HEIGHT, WIDTH), **more)
    assert len(seen) == layers == handle.report().calls_accelerated
    for attn, x, out in seen:
        tokens = x.shape[-2] * (x.shape[-1] if x.ndim == 4 else 1)
        grid = {216: (12, 18), 54: (6, 9)}[tokens]
        with torch.no_grad():
            torch.testing.assert_close(out, by_hand(attn, x, grid, mask), atol=1e-4, rtol=1e-3)


def test_every_layer_computes_the_formula() -> None:
    check_by_hand(tiny.unet(), layers=7)


def test_layers_on_feature_maps_with_norm_residual_and_rescaling_compute_the_formula() -> None:
    unet = tiny.unet(
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=8,
        mid_block_scale_factor=2**0.5,
    )
    attention: list[Any] = [m for m in unet.modules() if hasattr(m, "set_processor") and not m.is_cross_attention]
    assert sum(m.group_norm is not None and m.residual_connection for m in attention) == 6
    check_by_hand(unet, layers=7)


def test_query_and_key_norms_compute_the_formula() -> None:
    unet = tiny.unet()
    for i, layer in enumerate(self_attention(unet).values()):
        head_dim = layer.inner_dim // layer.heads
        layer.norm_q, layer.norm_k = nn.LayerNorm(head_dim), nn.RMSNorm(head_dim)
        nn.init.normal_(layer.norm_q.weight, mean=1, std=0.5, generator=torch.Generator().manual_seed(i))
    check_by_hand(unet, layers=7)


def one_level(**overrides: Any) -> UNet2DConditionModel:
    """Attention at level 0 only, so that one mask fits all layers."""
    return tiny.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        **overrides,
    )


def test_a_mask_over_the_keys_is_honoured() -> None:
    keep = torch.rand(2, HEIGHT * WIDTH, generator=torch.Generator().manual_seed(0)) > 0.4
    check_by_hand(one_level(), layers=3, mask=(1 - keep.float()) * -10000.0, attention_mask=keep.float())


def test_a_mask_follows_its_sample_when_samples_are_in_different_phases() -> None:
    unet = one_level()
    diffattn.patch(unet, **FEW, agents="pool", schedule={0.5: {}, 0.0: "exact"})
    keep = (torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.WIDTH)

    @torch.no_grad()
    def run(steps: list[int], rows: slice) -> Tensor:
        t = torch.tensor(steps)
        return unet(x[rows], t, encoder_hidden_states=context[rows], attention_mask=keep[rows]).sample

    alone = torch.cat([run([901], slice(0, 1)), run([20], slice(1, 2))])
    torch.testing.assert_close(run([901, 20], slice(0, 2)), alone, atol=1e-5, rtol=1e-4)


def test_what_cannot_follow_a_mask_passes_it_on_to_the_original() -> None:
    unet = one_level()
    keep = (torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    exact = call(unet, attention_mask=keep)
    handle = diffattn.patch(unet, agents="merge", **ALWAYS)
    assert not torch.equal(call(unet), exact)
    assert torch.equal(call(unet, attention_mask=keep), exact)
    reasons = {r for x in handle.report().layers for r in x.passed_through}
    assert reasons == {"masked: merged tokens cannot follow a mask"}


def test_landmarks_follow_a_mask_over_keys() -> None:
    unet = one_level()
    keep = torch.ones(2, 256)
    keep[:, 100:] = 0
    exact = call(unet, attention_mask=keep)
    handle = diffattn.patch(unet, agents="landmarks", **(ALWAYS | {"num_agents": 60}))
    masked, unmasked = call(unet, attention_mask=keep), call(unet)
    assert all(not x.passed_through for x in handle.report().layers)
    assert torch.dist(masked, exact) < torch.dist(unmasked, exact) / 3


# Sizes, devices, precision.


@pytest.mark.parametrize("agents", ["pool", "merge", "landmarks"])
@pytest.mark.parametrize("size", [(17, 13), (16, 24), (15, 16), (9, 31)])
def test_odd_and_non_square_latents_are_accelerated_at_every_level(size: tuple[int, int], agents: str) -> None:
    unet = tiny.unet()
    exact = call(unet, size=size)
    handle = diffattn.patch(unet, agents=agents, **ALWAYS)
    out = call(unet, size=size)
    assert handle.report().layers_accelerated == 7
    h, w = size
    levels = {0: h * w, 1: -(-h // 2) * -(-w // 2)}
    assert all(x.tokens == levels[x.level] for x in handle.report().layers if x.left_alone is None)
    assert out.shape == exact.shape
    assert not torch.allclose(out, exact, atol=1e-4)
    handle.remove()
    assert torch.equal(call(unet, size=size), exact)


def test_one_patched_denoiser_takes_many_sizes_in_turn() -> None:
    unet = tiny.unet()
    handle = diffattn.patch(unet, **ALWAYS)
    sizes = [(16, 16), (17, 13), (8, 32), (16, 16)]
    outs = [call(unet, size=size) for size in sizes]
    assert torch.equal(outs[0], outs[3])
    assert handle.report().calls_passed_through == 0


@pytest.mark.parametrize("agents", ["pool", "merge", "landmarks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_full(agents: str, dtype: torch.dtype) -> None:
    unet = tiny.unet()
    exact = call(unet)
    with diffattn.patch(unet, agents=agents, **ALWAYS):
        full = call(unet)
        unet.to(dtype)  # type: ignore[arg-type]
        half = call(unet)
    assert half.dtype == dtype
    assert (half - full).abs().mean() < 0.5 * (exact - full).abs().mean() + 0.02


def sharpened(unet: UNet2DConditionModel, factor: float) -> UNet2DConditionModel:
    with torch.no_grad():
        for layer in self_attention(unet).values():
            layer.to_q.weight.mul_(factor)
            layer.to_k.weight.mul_(factor)
    return unet


@pytest.mark.parametrize("agents", ["pool", "merge", "landmarks"])
def test_layers_that_ask_for_upcasting_do_not_overflow_in_fp16(agents: str) -> None:
    unet = sharpened(tiny.unet(upcast_attention=True), 600).half()
    handle = diffattn.patch(unet, agents=agents, **ALWAYS)
    largest = max(
        (layer.to_q(x).float() @ layer.to_k(x).float().mT).abs().max().item() for layer, x, _ in captured(unet)
    )
    assert largest > torch.finfo(torch.float16).max
    out = call(unet)
    assert handle.report().layers_accelerated == 7
    assert out.isfinite().all()
    for _, _, layer_out in captured(unet):
        assert layer_out.isfinite().all()


@pytest.mark.parametrize("hook_first", [True, False])
def test_the_hooks_of_accelerate_and_ours_get_along(hook_first: bool) -> None:
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` put around a denoiser."""
    unet = tiny.unet()
    exact = call(unet)
    with diffattn.patch(unet, **ALWAYS):
        expected = call(unet)
    if hook_first:
        add_hook_to_module(unet, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        handle = diffattn.patch(unet, **ALWAYS)
    else:
        handle = diffattn.patch(unet, **ALWAYS)
        add_hook_to_module(unet, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(call(unet), expected)
    assert handle.report().layers_accelerated == 7
    handle.remove()
    assert torch.equal(call(unet), exact)
    remove_hook_from_module(unet)
    assert torch.equal(call(unet), exact)


def test_inference_mode(pipe: DiffusionPipeline) -> None:
    diffattn.patch(pipe, **FEW)
    expected = tiny.run(pipe)
    with torch.inference_mode():
        assert torch.equal(tiny.run(pipe), expected)
    assert torch.equal(tiny.run(pipe), expected)


def test_cpu_autocast_is_followed(pipe: DiffusionPipeline) -> None:
    unet = pipe.unet
    diffattn.patch(pipe, **ALWAYS)
    full = call(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = call(unet)
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


def test_a_lora_on_the_projections_is_followed(pipe: DiffusionPipeline) -> None:
    peft = pytest.importorskip("peft")
    handle = diffattn.patch(pipe, **ALWAYS)
    before = call(pipe.unet)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    with_lora = call(pipe.unet)
    assert not torch.allclose(with_lora, before, atol=1e-4)
    assert handle.report().layers_patched == 7
    pipe.unet.disable_adapters()
    torch.testing.assert_close(call(pipe.unet), before, atol=1e-5, rtol=1e-4)


def test_a_module_called_outside_its_denoiser_runs_exact(pipe: DiffusionPipeline) -> None:
    layer = self_attention(pipe.unet)[MID]
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        exact = layer(x)
        handle = diffattn.patch(pipe, **FEW)
        assert torch.equal(layer(x), exact)
    assert handle.report().calls_accelerated == 0


def test_a_patched_pipeline_saves_as_the_original(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    original = tiny.run(pipe)
    diffattn.patch(pipe, **FEW)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = type(pipe).from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.run(loaded), original)


def test_controlnet_guess_mode(make_pipeline: Make) -> None:
    """The ControlNet gets half the batch of the UNet."""
    pipe = make_pipeline("controlnet")
    original = tiny.run(pipe, guess_mode=True)
    with diffattn.patch(pipe, **ALWAYS) as handle:
        assert not torch.allclose(tiny.run(pipe, guess_mode=True), original, atol=1e-4)
        assert handle.report().calls_passed_through == 0
        assert handle.report().runs == 1
    assert torch.equal(tiny.run(pipe, guess_mode=True), original)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread, as on a GPU"])
def test_gradient_checkpointing_recomputes_what_ran(elsewhere: bool) -> None:
    def gradients(checkpointing: bool) -> Tensor:
        unet = tiny.unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        diffattn.patch(unet, **ALWAYS)
        torch.manual_seed(0)
        x, context = torch.randn(1, 4, 16, 16, requires_grad=True), torch.randn(1, 7, tiny.WIDTH)
        loss = unet(x, 901, context).sample.square().sum()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result() if elsewhere else loss.backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-4, rtol=1e-3)

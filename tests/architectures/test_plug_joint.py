"""What the plug leaves alone in joint transformers: image prompts, caches, masks that it cannot follow; and the control
networks that it takes with their pipeline."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor, QwenImage21KVCache
from support.denoisers import CASES
from support.denoisers.case import Case, normal
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import diffattn
from diffattn.architectures.plug import plug_of

FEW: dict[str, Any] = {"num_agents": 6, "min_tokens": 0, "max_head_error": float("1e9")}
NEVER: dict[str, Any] = {"num_agents": 1, "min_tokens": 10**6}


def case_of(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


def inputs(case: Case) -> dict[str, Any]:
    return case.inputs(2, torch.Generator().manual_seed(1))


def image_prompt(name: str, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Processors for an image prompt in every layer that has one, and the arguments that carry it."""
    torch.manual_seed(5)
    config, rng = model.config, torch.Generator().manual_seed(2)
    width = config.attention_head_dim * config.num_attention_heads
    prompt = normal(2, 4, width, rng=rng)
    if name.startswith("Flux"):
        new = {key: FluxIPAdapterAttnProcessor(width, width) for key in model.attn_processors if "single" not in key}
        return dict(model.attn_processors) | new, {"ip_hidden_states": [prompt]}
    new = {
        key: SD3IPAdapterJointAttnProcessor2_0(width, width, config.attention_head_dim, 16)
        for key in model.attn_processors
    }
    return new, {"ip_hidden_states": prompt, "temb": normal(2, 16, rng=rng)}


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_of_an_image_prompt_only_the_attention_over_the_layers_own_tokens_is_replaced(name: str) -> None:
    case = case_of(name)
    model, given = case.build(), inputs(case)
    processors, arguments = image_prompt(name, model)
    without = case.call(model, given)
    model.set_attn_processor(dict(processors))
    given = given | {"joint_attention_kwargs": arguments}
    exact = case.call(model, given)
    assert not torch.allclose(exact, without, rtol=1e-3)
    handle = diffattn.patch(model, **NEVER)
    handle.quiet()
    assert torch.equal(case.call(model, given), exact)
    handle.remove()
    with diffattn.patch(model, **FEW) as handle:
        out = case.call(model, given)
        assert handle.report().calls_accelerated == case.num_layers
        assert not torch.allclose(out, exact, rtol=1e-3)
        seen = answer_exactly(model)
        torch.testing.assert_close(case.call(model, given), exact, rtol=1e-4, atol=1e-5)
    assert seen == [48 + case.context] * case.num_layers


def answer_exactly(model: nn.Module) -> list[int]:
    """Replaces every method by exact attention; the numbers of keys that they will be called with."""
    seen: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
        seen.append(k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=call.mask)

    for module in model.modules():
        plug = plug_of(getattr(module, "processor", None))
        if plug is not None:
            plug.functions = (attend,) * len(plug.functions)
    return seen


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_an_image_prompt_may_be_loaded_into_a_patched_model(name: str) -> None:
    case = case_of(name)
    model, given = case.build(), inputs(case)
    processors, arguments = image_prompt(name, model)
    with diffattn.patch(model, **FEW) as handle:
        case.call(model, given)
        model.set_attn_processor(dict(processors))
        case.call(model, given | {"joint_attention_kwargs": arguments}, level=0.9)
        report = handle.report()
    assert (report.calls_accelerated, report.calls_passed_through) == (2 * case.num_layers, 0), str(report)
    key, processor = next(iter(processors.items()))
    assert model.get_submodule(key.removesuffix(".processor")).processor is processor


def test_calls_with_a_cache_of_keys_and_values_run_exact_and_say_so() -> None:
    case = case_of("Flux2Transformer2DModel")
    model, given = case.build(), inputs(case)
    for name, module in model.named_modules():
        if hasattr(module, "set_processor"):
            single = name.startswith("single")
            module.set_processor(Flux2KVParallelSelfAttnProcessor() if single else Flux2KVAttnProcessor())
    cached = {"kv_cache_mode": "extract", "num_ref_tokens": 20}
    exact = case.call(model, given | cached)
    with diffattn.patch(model, **FEW) as handle:
        handle.quiet()
        assert torch.equal(case.call(model, given | cached), exact)
        reasons = {reason for layer in handle.report().layers for reason in layer.passed_through}
        assert reasons == {"keys and values of a cache"}
        case.call(model, given)
        assert handle.report().calls_accelerated == case.num_layers


def test_qwen_image_21_is_accelerated_with_its_cache_too() -> None:
    case = case_of("QwenImage21Transformer2DModel")
    model, given = case.build(), inputs(case)
    cache = QwenImage21KVCache(case.num_layers)
    with diffattn.patch(model, **FEW) as handle:
        whole = case.call(model, given)
        extracted = case.call(model, given | {"kv_cache": cache, "kv_cache_mode": "extract"})
        cached = case.call(model, given | {"kv_cache": cache, "kv_cache_mode": "cached"})
        report = handle.report()
    assert (report.calls_accelerated, report.calls_passed_through) == (3 * case.num_layers, 0), str(report)
    torch.testing.assert_close(extracted, whole)
    torch.testing.assert_close(cached, whole[:, -48:], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_block_masks_run_exact_and_say_so() -> None:
    case = case_of("QwenImage21Transformer2DModel")
    model, given = case.build(), inputs(case)
    model.set_attn_processor(QwenImage21FlexAttnProcessor())
    exact = case.call(model, given)
    with diffattn.patch(model, **FEW) as handle:
        handle.quiet()
        assert torch.equal(case.call(model, given), exact)
        reasons = {reason for layer in handle.report().layers for reason in layer.passed_through}
    assert reasons == {"masked by a BlockMask"}


def test_a_mask_that_differs_between_queries_of_the_picture_runs_exact() -> None:
    case = case_of("ChromaTransformer2DModel")
    model, given = case.build(), inputs(case)
    given["attention_mask"][0, -3:] = 0
    exact = case.call(model, given)
    with diffattn.patch(model, **FEW) as handle:
        handle.quiet()
        assert torch.equal(case.call(model, given), exact)
        reasons = {reason for layer in handle.report().layers for reason in layer.passed_through}
    assert reasons == {"masked: the mask differs between queries"}


CONTROLLED = [
    ("FluxControlNetPipeline", "FluxTransformer2DModel", "FluxControlNetModel"),
    ("StableDiffusion3ControlNetPipeline", "SD3Transformer2DModel", "SD3ControlNetModel"),
    ("QwenImageControlNetPipeline", "QwenImageTransformer2DModel", "QwenImageControlNetModel"),
    ("HunyuanDiTControlNetPipeline", "HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
]


def controlled(kind: str, base: str, networks: list[Any]) -> Any:
    """A pipeline of a denoiser and its control networks, without the parts that are not needed here."""
    pipeline: Any = getattr(diffusers, kind)
    parts = set(inspect.signature(pipeline.__init__).parameters) - {"self", "requires_safety_checker"}
    scheduler = case_of(base).scheduler()
    control = networks[0] if len(networks) == 1 else networks
    given = {"transformer": case_of(base).build(), "controlnet": control, "scheduler": scheduler}
    return pipeline(**dict.fromkeys(parts) | given)


@pytest.mark.parametrize(("kind", "base", "control"), CONTROLLED)
def test_control_networks_are_patched_with_their_pipeline(kind: str, base: str, control: str) -> None:
    case, of_control = case_of(base), case_of(control)
    pipe = controlled(kind, base, [of_control.build()])
    exact = of_control.call(pipe.controlnet, inputs(of_control))
    with diffattn.patch(pipe, **FEW) as handle:
        out = of_control.call(pipe.controlnet, inputs(of_control))
        case.call(pipe.transformer, inputs(case))
        layers = handle.report().layers
    assert not torch.equal(out, exact)
    assert sum(layer.accelerated for layer in layers if layer.name.startswith("controlnet.")) == of_control.num_layers
    assert sum(layer.accelerated for layer in layers) == case.num_layers + of_control.num_layers
    assert torch.equal(of_control.call(pipe.controlnet, inputs(of_control)), exact)


@pytest.mark.parametrize(("kind", "base", "control"), [row for row in CONTROLLED if row[0][:4] in ("Flux", "Stab")])
def test_several_control_networks_are_patched_with_their_pipeline(kind: str, base: str, control: str) -> None:
    of_control = case_of(control)
    pipe = controlled(kind, base, [of_control.build(seed) for seed in range(2)])
    with diffattn.patch(pipe, **FEW) as handle:
        for network in pipe.controlnet.nets:
            of_control.call(network, inputs(of_control))
        names = {layer.name for layer in handle.report().layers if layer.accelerated}
    assert len(names) == 2 * of_control.num_layers
    assert {name.split(".")[1] for name in names} == {"0", "1"}

"""The parts of a pipeline: complete or refused, of one path, and moved to the device one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from safetensors.torch import load_file, save_file
from support.sampling_cases import tiny_pipeline
from torch import Tensor, nn

import diffattn
from diffattn.drawing.loading import load_pipeline
from diffattn.models.config import PATHS as RECORDED
from diffattn.sampling import PATHS, EulerMaruyamaScheduler, SiTPipeline

DRAW: Any = dict(num_inference_steps=3, output_type="pt", guidance_scale=2.0)


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def draw(pipe: Any, **options: Any) -> Tensor:
    return pipe([0, 1], generator=torch.Generator().manual_seed(0), **DRAW | options).images


# Weights.


def rename(file: Path, old: str, new: str) -> None:
    kept = load_file(file)
    kept[new] = kept.pop(old)
    save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize("load", [load_pipeline, SiTPipeline.from_pretrained])
def test_weights_of_the_transformer_that_do_not_fit_are_named(load: Any, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    rename(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", "blocks.1.attn.proj.bias", "other")
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.attn\.proj\.bias; unexpected: other"):
        load(str(tmp_path))


def test_weights_that_another_part_lacks_are_named(tmp_path: Path) -> None:
    tiny_pipeline(vae=tiny_vae()).save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path)).vae.device.type == "cpu"  # type: ignore[attr-defined]
    rename(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", "other")
    with pytest.raises(ValueError, match=r"lacks weights: vae\.decoder\.conv_in\.bias"):
        load_pipeline(str(tmp_path))


# The path.


def test_every_path_can_be_recorded() -> None:
    assert tuple(PATHS) == RECORDED


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_ode_needs_no_path(path: str, scheduler: Any) -> None:
    assert draw(tiny_pipeline(scheduler(), path=path)).isfinite().all()


@pytest.mark.parametrize(("trained", "other"), [("linear", "gvp"), ("gvp", "linear")])
def test_the_sde_of_another_path_is_refused(trained: str, other: str, tmp_path: Path) -> None:
    message = f"path is '{other}', but the transformer was trained on '{trained}': use EulerMaruyama.*'{trained}'"
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(EulerMaruyamaScheduler(path=other), path=trained)
    tiny_pipeline(EulerMaruyamaScheduler(path=trained), path=trained).save_pretrained(tmp_path)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    assert draw(pipe).isfinite().all()
    pipe.scheduler = EulerMaruyamaScheduler(path=other)
    with pytest.raises(ValueError, match=message):
        draw(pipe)


# Offload.


def offloaded(pipe: SiTPipeline) -> SiTPipeline:
    """The accelerator's place is taken by the CPU: every hook is there and runs, and moves nothing."""
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def test_every_part_with_weights_has_its_turn() -> None:
    pipe = tiny_pipeline(vae=tiny_vae())
    assert SiTPipeline.model_cpu_offload_seq is not None
    assert SiTPipeline.model_cpu_offload_seq.split("->") == [
        name for name, part in pipe.components.items() if isinstance(part, nn.Module)
    ]
    offloaded(pipe)
    assert [hook.model for hook in pipe._all_hooks] == [pipe.transformer, pipe.vae]
    assert pipe._all_hooks[1].hook.prev_module_hook is pipe._all_hooks[0]  # its turn ends that of the transformer


@pytest.mark.parametrize("with_vae", [False, True])
def test_an_offloaded_pipeline_draws_the_same_again_and_again(with_vae: bool) -> None:
    pipe = tiny_pipeline(vae=tiny_vae() if with_vae else None)
    before = draw(pipe)
    offloaded(pipe)
    assert draw(pipe).equal(before)
    assert draw(pipe).equal(before)
    assert len(pipe._all_hooks) == 1 + with_vae  # a run puts them back for the next one


def test_noise_and_latents_lie_where_the_parts_run() -> None:
    """On "meta", which is a device apart: what stayed on the CPU would not meet what is there."""
    pipe = tiny_pipeline()
    cpu_offload_with_hook(pipe.transformer, torch.device("meta"))
    found = pipe([0, 1], **DRAW | {"output_type": "latent"}).images
    assert (found.device.type, pipe.transformer.device.type) == ("meta", "meta")


def test_a_patch_follows_the_noise_level_under_offload() -> None:
    schedule: Any = {0.5: {"num_mediators": 4}, 0.0: {"num_mediators": 64}}
    pipe = tiny_pipeline()
    with diffattn.patch(pipe, "mediator", schedule=schedule):
        before = draw(pipe)
    offloaded(pipe)
    with diffattn.patch(pipe, "mediator", schedule=schedule):
        output = pipe([0, 1], generator=torch.Generator().manual_seed(0), return_trace=True, **DRAW)
    assert output.images.equal(before)
    assert {call["phase"] for call in output.trace} == {0, 1}

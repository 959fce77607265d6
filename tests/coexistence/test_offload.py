"""Weights that are elsewhere until they are needed."""

import pytest
import torch
from support.coexistence import Subject, agree, assert_all_accelerated, check, coexists


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@coexists(
    "group offload",
    "of blocks and of leaves, before and after the patch (here from a CPU to a CPU)",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="the pictures of the patch without it, in either order",
)
def test_group_offload(subject: Subject, kind: str) -> None:
    own = subject.draw_patched()
    handle = subject.patch()
    subject.draw()
    cpu = torch.device("cpu")
    subject.denoiser.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    agree(subject.draw(), own)
    assert_all_accelerated(handle, subject)
    handle.remove()
    agree(check(subject).accelerated, own)


@coexists(
    "`enable_model_cpu_offload`",
    "before and after the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the pictures of the patch without it",
    needs="a GPU",
)
def test_model_cpu_offload(subject: Subject) -> None:
    handle = subject.patch()
    subject.draw()
    subject.target.enable_model_cpu_offload()
    accelerated = subject.draw()
    assert_all_accelerated(handle, subject)
    handle.remove()
    agree(check(subject).accelerated, accelerated)


@coexists(
    "`enable_sequential_cpu_offload`",
    "before and after the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="the pictures of the patch without it",
    needs="a GPU",
)
def test_sequential_cpu_offload(subject: Subject) -> None:
    handle = subject.patch()
    subject.draw()
    subject.target.enable_sequential_cpu_offload()
    accelerated = subject.draw()
    assert_all_accelerated(handle, subject)
    handle.remove()
    agree(check(subject).accelerated, accelerated)

"""Weights of lower precision: the projections stay the denoiser's own, whatever stores their weights."""

from typing import Any

import pytest
import torch
from support.coexistence import Subject, check, coexists, differ
from torch import nn


@coexists(
    "quantised Linears",
    "int8, by torchao, before the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="both take effect",
    needs="torchao",
)
def test_torchao(subject: Subject) -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    before = subject.draw_patched()
    quantization.quantize_(subject.denoiser, quantization.Int8WeightOnlyConfig())
    differ(check(subject).accelerated, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@coexists(
    "quantised Linears",
    "int8, by `torch.ao.quantization.quantize_dynamic`, before the patch",
    on=["UNet2DConditionModel", "FluxTransformer2DModel"],
    holds="both take effect",
)
def test_dynamic(subject: Subject) -> None:
    before = subject.draw_patched()
    torch.ao.quantization.quantize_dynamic(subject.denoiser, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert not isinstance(subject.denoiser.get_submodule(first_query(subject)), nn.Linear)
    differ(check(subject).accelerated, before)


def first_query(subject: Subject) -> str:
    return next(name for name, _ in subject.denoiser.named_modules() if name.endswith("to_q"))


@pytest.mark.slow
@coexists(
    "`enable_layerwise_casting`",
    "weights in float8, before and after the patch",
    on=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
    holds="both take effect, with the same result in either order",
)
def test_layerwise_casting(subject: Subject) -> None:
    before = subject.draw_patched()
    handle = subject.patch()
    subject.draw()
    subject.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = subject.draw()
    handle.remove()
    differ(cast, before)
    assert torch.equal(check(subject).accelerated, cast)

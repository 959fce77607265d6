"""Attention backends of diffusers: accelerated layers do without, the exact path keeps the user's."""

from typing import Any

import pytest
import torch
from support.coexistence import Subject, agree, check, coexists
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Kernels(TorchFunctionMode):
    """Whether fused kernels were allowed in every call of exact attention over the tokens of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[bool] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            if given["query"].shape[-2] == given["key"].shape[-2] > 32:  # a text has fewer tokens
                self.fused.append(torch.backends.cuda.flash_sdp_enabled())  # one switch for all devices
        return function(*args, **(kwargs or {}))


def kernels(subject: Subject) -> set[bool]:
    with Kernels() as seen:
        subject.draw()
    return set(seen.fused)


@pytest.mark.slow
@coexists(
    "`set_attention_backend`",
    "before the patch",
    on=["FluxTransformer2DModel", "WanTransformer3DModel"],
    holds="accelerated layers draw what they draw without it; layers that run exact run on the user's backend",
)
def test_before(subject: Subject) -> None:
    own = subject.draw_patched()
    assert kernels(subject) == {True}
    subject.denoiser.set_attention_backend("_native_math")
    agree(check(subject).accelerated, own)
    exact = subject.draw()
    with subject.patch(min_tokens=10**6) as handle:
        handle.quiet()
        assert kernels(subject) == {False}
        assert torch.equal(subject.draw(), exact)
        assert handle.report().calls_accelerated == 0


@pytest.mark.slow
@coexists(
    "`set_attention_backend`",
    "after the patch, and back",
    on=["FluxTransformer2DModel", "WanTransformer3DModel"],
    holds="the same; removed, the unpatched denoiser keeps the backend",
)
def test_after(subject: Subject) -> None:
    own = subject.draw_patched()
    handle = subject.patch(min_tokens=10**6)
    handle.quiet()
    subject.denoiser.set_attention_backend("_native_math")
    assert kernels(subject) == {False}
    handle.remove()
    assert kernels(subject) == {False}
    with subject.patch():
        agree(subject.draw(), own)
    subject.denoiser.set_attention_backend("native")
    assert kernels(subject) == {True}

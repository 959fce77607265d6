"""Biased attention: values and gradients of the formula in fp64, in every formulation."""

from itertools import product

import pytest
import torch
from support.tensors import random
from torch import Tensor

from diffattn.functional.sdpa import biased_attention

BIAS = ("none", "fixed", "learned")
SHAPES = ((4, 30), (30, 4), (9, 9))  # few queries, few keys, as many


def tensors(queries: int, keys: int, bias: str, dtype: torch.dtype) -> list[Tensor | None]:
    q, k, v, b = (
        random(*shape, seed=i, dtype=dtype).requires_grad_(i < 3 or bias == "learned")
        for i, shape in enumerate([(2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8), (3, queries, keys)])
    )
    return [q, k, v, None if bias == "none" else b]


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return (logits if bias is None else logits + bias).softmax(-1) @ v


@pytest.mark.parametrize(("shape", "bias"), list(product(SHAPES, BIAS)))
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, int], bias: str) -> None:
    ours, wide = tensors(*shape, bias, torch.float32), tensors(*shape, bias, torch.float64)
    weight = random(2, 3, shape[0], 8, seed=9, dtype=torch.float64)
    out, expected = biased_attention(*ours), formula(*wide)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    (out * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, wide, strict=True):
        if b is not None and b.requires_grad:
            assert a is not None and a.grad is not None  # noqa: PT018
            torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "bias"), list(product(SHAPES, BIAS)))
def test_gradients_are_those_of_finite_differences(shape: tuple[int, int], bias: str) -> None:
    inputs = tuple(x for x in tensors(*shape, bias, torch.float64) if x is not None)
    assert torch.autograd.gradcheck(biased_attention, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_learned_bias_gives_the_same_without_gradients(shape: tuple[int, int]) -> None:
    inputs = tensors(*shape, "learned", torch.float32)
    with torch.no_grad():
        out = biased_attention(*inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(out, biased_attention(*inputs), atol=1e-6, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", BIAS)
def test_inputs_are_left_as_they_are(bias: str) -> None:
    inputs, before = tensors(4, 30, bias, torch.float32), tensors(4, 30, bias, torch.float32)
    biased_attention(*inputs)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_stay_precise_under_autocast_also_when_the_bias_learns(shape: tuple[int, int]) -> None:
    q, k, v, bias = tensors(*shape, "learned", torch.bfloat16)
    assert q is not None and k is not None and v is not None and bias is not None  # noqa: PT018
    q, k = (20 * q + 50).detach(), (20 * k + 50).detach()  # logits in the thousands: bfloat16 has steps of 32 there
    with torch.autocast("cpu", torch.bfloat16):
        out = biased_attention(q, k, v, bias.float())
    expected = formula(q.double(), k.double(), v.double(), bias.double())
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.05)

"""Parts of a DiT around its attention."""

import pytest
import torch
from torch.nn.functional import gelu

from diffattn.models.layers import PatchEmbedder, TanhGELU, modulated


def test_gelu_follows_the_tanh_formula_as_closely_as_its_dtype_does() -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    wanted = gelu(x, approximate="tanh")
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 5e-3)):
        assert (TanhGELU()(x.to(dtype)).double() - wanted).abs().max() < most
    half = x.to(torch.bfloat16)
    allowed = wanted.abs() / 128 + 6e-4  # a rounding, and what the formulas differ by
    found = TanhGELU()(half)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - gelu(half.double(), approximate="tanh")).abs() < allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_lie_side_by_side_in_memory(dtype: torch.dtype) -> None:
    """Every sum in the blocks inherits the layout: norms and products of tokens that are strided copy them first."""
    tokens = PatchEmbedder(4, 32, 2).to(dtype)(torch.randn(2, 4, 8, 8, dtype=dtype))
    assert tokens.shape == (2, 16, 32)
    assert tokens.is_contiguous()


def test_modulation_scales_around_one_and_shifts() -> None:
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    torch.testing.assert_close(modulated(x, shift, scale), x * (1 + scale) + shift)
    mixed = modulated(x, shift.bfloat16(), scale.bfloat16())  # as under autocast
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, x * (1 + scale.bfloat16()).float() + shift.bfloat16().float())

"""Floating-point operations, counted by `torch.utils.flop_counter`: products, convolutions and attention.

A multiply-add counts as two, a real Fourier transform of n values as 2.5·n·log₂ n; norms, softmaxes, activations and
sums do not count. (The "GFLOPs" of the DiT, SiT and mediator papers are multiply-adds: half of these.)
"""

from collections.abc import Callable, Sequence
from math import log2, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from diffattn.models import DiT
from diffattn.models.config import token_grid


def count_gflops(call: Callable[[], Any]) -> float:
    """GFLOPs of a call; cheapest with everything on the meta device, where nothing is computed.

    Within the call, attention runs as matrix products, since torch does not count its fused CPU kernel.
    """
    aten = torch.ops.aten
    formulas = {
        aten.convolution_backward: _convolution_backward,
        aten._fft_r2c: _real_transform,
        aten._fft_c2r: _inverse_real_transform,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops() / 1e9


def _convolution_backward(
    grad_shape: list[int], x_shape: list[int], weight_shape: list[int], *rest: Any, **kwargs: Any
) -> int:
    """Count each gradient like the forward pass; torch's own formula mistakes a depth-wise convolution for a full one.

    `rest`: bias sizes, stride, padding, dilation, transposed, output padding, groups, which gradients."""
    transposed, (of_x, of_weight, _) = rest[4], rest[7]
    return (of_x + of_weight) * conv_flop_count(x_shape, weight_shape, grad_shape, transposed)


def _real_transform(shape: list[int], dims: list[int], *rest: Any, **kwargs: Any) -> int:
    n = prod(shape[dim] for dim in dims)
    return int(2.5 * prod(shape) * log2(max(n, 2)))


def _inverse_real_transform(shape: list[int], dims: list[int], norm: int, last: int, **kwargs: Any) -> int:
    real = list(shape)
    real[dims[-1]] = last  # of the spectrum there is half
    return _real_transform(real, dims)


def forward_gflops(
    model: DiT, num_mediators: int | None = None, sample_size: int | Sequence[int] | None = None
) -> float:
    """GFLOPs of one forward pass of one sample, according to the configuration: patches of the model do not count.

    Args:
        model: the backbone, on any device; it is left as it is.
        num_mediators: n, as in `DiT.set_num_mediators`; None: the current one.
        sample_size: height and width of the sample, or one number for both; None: the model's own.

    Raises:
        ValueError: the model cannot run with so many mediators, or at this size.
    """
    p = model.patch_size
    h, w = model.grid if sample_size is None else token_grid(sample_size, p)
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
        x, t, y = torch.empty(1, model.in_channels, h * p, w * p), torch.empty(1), torch.empty(1, dtype=torch.long)
    assert isinstance(twin, DiT)
    if number := num_mediators or model.num_mediators:
        twin.set_num_mediators(number)
    return count_gflops(lambda: _forward(twin, x, t, y))


def _forward(model: DiT, *inputs: Tensor) -> None:
    with torch.no_grad():
        model(*inputs)

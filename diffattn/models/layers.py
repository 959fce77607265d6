"""The parts of a DiT around its attention: embedders, blocks, final layer. Names are those of official checkpoints.

Shapes: B batch, N = h·w tokens in row-major order on a grid (h, w), C channels, p patch size.
"""

from math import log

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from diffattn.models.attention import ATTENTION
from diffattn.models.attention_layer import AttentionOptions, TokenConv

FREQUENCIES = 128
"""Frequencies of the time embedding; each gives a cosine and a sine."""

NORM_EPS = 1e-6
"""Epsilon of every norm except the one before an MLP, which is configurable."""


def position_embedding(grid: tuple[int, int], dim: int, scale: float = 1.0) -> Tensor:
    """Fixed sin-cos embedding of rows and columns [1, h·w, dim], in fp32.

    The first half of the channels encodes the column, the second the row, each as [sin | cos] of the position
    times 10000^(-i/(dim/4)). Positions count tokens from 0, at every resolution, and are multiplied by the scale.
    """
    h, w = grid
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.outer(scale * torch.arange(size, dtype=torch.float64), omega) for size in (h, w))
    row_table, column_table = (torch.cat([x.sin(), x.cos()], dim=1).float() for x in (rows, columns))  # [·, dim/2]
    halves = [column_table.expand(h, w, -1), row_table[:, None].expand(h, w, -1)]
    return torch.cat(halves, dim=-1).reshape(1, h * w, dim)


def time_features(t: Tensor, frequency_shift: float) -> Tensor:
    """[cos(t·f) | sin(t·f)] with f_i = 10000^(-i/(128 - shift)): t [B] -> [B, 256], in fp32."""
    i = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-log(10000) * i / (FREQUENCIES - frequency_shift))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class PatchEmbedder(nn.Module):
    """Cuts an image [B, c, h·p, w·p] into tokens [B, N, C]."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # sums of the blocks inherit the layout


class TimestepEmbedder(nn.Module):
    """Time [B], as the checkpoint was trained, to [B, C]."""

    def __init__(self, dim: int, frequency_shift: float) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_features(t, self.frequency_shift).to(dtype))


class LabelEmbedder(nn.Module):
    """Class ids [B] to [B, C]. The last row, if there is a null class, means "no class"."""

    def __init__(self, num_classes: int, dim: int, null_class: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.rows = num_classes + int(null_class)
        self.embedding_table = nn.Embedding(self.rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        if y.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would synchronise the device
            self.check(y)
        return self.embedding_table(y.to(self.embedding_table.weight.device))

    def check(self, y: Tensor) -> None:
        """Raises `ValueError` if a class id is out of range."""
        outside = y[(y < 0) | (y >= self.rows)]
        if outside.numel():
            null = f", or {self.num_classes} for no class" if self.rows > self.num_classes else ""
            raise ValueError(
                f"class ids must be from 0 to {self.num_classes - 1}{null}; got {outside.unique().tolist()}"
            )


class TanhGELU(nn.Module):
    """GELU by the tanh formula, as official checkpoints have it.

    In bf16 on a CPU by the exact formula: that kernel is four times as fast, and the two differ by less than 0.0005,
    while bf16 rounds values between 1 and 2 by up to 0.004.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_slow = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        return gelu(x, approximate="none" if is_slow else "tanh")


class MLP(nn.Module):
    """[B, N, C] -> [B, N, C]"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = TanhGELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Attention and MLP, each between a norm that the condition shifts and scales and a gate that it opens (adaLN-Zero:
    Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023).

    If an attention requires it, a depth-wise convolution of the tokens is added before it or before the MLP; it starts
    at zero, so that a new block is the identity whatever its attention.
    """

    def __init__(self, dim: int, mlp_hidden: int, attention: str, options: AttentionOptions, norm_eps: float) -> None:
        super().__init__()
        kind = ATTENTION[attention]
        self.cpe1 = _silent_conv(dim) if "attention" in kind.convolves_before else None
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.attn = kind(dim, options, **options.by_name.get(attention, {}))
        self.cpe2 = _silent_conv(dim) if "mlp" in kind.convolves_before else None
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.mlp = MLP(dim, mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, grid: tuple[int, int], num_mediators: int) -> Tensor:
        """x [B, N, C], condition [B, C] -> [B, N, C]"""
        modulation = self.adaLN_modulation(condition).unsqueeze(1)  # [B, 1, 6C]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        if self.cpe1 is not None:
            x = x + self.cpe1(x, grid)
        x = torch.addcmul(x, gate_a, self.attn(modulated(self.norm1(x), shift_a, scale_a), grid, num_mediators))
        if self.cpe2 is not None:
            x = x + self.cpe2(x, grid)
        return torch.addcmul(x, gate_m, self.mlp(modulated(self.norm2(x), shift_m, scale_m)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale)·x + shift of x [B, N, C], with shift and scale [B, 1, C]."""
    return torch.addcmul(shift, x, 1 + scale)


def _silent_conv(dim: int) -> TokenConv:
    conv = TokenConv(dim)
    for weight in conv.parameters():
        nn.init.zeros_(weight)
    return conv


class FinalLayer(nn.Module):
    """Tokens [B, N, C] to patches [B, N, p·p·c], each in the order (row, column, channel)."""

    def __init__(self, dim: int, patch_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(dim, patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """[B, N, p·p·c] -> [B, c, h·p, w·p]"""
    (h, w), p = grid, patch_size
    image = patches.unflatten(2, (p, p, -1)).unflatten(1, (h, w))  # [B, h, w, p, p, c]
    return image.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, h * p, w * p)

"""Training-free approximations of self-attention, as functions of one layer's q, k, v, with what they cost.

Shapes: B batch, H heads, N = h·w tokens on a grid, D channels per head, n agents or landmarks.
Costs are multiply-adds per head and per channel, so that exact attention costs 2·N².
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.nn.functional import unfold

from diffattn.functional import (
    agent_attention,
    downsampled_attention,
    inline_attention,
    landmark_attention,
    match_tokens,
    merge_tokens,
    pool_tokens,
    sample_tokens,
    tiled_attention,
)
from diffattn.functional.inline import inline_attention_and_error
from diffattn.functional.landmark import PROBES, correct, exact_where_missed
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import AttentionMethod, LayerCall, LayerSpec, TokenLayout
from diffattn.methods.inline import FLAT
from diffattn.methods.keys import DownsampledKeys
from diffattn.methods.tiles import TiledAttention

WINDOW = 5  # keys a side around each query that are exact


@dataclass(frozen=True)
class Layer:
    """The input of one self-attention layer in one call; `before` is the same layer one step earlier."""

    x: Tensor  # [B, N, C]
    q: Tensor  # [B, H, N, D]
    k: Tensor
    v: Tensor
    before: "Layer | None" = None
    text: int = 0  # how many of the N tokens, the last ones, are those of a text

    @property
    def grid(self) -> tuple[int, int]:
        """The grid of a square picture."""
        side = round((self.q.shape[2] - self.text) ** 0.5)
        return side, side

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout((self.grid,), self.text)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of attention."""
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Candidate:
    """A family at one size."""

    family: str
    run: Callable[[Layer], Tensor]
    cost: Callable[[int, int], float]  # N, D -> multiply-adds
    exact_heads: Callable[[Layer], float] = lambda layer: 0.0  # share of heads that run exact besides


def exact(layer: Layer) -> Tensor:
    """What all others are measured against."""
    return attention(*layer.qkv)


def candidates() -> list[Candidate]:
    """Every family at the sizes that make sense."""
    found = [
        Candidate("first order around the mean query", first_order, lambda N, D: 2 * N * D),
        Candidate("InLine, every head", lambda it: inline_attention(*it.qkv), lambda N, D: 2 * N * D),
        Candidate(
            "InLine where it is near, exact elsewhere (ours)",
            inline_where_near,
            lambda N, D: 2 * N * D + 2 * PROBES * N,
            lambda it: (inline_attention_and_error(*it.qkv)[1] > FLAT).float().mean().item(),
        ),
        Candidate("exact window, far keys pooled", windowed, lambda N, D: 2 * N * (N / 16 + N / 4)),
    ]
    for side in (8, 4, 2):  # share 1/64, 1/16, 1/4
        found += _sized(side**2)
    for factor in (4, 2):
        found += [
            Candidate("every second (fourth) key", lambda it, f=factor: subsampled(it, f), _keys(factor)),
            Candidate("keys and values pooled", lambda it, f=factor: pooled_keys(it, f), _keys(factor)),
            Candidate("tiles", lambda it, f=factor: tiled(it, f), _keys(factor)),
        ]
    return found


def joint_candidates(text: int) -> list[Candidate]:
    """The methods that take layers in which `text` tokens without a place attend beside those of a picture.

    Every method answers the text exactly, or, as landmarks, nearly.
    """

    def through(n: float, N: int, D: int, cubes: float = 0.0) -> float:  # gather and hand back, the text among both
        both = n + text
        return 2 * both * (N + text) + 2 * N * both + (2 * n * both + cubes * n**3 / D if cubes else 0)

    def beside(keys: float, N: int) -> float:  # queries of the picture over fewer keys, those of the text over all
        return 2 * N * (keys + text) + 2 * text * (N + text)

    def landmarks(share: float, **options: Any) -> AttentionMethod:
        return AgentAttention(agent_ratio=1 - share, agents="landmarks", min_tokens=0, **options)

    shipped = AgentAttention(min_tokens=0)
    found = [
        Candidate("landmarks as shipped, far heads exact", _method(shipped),
                  lambda N, D: through(shipped.count(N, True), N, D, 1.2) + 2 * PROBES * N,
                  lambda it: _share_exact(shipped, it)),
    ]  # fmt: skip
    for divisor in (64, 16, 4):
        pooled = AgentAttention(agent_ratio=1 - 1 / divisor, agents="pool", scale_exponent=1.0, shortcut=0.0,
                                min_tokens=0)  # fmt: skip
        found += [
            Candidate("landmarks (ours)", _method(landmarks(1 / divisor, max_head_error=NEVER)),
                      lambda N, D, d=divisor: through(N / d, N, D, 1.2)),
            Candidate("agents, κ = 1, no shortcut", _method(pooled),
                      lambda N, D, d=divisor: through(N / d, N, D) + 2 * text * (N + text)),
        ]  # fmt: skip
    for factor in (4, 2):
        sampled, pooled = (DownsampledKeys(factor=factor, pooled=means, min_tokens=0) for means in (False, True))
        keys: Callable[[int, int], float] = lambda N, D, f=factor: beside(N / f**2, N)  # noqa: E731
        found += [
            Candidate("every second (fourth) key", _method(sampled), keys),
            Candidate(
                "keys and values pooled", _method(DownsampledKeys(factor=factor, pooled=True, min_tokens=0)), keys
            ),
            Candidate("tiles", _method(TiledAttention(tiles=factor, min_tokens=0)), keys),
        ]
    return found


NEVER = 1e9  # no head's estimated error is as large
SPEC = LayerSpec("layer", level=0, num_heads=0, head_dim=0, context="last")


def _method(method: AttentionMethod) -> Callable[[Layer], Tensor]:
    attend = method.build(SPEC)
    return lambda it: attend(*it.qkv, LayerCall(None, it.grid, layout=it.layout))


def _share_exact(method: AttentionMethod, layer: Layer) -> float:
    """The share of heads that the method runs exact."""
    call = LayerCall(None, layer.grid, layout=layer.layout)
    method.build(SPEC)(*layer.qkv, call)
    return call.exact_heads / (layer.q.shape[0] * layer.q.shape[1])


def _sized(divisor: int) -> list[Candidate]:
    def cost(N: int, D: int, cubes: float, more: float, inner: bool) -> float:
        n = N / divisor
        own = (n + WINDOW**2) * N * n / D if inner else 0  # p̂ in the window: f W⁺ once, then a product of n per key
        return 4 * N * n + more * N + own + (2 * n**2 + cubes * n**3 / D if cubes else 0)

    def of(
        family: str, run: Callable[[Layer, int], Tensor], cubes: float = 0.0, more: float = 0.0, inner: bool = False
    ) -> Candidate:
        return Candidate(
            family, lambda it: run(it, it.q.shape[2] // divisor), lambda N, D: cost(N, D, cubes, more, inner)
        )

    return [
        of("agents, published κ and shortcut", lambda it, n: _agents(it, n, 0.3, 0.075)),
        of("agents, κ = 1, no shortcut", lambda it, n: _agents(it, n, 1.0, 0.0)),
        of("agents merged by similarity", merged_agents),
        of("landmarks (ours)", lambda it, n: _landmarks(it, n, sample_tokens), cubes=1.2, more=2 * PROBES),
        of("landmarks from pooled tokens", lambda it, n: _landmarks(it, n, pool_tokens), cubes=1.2, more=2 * PROBES),
        of("landmarks and an exact window", landmarks_and_window, cubes=1.2, more=2 * WINDOW**2, inner=True),
        of("pooled, 6 Newton-Schulz steps", lambda it, n: newton_schulz(it, n, 6), cubes=24),
        Candidate(
            "landmarks of the step before",
            lambda it: reused(it, it.q.shape[2] // divisor),
            lambda N, D: 2 * N * N / divisor,
        ),
    ]


def _keys(factor: int) -> Callable[[int, int], float]:
    return lambda N, D: 2 * N * N / factor**2


def _agents(layer: Layer, n: int, kappa: float, shortcut: float) -> Tensor:
    agents = pool_tokens(layer.q, layer.grid, n)
    return agent_attention(*layer.qkv, agents, scale_exponent=kappa, shortcut=shortcut)


def _landmarks(layer: Layer, n: int, choose: Callable[[Tensor, tuple[int, int], int], Tensor]) -> Tensor:
    return landmark_attention(*layer.qkv, choose(layer.q, layer.grid, n), choose(layer.k, layer.grid, n))


def landmarks_and_window(layer: Layer, n: int) -> Tensor:
    """Landmarks, corrected for what they miss among the nearest keys.

    A row p of exact attention is known up to its sum, e_j = exp(s·q·k_j), and landmarks replace it by p̂ = f(q) W⁺ F
    (f, F: the two softmaxes). Within the window Ω of the query, e_j replaces p̂_j:

        O = (Ô - Σ_Ω p̂_j v_j + Σ_Ω p_j v_j) / (1 - Σ_Ω p̂_j + Σ_Ω p_j)

    with p_j = e_j / z, and z the sum of e_j over all keys, known at the landmarks and passed on to the queries like
    values, in logarithms. If Ω is the whole picture, the result is exact for any z.
    """
    q, k, v = layer.qkv
    s = q.shape[-1] ** -0.5
    ql, kl = (sample_tokens(x, layer.grid, n) for x in (q, k))
    logits = ql @ k.mT * s
    rows = logits.softmax(-1)  # F [B, H, n, N]
    spread = (q @ kl.mT * s).softmax(-1)  # f [B, H, N, n]
    handed = spread @ correct(ql, kl, torch.cat((rows, logits.logsumexp(-1, keepdim=True)), dim=-1))[0]
    own, log_z = handed[..., :-1], handed[..., -1:]  # p̂ [B, H, N, N], of which a kernel would compute Ω alone
    near = _near(layer.grid, q.device)
    within = (q @ k.mT * s).masked_fill(near == 0, -torch.inf)
    true = (within - log_z.maximum(within.logsumexp(-1, keepdim=True))).exp()  # z is at least its part in the window
    mine = own * near
    total = 1 - mine.sum(-1, keepdim=True) + true.sum(-1, keepdim=True)
    return ((own - mine + true) @ v) / total.clamp(min=1e-6)


def _near(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Which keys lie in the window of each query, 0 or 1 [N, N]."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    half = WINDOW // 2
    same_row = (rows[:, None] - rows[None]).abs() <= half
    same_column = (columns[:, None] - columns[None]).abs() <= half
    return torch.kron(same_row.float(), same_column.float())


def merged_agents(layer: Layer, n: int) -> Tensor:
    """Agents by token merging (Bolya & Hoffman, 2023), as the published agent attention for Stable Diffusion has it."""
    stride = round((layer.q.shape[2] / n) ** 0.5)
    matching = match_tokens(layer.x, layer.grid, (stride, stride))
    agents = merge_tokens(layer.q, matching, min(layer.q.shape[2] - n, matching.max_merged))
    return agent_attention(*layer.qkv, agents)


def newton_schulz(layer: Layer, n: int, steps: int) -> Tensor:
    """The Nyströmformer's own inverse (Xiong et al., 2021, eq. 11-13)."""
    q, k = pool_tokens(layer.q, layer.grid, n), pool_tokens(layer.k, layer.grid, n)
    w = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    norms = w.sum(-2).amax(-1) * w.sum(-1).amax(-1)
    z, one = w.mT / norms[..., None, None], torch.eye(n)
    for _ in range(steps):
        wz = w @ z
        z = 0.25 * z @ (13 * one - wz @ (15 * one - wz @ (7 * one - wz)))
    return attention(layer.q, k, z @ attention(q, layer.k, layer.v))


def reused(layer: Layer, n: int) -> Tensor:
    """Compute only the broadcast: the corrected values are those of the step before."""
    before = layer.before or layer
    q, k = (sample_tokens(x, layer.grid, n) for x in (before.q, before.k))
    return attention(layer.q, k, correct(q, k, attention(q, before.k, before.v))[0])


def first_order(layer: Layer) -> Tensor:
    """Attention as a linear function of the query, exact at the mean query."""
    q, k, v = layer.qkv
    scale, centre = q.shape[-1] ** -0.5, q.mean(-2, keepdim=True)
    p = (centre @ k.mT * scale).softmax(-1)
    mean_v, mean_k = p @ v, p @ k
    return mean_v + scale * (q - centre) @ ((k * p.mT).mT @ v - mean_k.mT @ mean_v)


def inline_where_near(layer: Layer) -> Tensor:
    """The first-order expansion at zero logits in heads where it suits eight queries; the other heads exact."""
    out, error = inline_attention_and_error(*layer.qkv)
    return exact_where_missed(out, error, *layer.qkv, FLAT)[0]


def subsampled(layer: Layer, factor: int) -> Tensor:
    """Keys and values at every `factor`-th row and column."""
    return downsampled_attention(*layer.qkv, layer.grid, factor)


def pooled_keys(layer: Layer, factor: int) -> Tensor:
    """Keys and values averaged over cells of `factor` x `factor`."""
    return downsampled_attention(*layer.qkv, layer.grid, factor, pooled=True)


def tiled(layer: Layer, factor: int) -> Tensor:
    """Attention within `factor` x `factor` tiles of the grid."""
    return tiled_attention(*layer.qkv, layer.grid, (factor, factor))


def windowed(layer: Layer) -> Tensor:
    """The keys around each query's tile, and beside them the whole picture in 2x2 means, weighted by their size."""
    q, k, v = layer.qkv
    h, w = layer.grid
    tile, n = h // 4, q.shape[2] // 4
    far_k, far_v = (pool_tokens(x, layer.grid, n) for x in (k, v))

    def cut(x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, 16, tile², D]
        image = x.unflatten(2, (h, w)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        patches = unfold(image, tile, stride=tile).unflatten(1, (x.shape[3], tile * tile))  # [BH, D, tile², 16]
        return patches.permute(0, 3, 2, 1).unflatten(0, x.shape[:2])

    near = [cut(x) for x in (q, k, v)]
    everyone = [x[:, :, None].expand(-1, -1, 16, -1, -1) for x in (far_k, far_v)]
    own = _pooled_tile(h, tile)  # [16, n]: pooled keys inside the tile count there already
    bias = torch.zeros(16, 1, tile * tile + n)
    bias[:, 0, tile * tile :] = torch.where(own, -torch.inf, torch.tensor(4.0).log())
    keys, values = (torch.cat((a, b), dim=3) for a, b in zip(near[1:], everyone, strict=True))
    out = attention(near[0], keys, values, attn_mask=bias)  # [B, H, 16, tile², D]
    return out.unflatten(2, (4, 4)).unflatten(4, (tile, tile)).transpose(3, 4).flatten(2, 5)


def _pooled_tile(side: int, tile: int) -> Tensor:
    """Which 2x2 means lie in which of the 16 tiles, [16, (side/2)²]."""
    where = torch.arange(side // 2) // (tile // 2)
    owner = (where[:, None] * 4 + where[None]).flatten()
    return owner[None] == torch.arange(16)[:, None]

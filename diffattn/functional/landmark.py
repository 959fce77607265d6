"""Attention through landmarks: agents with a correction step between aggregation and broadcast.

The Nyström approximation of a softmax (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902, eq. 13), with a
damped inverse per head in place of a fixed number of Newton-Schulz steps, and a check on a few exact answers.

Shapes: B batch, H heads, N query tokens, M key tokens, n landmarks, c tokens of a context, p probes, D channels per
head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional.masks import MASKED

MAX_DAMPING = 1e-3
PROBES = 8  # queries whose exact answer is computed beside the landmarks'
TRUSTED = 0.8  # a correction that fits the probes this well is used in full
GOLDEN = 0.618034  # spreads probes evenly in both directions of any grid


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, query_landmarks: Tensor, key_landmarks: Tensor, *, damping: float = 1e-5
) -> Tensor:
    """Gather at landmarks, undo their overlap, and broadcast to every query.

        V_A = softmax(s·Q̃ Kᵀ) V                     aggregate, s = D^(-1/2); m = mean of V_A over the landmarks
        Z   = (WᵀW + λ I)⁻¹ Wᵀ (V_A - m)             correct, W = softmax(s·Q̃ K̃ᵀ)
        O   = softmax(s·Q K̃ᵀ) (m + γ Z)              broadcast

    A query that is a landmark gets its exact attention as λ goes to 0 (and γ is 1). The damping λ keeps the inverse
    stable: it is `damping`·max(1, σ)³, at most 0.001, times the bound ‖W‖₁‖W‖∞ of the largest eigenvalue, where σ is
    the standard deviation of the head's logits between landmarks, so that heads with sharp logits are damped more. W
    and everything derived from it are computed in fp32, whatever the dtype and autocast.

    γ is 1 unless the correction does harm. In a head with sharp logits and dissimilar neighbours, the landmarks carry
    too little information, and Z amplifies noise: up to four times the true output's norm at logits with a standard
    deviation of 2 to 6. Therefore exact attention is also computed for 8 of the queries, and γ is the factor of Z
    that fits it best, divided by 0.8 and clamped to 0..1 (see `trust`). Such heads then have a relative error of 0.9 to
    1.1, like uncorrected agents: no method of this cost can approximate them, and `exact_where_missed` computes them
    exactly.

    The cost is O((N + M)·n·D + n³): as cheap as `agent_attention` for n well below N.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        v: values [B, H, M, D].
        query_landmarks: Q̃ [B, H, n, D], usually `sample_tokens` of the queries.
        key_landmarks: K̃ [B, H, n, D], of the keys at the same places.
        damping: λ of a head with flat logits, above 0 and at most 0.001.

    Returns:
        Output [B, H, N, D], in the dtype of `v`.

    Raises:
        ValueError: `damping` out of range, or landmarks of different numbers.
    """
    return landmark_attention_and_error(q, k, v, query_landmarks, key_landmarks, damping)[0]


def landmark_attention_and_error(
    q: Tensor, k: Tensor, v: Tensor, query_landmarks: Tensor, key_landmarks: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """`landmark_attention`, and the relative L2 error [B, H] of its heads on the 8 queries; infinite where a head's
    matrix could not be factorised."""
    if not 0 < damping <= MAX_DAMPING:
        raise ValueError(f"damping must be above 0 and at most {MAX_DAMPING}, got {damping}")
    if query_landmarks.shape != key_landmarks.shape:
        shapes = f"{list(query_landmarks.shape)} and {list(key_landmarks.shape)}"
        raise ValueError(f"query and key landmarks must have the same shape, got {shapes}")
    out, _, error = landmark_attention_with_context(Tokens(q, k, v, query_landmarks, key_landmarks), damping)
    return out, error


@dataclass(frozen=True)
class Context:
    """The c tokens of a call that have no position among those of the image, such as text or registers [B, H, c, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Tokens:
    """One call of a layer: its image tokens, and others that have no position among them.

    Attributes:
        q: queries of the image tokens [B, H, N, D].
        k, v: keys and values of all tokens [B, H, M, D].
        query_landmarks: Q̃ [B, H, n, D], of sampled image tokens.
        key_landmarks: K̃ [B, H, n, D], of the keys at the same places.
        context: the other tokens, if there are any.
        key_mask: boolean (True: attended to) or additive, broadcast to [B, H, 1, M].
        landmark_mask: what is added to the logits of K̃ and of the context's keys, broadcast to [B, H, 1, n + c].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_landmarks: Tensor
    key_landmarks: Tensor
    context: Context | None = None
    key_mask: Tensor | None = None
    landmark_mask: Tensor | None = None

    def gather(self, probes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Q̃ and probes [B, H, n + p, D], their exact answers, and those of the context [B, H, c, D]."""
        asked = torch.cat((self.query_landmarks, *probes), dim=-2) if probes else self.query_landmarks
        rows = asked.shape[-2]
        every = asked if self.context is None else torch.cat((asked, self.context.q), dim=-2)
        gathered = scaled_dot_product_attention(every, self.k, self.v, attn_mask=self.key_mask)
        return asked, gathered[..., :rows, :], gathered[..., rows:, :]

    def broadcast(self, corrected: Tensor) -> Tensor:
        """The output of the image tokens [B, H, N, D], from the corrected values of the landmarks [B, H, n, D]."""
        values = corrected if self.context is None else torch.cat((corrected, self.context.v), dim=-2)
        return scaled_dot_product_attention(self.q, self.all_keys, values, attn_mask=self.landmark_mask)

    @property
    def all_keys(self) -> Tensor:
        """K̃ and the context's keys [B, H, n + c, D]."""
        return self.key_landmarks if self.context is None else torch.cat((self.key_landmarks, self.context.k), dim=-2)


def landmark_attention_with_context(tokens: Tokens, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """`landmark_attention` of image tokens beside others.

        O = softmax(s·Q [K̃; K_C]ᵀ + b) [m + γ Z; V_C],   Z = (WᵀW + λ I)⁻¹ Wᵀ (V_A - W m - W_C V_C)

    The keys and values of the context, K_C and V_C, are kept as they are; only the values of the image's landmarks are
    corrected. A landmark represents N/n tokens and a token of the context only itself, so b, which `landmark_mask`
    contains, is the logarithm of N/n for the former: without it the context would weigh N/n times too much. W and W_C
    are the softmax between landmarks, and between landmarks and context. The gather step also answers the context's own
    queries, which makes these answers exact.

    Args:
        tokens: of the call.
        damping: as in `landmark_attention`.

    Returns:
        The output of the image tokens [B, H, N, D], of the others [B, H, c, D], and the error of each head [B, H].
    """
    asked, gathered, context = tokens.gather(probe_tokens(tokens.q))
    fixed, is_masked = None if tokens.context is None else tokens.context.v, tokens.key_mask is not None
    corrected, error = correct(
        asked, tokens.all_keys, gathered, damping, tokens.landmark_mask, fixed=fixed, is_masked=is_masked
    )
    assert error is not None  # there are probes
    return tokens.broadcast(corrected), context, error


Heads = tuple[Tensor, Tensor]
"""Samples and heads, as two lists of indices."""


def exact_where_missed(
    out: Tensor,
    error: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_error: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Recompute heads whose error exceeds a limit with exact attention; reading the error synchronises the device.

    Args:
        out: of all heads [B, H, N, D].
        error: of each head [B, H]; NaN counts as above any limit.
        q, k, v: as in `landmark_attention`.
        max_error: the limit.
        key_mask: as in `Tokens`.

    Returns:
        [B, H, N, D], and the number of heads recomputed over all samples, at a cost of O(N·M·D) each.
    """
    samples, heads = (~(error <= max_error)).nonzero(as_tuple=True)
    return exact_heads(out, (samples, heads), q, k, v, key_mask), len(samples)


def exact_heads(out: Tensor, missed: Heads, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """`out` [B, H, N, D] with some heads recomputed with exact attention, at a cost of O(N·M·D) each."""
    if not len(missed[0]):
        return out
    batch, heads = out.shape[:2]
    if len(missed[0]) == batch * heads:
        return scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    if key_mask is not None:
        key_mask = key_mask.expand(batch, heads, *key_mask.shape[2:])[missed][None]
    exact = scaled_dot_product_attention(q[missed][None], k[missed][None], v[missed][None], attn_mask=key_mask)[0]
    return out.index_put(missed, exact)


def exact_at(
    out: Tensor, heads: Sequence[int], q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """`out` [B, H, N, D] with some heads, those of every sample, recomputed with exact attention."""
    places = torch.tensor(heads, device=out.device)
    if key_mask is not None and key_mask.shape[1] > 1:
        key_mask = key_mask.index_select(1, places)
    exact = scaled_dot_product_attention(*(x.index_select(1, places) for x in (q, k, v)), attn_mask=key_mask)
    return out.index_copy(1, places, exact)


def correct(
    asked: Tensor,
    key_landmarks: Tensor,
    gathered: Tensor,
    damping: float = 1e-5,
    landmark_mask: Tensor | None = None,
    *,
    fixed: Tensor | None = None,
    is_masked: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The middle step of `landmark_attention`: V_A -> m + γ Z [B, H, n, D], and the probes' relative error [B, H].

    The rows of the last softmax sum to 1, so m may be added here, to n tokens rather than to N. A head whose matrix
    cannot be factorised in fp32, since λ vanishes next to its entries, keeps V_A unchanged, and its error is infinite.

    Args:
        asked: Q̃ and any probes after them [B, H, n + p, D]. Without probes γ is 1, and there is no error.
        key_landmarks: K̃, and the keys of a context [B, H, n + c, D].
        gathered: the exact attention of `asked` [B, H, n + p, D]: V_A, and that of the probes.
        damping: as in `landmark_attention`.
        landmark_mask: additive, broadcast to [B, H, 1, n + c]. A masked landmark is not a key and takes no part in the
            correction, so that the result does not depend on padding.
        fixed: the values of the context [B, H, c, D], see `landmark_attention_with_context`.
        is_masked: whether `landmark_mask` may mask anything.
    """
    n = key_landmarks.shape[-2] - (0 if fixed is None else fixed.shape[-2])
    with torch.autocast(gathered.device.type, enabled=False):
        logits = (asked.float() * asked.shape[-1] ** -0.5) @ key_landmarks.float().mT  # [B, H, n + p, n + c]
        weights = (logits if landmark_mask is None else logits + landmark_mask.float()).softmax(dim=-1)
        w, exact = weights[..., :n, :n], gathered.float()
        values, kept = exact[..., :n, :], None
        if landmark_mask is not None and is_masked:
            kept = (landmark_mask[..., :n].float() > MASKED).float()  # [B, H, 1, n]
        if kept is None:
            mean = values.mean(dim=-2, keepdim=True)
        else:
            w = w * kept.mT
            mean = (values * kept.mT).sum(dim=-2, keepdim=True) / kept.sum(dim=-1, keepdim=True)
        centred = exact - mean if fixed is None else exact - weights @ beside(mean, fixed, n)
        gram = w.mT @ w
        gram.diagonal(dim1=-2, dim2=-1).add_(damp(logits[..., :n, :n], w, damping, kept)[..., None])
        factor, info = torch.linalg.cholesky_ex(gram)
        z = solve_cholesky(w.mT @ centred[..., :n, :], factor)
        gamma, error = torch.ones_like(mean), None
        if asked.shape[-2] > n:
            got, wanted = weights[..., n:, :n] @ z, centred[..., n:, :]
            gamma = trust(got, wanted)
            missed = torch.linalg.vector_norm(gamma * got - wanted, dim=(-2, -1))
            size = torch.linalg.vector_norm(exact[..., n:, :], dim=(-2, -1))
            error = (missed / size.clamp(min=1e-12)).masked_fill(info != 0, torch.inf)
        corrected = torch.where((info == 0)[..., None, None], torch.addcmul(mean, gamma, z), values)
        # Solutions lie column by column in memory; fused attention needs channels side by side.
        return corrected.to(gathered.dtype).contiguous(), error


def solve_cholesky(wanted: Tensor, factor: Tensor) -> Tensor:
    """Z with L Lᵀ Z = B, from L and B [..., n, D].

    The CPU has one operation for it. Of accelerators, CUDA's waits for the device before torch 2.12, which also forbids
    CUDA graphs, and MPS has none; two triangular systems do the same.
    """
    if wanted.device.type == "cpu":
        return torch.cholesky_solve(wanted, factor)
    return solve_in_two(wanted, factor)


def solve_in_two(wanted: Tensor, factor: Tensor) -> Tensor:
    """`solve_cholesky` as two triangular systems."""
    half = torch.linalg.solve_triangular(factor, wanted, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def beside(mean: Tensor, fixed: Tensor, n: int) -> Tensor:
    """n times m [..., 1, D], and then the values of the context [..., c, D], in fp32."""
    return torch.cat((mean.expand(*mean.shape[:-2], n, -1), fixed.float()), dim=-2)


def damp(logits: Tensor, w: Tensor, damping: float, kept: Tensor | None = None) -> Tensor:
    """λ [B, H] from the logits between landmarks and their softmax W, both [B, H, n, n]; `kept` [B, H, 1, n] is 0 at
    landmarks that are masked."""
    if kept is None:
        deviations = logits - logits.mean(dim=-1, keepdim=True)
        spread = torch.linalg.vector_norm(deviations, dim=-1).mean(dim=-1) * logits.shape[-1] ** -0.5  # σ [B, H]
    else:
        number = kept.sum(dim=-1, keepdim=True)
        deviations = (logits - (logits * kept).sum(dim=-1, keepdim=True) / number) * kept * kept.mT
        spread = torch.linalg.vector_norm(deviations, dim=-1).sum(dim=-1) * number[..., 0, 0] ** -1.5
    sharp = spread.clamp(1, (MAX_DAMPING / damping) ** (1 / 3)).pow(3) * damping
    return sharp * w.sum(dim=-2).amax(dim=-1)  # ‖W‖₁, and ‖W‖∞ is at most 1


def trust(x: Tensor, y: Tensor) -> Tensor:
    """γ [B, H, 1, 1] = ⟨Y, X⟩ / ⟨X, X⟩ / 0.8, clamped to 0..1.

    Args:
        x: the broadcast of Z to the probes, softmax(s·Q_p K̃ᵀ) Z [B, H, p, D].
        y: the target, their exact attention minus m [B, H, p, D].
    """
    x, y = x.flatten(-2), y.flatten(-2)
    size = torch.linalg.vecdot(x, x) * TRUSTED
    return (torch.linalg.vecdot(x, y) / size.clamp(min=1e-12)).clamp(0, 1)[..., None, None]


def probe_tokens(x: Tensor) -> list[Tensor]:
    """8 tokens of [B, H, N, D] spread over the picture (all if there are fewer): [B, H, 1, D] each."""
    tokens = x.shape[-2]
    number = min(PROBES, tokens)
    every = tokens // number
    places = [i * every + int((i * GOLDEN + 0.5) % 1 * every) for i in range(number)]
    return [x[..., place : place + 1, :] for place in places]

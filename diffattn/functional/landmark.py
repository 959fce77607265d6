"""Attention through landmarks: agents whose two steps are corrected by a third between them.

The Nyström approximation of a softmax (Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902, eq. 13), with a
damped inverse per head in place of a fixed number of Newton-Schulz steps, and a check on a few exact answers.

Shapes: B batch, H heads, N query tokens, M key tokens, n landmarks, p probes, D channels per head.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MAX_DAMPING = 1e-3
PROBES = 8  # queries whose exact answer is computed beside the landmarks'
TRUSTED = 0.8  # a correction that fits the probes this well is taken whole
GOLDEN = 0.618034  # places probes evenly in both directions of any grid


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, query_landmarks: Tensor, key_landmarks: Tensor, *, damping: float = 1e-5
) -> Tensor:
    """Gather at landmarks, undo their overlap, hand back to every query.

        V_A = softmax(s·Q̃ Kᵀ) V                     aggregate, s = D^(-1/2); m = mean of V_A over the landmarks
        Z   = (WᵀW + λ I)⁻¹ Wᵀ (V_A - m)             correct, W = softmax(s·Q̃ K̃ᵀ)
        O   = softmax(s·Q K̃ᵀ) (m + γ Z)              broadcast

    A query that is a landmark gets its exact attention as λ goes to 0 (and γ is 1). The damping λ keeps the inverse
    sane: it is `damping`·max(1, σ)³, at most 0.001, times the bound ‖W‖₁‖W‖∞ of the largest eigenvalue, where σ is the
    standard deviation of the head's logits between landmarks, so that heads with sharp logits are damped more. W and
    all that follows from it are computed in fp32, whatever the dtype and autocast.

    γ is 1 unless the correction does harm. Of a head with sharp logits and nothing in common between neighbours, the
    landmarks know too little, and Z amplifies noise: up to four times the true output's norm at logits with a standard
    deviation of 2 to 6. So the exact attention of 8 of the queries is gathered with the landmarks', and γ is the factor
    of Z that fits it best, over 0.8 and between 0 and 1 (see `trust`). Such heads then have a relative error of 0.9 to
    1.1, as agents that are not corrected: no method of this cost follows them; leave their layers exact (`layers=`, or
    a recipe of `diffattn.tune`).

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
    if not 0 < damping <= MAX_DAMPING:
        raise ValueError(f"damping must be above 0 and at most {MAX_DAMPING}, got {damping}")
    if query_landmarks.shape != key_landmarks.shape:
        shapes = f"{list(query_landmarks.shape)} and {list(key_landmarks.shape)}"
        raise ValueError(f"query and key landmarks must have the same shape, got {shapes}")
    probes = probe_tokens(q)  # [B, H, p, D]
    asked = torch.cat((query_landmarks, probes), dim=-2)
    gathered, known = scaled_dot_product_attention(asked, k, v).split((query_landmarks.shape[-2], probes.shape[-2]), -2)
    corrected = trust(
        correct(query_landmarks, key_landmarks, gathered, damping), gathered, key_landmarks, probes, known
    )
    return scaled_dot_product_attention(q, key_landmarks, corrected)


def correct(query_landmarks: Tensor, key_landmarks: Tensor, gathered: Tensor, damping: float = 1e-5) -> Tensor:
    """The middle step of `landmark_attention`: V_A [B, H, n, D] -> m + Z [B, H, n, D].

    The rows of the last softmax sum to 1, so m may be added here, to n tokens rather than to N. A head whose matrix
    cannot be factorised in fp32, since λ is lost beside its entries, keeps V_A as it is.
    """
    with torch.autocast(gathered.device.type, enabled=False):
        logits = query_landmarks.float() @ key_landmarks.float().mT * query_landmarks.shape[-1] ** -0.5  # [B, H, n, n]
        spread = logits.std(dim=-1, correction=0).mean(dim=-1)  # σ [B, H]
        w = logits.softmax(dim=-1)
        values = gathered.float()
        mean = values.mean(dim=-2, keepdim=True)
        bound = w.sum(dim=-2).amax(dim=-1)  # ‖W‖₁, and ‖W‖∞ = 1
        damp = (damping * spread.clamp(min=1) ** 3).clamp(max=MAX_DAMPING) * bound  # [B, H]
        gram = w.mT @ w
        gram.diagonal(dim1=-2, dim2=-1).add_(damp[..., None])
        factor, info = torch.linalg.cholesky_ex(gram)
        corrected = torch.cholesky_solve(w.mT @ (values - mean), factor) + mean
        corrected = torch.where((info == 0)[..., None, None], corrected, values)
        # Solutions lie column by column in memory; fused attention needs channels side by side.
        return corrected.to(gathered.dtype).contiguous()


def trust(corrected: Tensor, gathered: Tensor, key_landmarks: Tensor, probes: Tensor, known: Tensor) -> Tensor:
    """m + Z [B, H, n, D] -> m + γ Z, so that what the probes would be handed back fits their exact answer.

        γ = ⟨Y, X⟩ / ⟨X, X⟩ / 0.8 within [0, 1], X = softmax(s·Q_p K̃ᵀ) Z, Y = O_p - m

    Args:
        corrected: m + Z, of `correct`.
        gathered: V_A [B, H, n, D], for m.
        key_landmarks: K̃ [B, H, n, D].
        probes: Q_p [B, H, p, D], queries.
        known: O_p [B, H, p, D], their exact attention.
    """
    with torch.autocast(gathered.device.type, enabled=False):
        mean = gathered.float().mean(dim=-2, keepdim=True)
        z = corrected.float() - mean
        logits = probes.float() @ key_landmarks.float().mT * probes.shape[-1] ** -0.5  # [B, H, p, n]
        x = logits.softmax(dim=-1) @ z
        fit = (x * (known.float() - mean)).sum(dim=(-2, -1)) / x.square().sum(dim=(-2, -1)).clamp(min=1e-12)
        gamma = (fit / TRUSTED).clamp(0, 1)[..., None, None]  # [B, H, 1, 1]
        # Exactly what came in where the correction is trusted, not what rounding makes of it.
        return torch.where(gamma == 1, corrected, (mean + gamma * z).to(corrected.dtype))


def probe_tokens(x: Tensor) -> Tensor:
    """8 tokens of [B, H, N, D] spread over the picture (all of fewer): [B, H, p, D]."""
    tokens = x.shape[-2]
    number = min(PROBES, tokens)
    places = torch.arange(number, device=x.device)
    within = (places * GOLDEN + 0.5) % 1 * (tokens // number)
    return x.index_select(-2, places * (tokens // number) + within.long())

"""Landmark attention over the calls of one layer: calibrate, then coast.

How strongly the correction is damped (λ), how far it is trusted (γ) and which heads must run exact change slowly from
step to step. `calibrate` finds them, `coast` uses them again, with half of the operations. See `landmark_attention` for
the equations; results of `calibrate` are the same up to rounding.

Shapes: B batch, H heads, N image tokens, M keys, n landmarks, c other tokens among them, p probes, D channels per head.
"""

from dataclasses import dataclass
from math import inf, isnan, sqrt

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.functional.landmark import MAX_DAMPING, TRUSTED, Heads, damp, probe_tokens
from diffattn.functional.masks import MASKED

LEAST_DAMPING = 1e-6
"""The smallest `damping` that keeps matrices positive definite in products of fp32, so that coasting need not look."""

TINY = 1e-12


@dataclass(frozen=True)
class Tokens:
    """One call of a layer.

    Attributes:
        q: queries of the image tokens [B, H, N, D].
        k, v: keys and values of all tokens [B, H, M, D].
        query_landmarks, key_landmarks: Q̃ and K̃ [B, H, n, D], the c other tokens last.
        num_context: c.
        key_mask: boolean (True: attended to) or additive, broadcast to [B, H, 1, M].
        landmark_mask: additive, broadcast to [B, H, 1, n].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_landmarks: Tensor
    key_landmarks: Tensor
    num_context: int = 0
    key_mask: Tensor | None = None
    landmark_mask: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """What later calls use again.

    Attributes:
        damped: λI / damping [B·H, n, n].
        gamma: γ [B·H, 1, 1].
        sizes: of every head [B, H], on the device, for its error on the probes: 0.8⟨X, X⟩, ⟨X, Y⟩, ‖Y‖, the norm of the
            exact answers, and 0 where its matrix could be factorised; X is Z at the probes, Y what it should be.
    """

    damped: Tensor
    gamma: Tensor
    sizes: tuple[Tensor, ...]

    def errors(self) -> list[list[float]]:
        """The relative error of every head of every sample, as in `landmark_attention_and_error`; waits for the
        device."""
        per_sample = zip(self.gamma.view(self.sizes[0].shape).tolist(), *(s.tolist() for s in self.sizes), strict=True)
        return [[_error(*head) for head in zip(*sample, strict=True)] for sample in per_sample]

    def missed(self, max_error: float) -> Heads | None:
        """The heads whose error exceeds a limit, None if there are none; NaN exceeds any."""
        pairs = [(b, h) for b, row in enumerate(self.errors()) for h, e in enumerate(row) if not e <= max_error]
        if not pairs:
            return None
        samples, heads = zip(*pairs, strict=True)
        return torch.tensor(samples, device=self.gamma.device), torch.tensor(heads, device=self.gamma.device)


def _error(gamma: float, xx: float, xy: float, y: float, size: float, failed: float) -> float:
    """‖γX - Y‖ / ‖exact‖ of one head."""
    if failed or isnan(gamma):
        return inf
    return sqrt(max(y * y - 2 * gamma * xy + gamma * gamma * xx / TRUSTED, 0.0)) / max(size, TINY)


def calibrate(tokens: Tokens, damping: float, guarded: bool = False) -> tuple[Tensor, Tensor, Calibration]:
    """→ the output of the image tokens [B, H, N, D] and of the others [B, H, c, D], and what later calls use again.

    Args:
        tokens: the call.
        damping: as in `landmark_attention`.
        guarded: for products of less than fp32's precision (TF32), with which a matrix may not be factorised: such a
            head then keeps V_A, as in `correct`. Its error is infinite either way.
    """
    shape, n = tokens.key_landmarks.shape[:2], tokens.key_landmarks.shape[-2]
    asked = torch.cat((tokens.query_landmarks, *probe_tokens(tokens.q)), dim=-2)  # [B, H, n + p, D]
    gathered = scaled_dot_product_attention(asked, tokens.k, tokens.v, attn_mask=tokens.key_mask)
    with torch.autocast(gathered.device.type, enabled=False):
        logits, weights = _weights(asked, tokens)
        exact = gathered.float().flatten(0, 1)
        kept = _kept(tokens)
        w = weights[:, :n] if kept is None else weights[:, :n] * kept.mT
        mean = _mean(exact[:, :n], kept)
        centred = exact - mean
        damped = _damped(logits[:, :n], w, damping, kept)
        factor, failed = torch.linalg.cholesky_ex(torch.baddbmm(damped, w.mT, w, beta=damping))
        z = torch.cholesky_solve(w.mT @ centred[:, :n], factor)
        x, y = (weights[:, n:] @ z).flatten(1)[:, None], centred[:, n:].flatten(1)[:, None]  # [B·H, 1, p·D]
        xx, xy = torch.baddbmm(weights[:, :1, :1], x, x.mT, beta=TINY, alpha=TRUSTED), x @ y.mT
        gamma = (xy / xx).clamp(0, 1)
        sizes = (xx, xy, torch.linalg.vector_norm(y, dim=-1), torch.linalg.vector_norm(exact[:, n:], dim=(-2, -1)))
        corrected = torch.addcmul(mean, gamma, z)
        if guarded:
            corrected = torch.where((failed == 0)[:, None, None], corrected, exact[:, :n])
    out, context = _broadcast(tokens, gathered, corrected)
    return out, context, Calibration(damped, gamma, tuple(s.view(shape) for s in (*sizes, failed)))


def coast(tokens: Tokens, damping: float, known: Calibration) -> tuple[Tensor, Tensor]:
    """→ as `calibrate`, with what an earlier call on tensors of the same shapes found."""
    gathered = scaled_dot_product_attention(tokens.query_landmarks, tokens.k, tokens.v, attn_mask=tokens.key_mask)
    with torch.autocast(gathered.device.type, enabled=False):
        _, w = _weights(tokens.query_landmarks, tokens)
        kept = _kept(tokens)
        w = w if kept is None else w * kept.mT
        factor, _ = torch.linalg.cholesky_ex(torch.baddbmm(known.damped, w.mT, w, beta=damping))
        values = gathered.float().flatten(0, 1)
        mean = _mean(values, kept)
        z = torch.cholesky_solve(w.mT @ (values - mean), factor)
        corrected = torch.addcmul(mean, known.gamma, z)
    return _broadcast(tokens, gathered, corrected)


def _weights(asked: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Logits s·Q̃ K̃ᵀ of the rows asked for and their softmax, [B·H, n or n + p, n]."""
    a, b = asked.float().flatten(0, 1), tokens.key_landmarks.float().flatten(0, 1)
    logits = torch.baddbmm(a[..., :1], a, b.mT, beta=0, alpha=a.shape[-1] ** -0.5)  # beta=0: the first is not read
    if tokens.landmark_mask is None:
        return logits, logits.softmax(dim=-1)
    return logits, (logits + _mask(tokens, tokens.landmark_mask)).softmax(dim=-1)


def _mask(tokens: Tokens, mask: Tensor) -> Tensor:
    """A mask of landmarks in fp32, [B·H, 1, n]."""
    return mask.float().expand(*tokens.key_landmarks.shape[:2], 1, -1).flatten(0, 1)


def _kept(tokens: Tokens) -> Tensor | None:
    """0 at landmarks that are masked, else 1 [B·H, 1, n]; None where none can be."""
    return None if tokens.landmark_mask is None else (_mask(tokens, tokens.landmark_mask) > MASKED).float()


def _mean(values: Tensor, kept: Tensor | None) -> Tensor:
    """m [B·H, 1, D] of the values of landmarks [B·H, n, D] that are not masked."""
    if kept is None:
        return values.mean(dim=-2, keepdim=True)
    return kept @ values / kept.sum(dim=-1, keepdim=True)


def _damped(logits: Tensor, w: Tensor, damping: float, kept: Tensor | None) -> Tensor:
    """λI / damping [B·H, n, n]; see `landmark_attention` for λ."""
    if kept is not None:
        return torch.diag_embed((damp(logits, w, damping, kept) / damping)[:, None].expand(w.shape[:-1]))
    spread = logits.std(dim=-1, correction=0).mean(dim=-1)  # σ [B·H]
    sharp = spread.clamp(1, (MAX_DAMPING / damping) ** (1 / 3)).pow(3)
    scale = sharp * w.sum(dim=-2).amax(dim=-1)  # ‖W‖₁, and ‖W‖∞ = 1
    return torch.diag_embed(scale[:, None].expand(w.shape[:-1]))


def _broadcast(tokens: Tokens, gathered: Tensor, corrected: Tensor) -> tuple[Tensor, Tensor]:
    """From n corrected values [B·H, n, D] to the image tokens; the others have their exact answers."""
    # Solutions lie column by column in memory; fused attention needs channels side by side.
    values = corrected.unflatten(0, gathered.shape[:2]).to(gathered.dtype).contiguous()
    out = scaled_dot_product_attention(tokens.q, tokens.key_landmarks, values, attn_mask=tokens.landmark_mask)
    n = tokens.key_landmarks.shape[-2]
    return out, gathered[..., n - tokens.num_context : n, :]

"""Landmark attention over the calls of one layer: calibrate, then coast.

How strongly the correction is damped (λ), how far it is trusted (γ) and which heads must run exact change slowly from
step to step. `calibrate` determines them, `coast` reuses them, with half of the operations. See `landmark_attention`
for the equations; the results of `calibrate` are the same up to rounding.

Shapes: B batch, H heads, h some heads of some samples, N image tokens, M keys, n landmarks, c other tokens among them,
p probes, D channels per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isnan, sqrt

import torch
from torch import Tensor

from diffattn.functional.landmark import MAX_DAMPING, TRUSTED, Heads, Tokens, beside, damp, probe_tokens, solve_cholesky
from diffattn.functional.masks import MASKED

LEAST_DAMPING = 1e-6
"""The smallest `damping` that keeps matrices positive definite in products of fp32, so that coasting need not check."""

TINY = 1e-12

HELD = 2
"""Matrices [n, n] of a head that are held at once."""


@dataclass(frozen=True)
class Calibration:
    """What later calls reuse.

    Attributes:
        sharpness: λ / damping [B·H].
        gamma: γ [B·H, 1, 1].
        seen: what the error of every head on the probes follows from [B, H, 10], on the device: the products of 0.8 X,
            Y and E with each other, row by row, and 0 where its matrix could be factorised. X is Z at the probes, Y
            what it should be, and E the exact answers.
    """

    sharpness: Tensor
    gamma: Tensor
    seen: Tensor

    def errors(self) -> list[list[float]]:
        """The relative error of every head of every sample, as in `landmark_attention_and_error`; waits for the
        device."""
        return errors_of(self.seen)

    def missed(self, max_error: float) -> Heads | None:
        """The heads whose error exceeds a limit, None if there are none; NaN exceeds any. Waits for the device."""
        return heads_above(self.errors(), max_error, self.seen.device)

    def sent(self) -> "Sent":
        """`seen`, on its way to the CPU."""
        return Sent(self.seen)


class Sent:
    """What a calibration has seen, copied to the CPU while the device goes on with its work."""

    def __init__(self, seen: Tensor) -> None:
        self._device, self._copied = seen.device, None
        self._seen = seen.to("cpu", non_blocking=seen.is_cuda)
        if seen.is_cuda:
            self._copied = torch.cuda.current_stream(seen.device).record_event()

    def missed(self, max_error: float) -> Heads | None:
        """As `Calibration.missed`; waits only if the copy has not arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return heads_above(errors_of(self._seen), max_error, self._device)


def errors_of(seen: Tensor) -> list[list[float]]:
    """The relative error of every head of every sample, from what a calibration has seen [B, H, 10]."""
    return [[_error(*head) for head in sample] for sample in seen.tolist()]


def heads_above(errors: Sequence[Sequence[float]], most: float, device: torch.device) -> Heads | None:
    """The heads whose error exceeds `most`, None if there are none; NaN exceeds any."""
    pairs = tuple((b, h) for b, row in enumerate(errors) for h, e in enumerate(row) if not e <= most)
    return _places(pairs, device) if pairs else None


@lru_cache(maxsize=1024)
def _places(pairs: tuple[tuple[int, int], ...], device: torch.device) -> Heads:
    """Samples and heads as indices, which mostly stay the same from one calibration to the next: what is new is sent
    without waiting for the device."""
    with torch.inference_mode(False):
        found = torch.tensor(pairs).mT.contiguous()  # [2, h]
        if device.type == "cuda":
            found = found.pin_memory()
        samples, heads = found.to(device, non_blocking=True)
        return samples, heads


def _error(*seen: float) -> float:
    """‖γX - Y‖ / ‖E‖ of one head."""
    xx, xy, _, _, yy, _, _, _, ee, failed = seen
    if failed or isnan(xx) or isnan(xy):
        return inf
    gamma = min(max(xy / max(xx, TINY), 0.0), 1.0)
    missed = yy - 2 * gamma * xy / TRUSTED + gamma * gamma * xx / TRUSTED**2
    return sqrt(max(missed, 0.0)) / max(sqrt(max(ee, 0.0)), TINY)


def calibrate(tokens: Tokens, damping: float, guarded: bool = False) -> tuple[Tensor, Tensor, Calibration]:
    """The output of the image tokens [B, H, N, D] and of the others [B, H, c, D], and what later calls reuse.

    Args:
        tokens: the call.
        damping: as in `landmark_attention`.
        guarded: for products of less than fp32's precision (TF32), with which a matrix may not be factorised: such a
            head then keeps V_A, as in `correct`. Its error is infinite either way.
    """
    asked, gathered, context = tokens.gather(probe_tokens(tokens.q))
    with torch.autocast(gathered.device.type, enabled=False):
        parts = [_calibrated(part, damping, guarded, gathered.dtype) for part in _parts(asked, tokens, gathered)]
    corrected, sharpness, gamma, seen = (_joined(found) for found in zip(*parts, strict=True))
    batch = gathered.shape[:2]
    out = tokens.broadcast(corrected.unflatten(0, batch))
    return out, context, Calibration(sharpness, gamma, seen.unflatten(0, batch))


def coast(tokens: Tokens, damping: float, known: Calibration) -> tuple[Tensor, Tensor]:
    """The same as `calibrate`, with what an earlier call on tensors of the same shapes determined."""
    asked, gathered, context = tokens.gather(())
    with torch.autocast(gathered.device.type, enabled=False):
        corrected = [_coasted(part, damping, known, gathered.dtype) for part in _parts(asked, tokens, gathered)]
    return tokens.broadcast(_joined(corrected).unflatten(0, gathered.shape[:2])), context


@dataclass(frozen=True)
class Part:
    """Some heads h of some samples of a call.

    Attributes:
        asked, keys: Q̃ and any probes [h, n or n + p, D], and K̃ and the keys of any context [h, n + c, D], in fp32.
        gathered: what `asked` gathered [h, n or n + p, D], in fp32.
        fixed: the values of the context [h, c, D], if there is any.
        mask: what is added to the logits of the keys, in fp32 [h, 1, n + c].
        is_masked: whether `mask` may mask anything.
        heads: their indices among all heads.
    """

    asked: Tensor
    keys: Tensor
    gathered: Tensor
    fixed: Tensor | None
    mask: Tensor | None
    is_masked: bool
    heads: slice

    @property
    def n(self) -> int:
        """Number of landmarks."""
        return self.keys.shape[-2] - (0 if self.fixed is None else self.fixed.shape[-2])

    @property
    def kept(self) -> Tensor | None:
        """0 at landmarks that are masked, else 1 [h, 1, n]; None where none can be."""
        return None if self.mask is None or not self.is_masked else (self.mask[..., : self.n] > MASKED).float()

    def centred(self, weights: Tensor, mean: Tensor) -> Tensor:
        """What `asked` gathered, without what it would gather if every landmark had the value m [h, 1, D]."""
        if self.fixed is None:  # rows of `weights` sum to 1
            return self.gathered - mean
        return torch.baddbmm(self.gathered, weights, beside(mean, self.fixed, self.n), alpha=-1)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Logits of the rows asked for and their softmax, [h, n or n + p, n + c]."""
        a, b = self.asked, self.keys.mT
        logits = torch.baddbmm(a[..., :1], a, b, beta=0, alpha=a.shape[-1] ** -0.5)  # beta=0: the first is not read
        return logits, (logits if self.mask is None else logits + self.mask).softmax(dim=-1)


def _parts(asked: Tensor, tokens: Tokens, gathered: Tensor) -> list[Part]:
    """All heads of all samples, in several parts where their matrices would take more memory than the queries."""
    heads, keys = asked.shape[0] * asked.shape[1], tokens.all_keys
    at_once = heads
    if not torch.compiler.is_compiling():  # which would recompile for every number of parts
        matrices = HELD * asked.shape[-2] * keys.shape[-2] * torch.finfo(torch.float32).bits // 8
        at_once = min(max(tokens.q.numel() * tokens.q.element_size() // matrices, 1), heads)
    mask = tokens.landmark_mask
    if mask is not None:
        mask = mask.float().expand(*asked.shape[:2], 1, -1).flatten(0, 1)
    a, b, c = (x.flatten(0, 1) for x in (asked, keys, gathered))
    fixed, is_masked = None if tokens.context is None else tokens.context.v.flatten(0, 1), tokens.key_mask is not None
    parts = []
    for start in range(0, heads, at_once):
        of = slice(start, start + at_once) if at_once < heads else slice(None)
        beside_them, masks = (None if x is None else x[of] for x in (fixed, mask))
        parts.append(Part(a[of].float(), b[of].float(), c[of].float(), beside_them, masks, is_masked, of))
    return parts


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _calibrated(part: Part, damping: float, guarded: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """m + γ Z [h, n, D] in a dtype, λ / damping, γ, and what a `Calibration` has seen [h, 10], of some heads."""
    exact, kept, n = part.gathered, part.kept, part.n
    logits, weights = part.weights()
    mean = _mean(exact[:, :n], kept)
    centred = part.centred(weights, mean)
    probes, w = weights[:, n:, :n].clone(), _between(weights, n, kept)
    del weights
    sharpness = _sharpness(logits[:, :n, :n], w, damping, kept)
    del logits
    wanted, gram = w.mT @ centred[:, :n], _gram(w, sharpness, damping)
    del w
    factor, failed = torch.linalg.cholesky_ex(gram)
    del gram
    z = solve_cholesky(wanted, factor)
    some = sharpness[:, None, None]  # above 0
    x = torch.baddbmm(some, probes, z, beta=0, alpha=TRUSTED)  # beta=0: the first is not read
    probed = torch.stack((x, centred[:, n:], exact[:, n:]), dim=1).flatten(2)  # 0.8 X, Y and E [h, 3, p·D]
    products = torch.baddbmm(some, probed, probed.mT, beta=TINY)  # never 0 by 0
    gamma = (products[:, :1, 1:2] / products[:, :1, :1]).clamp(0, 1)
    seen = torch.cat((products.flatten(1), failed[:, None]), dim=1)
    corrected = _corrected(mean, gamma, z, dtype)
    if guarded:
        corrected = torch.where((failed == 0)[:, None, None], corrected, exact[:, :n].to(dtype))
    return corrected, sharpness, gamma, seen


def _corrected(mean: Tensor, gamma: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """m + γ Z [h, n, D], channels side by side as fused attention needs them: solutions lie column by column."""
    return torch.addcmul(mean, gamma, z, out=z.new_empty(z.shape, dtype=dtype))


def _coasted(part: Part, damping: float, known: Calibration, dtype: torch.dtype) -> Tensor:
    """m + γ Z [h, n, D] of some heads, in a dtype."""
    kept, weights = part.kept, part.weights()[1]
    mean = _mean(part.gathered, kept)
    centred, w = part.centred(weights, mean), _between(weights, part.n, kept)
    del weights
    wanted, gram = w.mT @ centred, _gram(w, known.sharpness[part.heads], damping)
    del w, centred
    factor, _ = torch.linalg.cholesky_ex(gram)
    del gram
    return _corrected(mean, known.gamma[part.heads], solve_cholesky(wanted, factor), dtype)


def _between(weights: Tensor, n: int, kept: Tensor | None) -> Tensor:
    """W [h, n, n] from the softmax of landmarks over landmarks and context [h, n or n + p, n + c]."""
    w = weights[:, :n, :n]
    return w if kept is None else w * kept.mT


def _gram(w: Tensor, sharpness: Tensor, damping: float) -> Tensor:
    """WᵀW + λI [h, n, n]."""
    gram = w.mT @ w
    gram.diagonal(dim1=-2, dim2=-1).add_(sharpness[:, None], alpha=damping)
    return gram


def _mean(values: Tensor, kept: Tensor | None) -> Tensor:
    """m [h, 1, D] of the values of landmarks [h, n, D] that are not masked."""
    if kept is None:
        return values.mean(dim=-2, keepdim=True)
    return kept @ values / kept.sum(dim=-1, keepdim=True)


def _sharpness(logits: Tensor, w: Tensor, damping: float, kept: Tensor | None) -> Tensor:
    """λ / damping [h]; see `landmark_attention`."""
    if kept is not None:
        return damp(logits, w, damping, kept).flatten() / damping
    spread = logits.std(dim=-1, correction=0).mean(dim=-1)  # σ [h]
    sharp = spread.clamp(1, (MAX_DAMPING / damping) ** (1 / 3)).pow(3)
    return sharp * w.sum(dim=-2).amax(dim=-1)  # ‖W‖₁, and ‖W‖∞ is at most 1

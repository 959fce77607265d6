"""Muon for the inner matrices and kernels of a network, AdamW for everything else.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) makes the update of a weight matrix nearly
orthogonal. torch's takes matrices only; the kernels of convolutions are given to it as matrices
[out, in · height · width] that share their memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

OUTSIDE = ("embed", "conv_in", "conv_out", "final_layer", "bias")
"""Parts of the names of first and last layers, and of position biases, which AdamW updates."""


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer over all trained parameters of a model.

    Muon has the matrices and dense kernels between the first and the last layer; AdamW has the rest: embeddings, first
    and last layers, biases, norms, depth-wise kernels. One learning rate serves both, since Muon's updates are scaled
    to the size of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025).

    Args:
        model: its parameters that require a gradient.
        lr: the learning rate; every parameter group has it.
        weight_decay: of both, decoupled.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if is_inner_matrix(name, p)]
        rest = [p for name, p in named if not is_inner_matrix(name, p)]
        if not inner:
            raise ValueError("Muon needs at least one trained weight matrix between the first and the last layer")
        super().__init__([*inner, *rest], {"lr": lr})
        self._weights = [(p, p if p.ndim == 2 else nn.Parameter(as_matrix(p.detach(), like=p))) for p in inner]
        self._rest = [(p, p) for p in rest]
        matrices = [matrix for _, matrix in self._weights]
        self._muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight, matrix in self._weights:
            if matrix is not weight:
                matrix.grad = None if weight.grad is None else as_matrix(weight.grad, like=weight)
        for optimizer, pairs in ((self._muon, self._weights), (self._adamw, self._rest)):
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            for weight, own in pairs:  # the state lies here, by the model's own parameters, so that it can be saved
                if weight in self.state:
                    optimizer.state[own] = self.state[weight]
            optimizer.step()
            for weight, own in pairs:
                if own in optimizer.state:
                    self.state[weight] = optimizer.state[own]


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix, or the kernel of a dense convolution, of an inner layer."""
    outside = any(part in name for part in OUTSIDE)
    return not outside and (parameter.ndim == 2 or (parameter.ndim == 4 and parameter.shape[1] > 1))


def as_matrix(values: Tensor, like: Tensor) -> Tensor:
    """[out, in] unchanged, [out, in, h, w] → [out, in · h · w] in the order in which `like` lies in memory: of `like`
    itself a view."""
    if like.ndim == 2:
        return values
    if like.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(values), -1)

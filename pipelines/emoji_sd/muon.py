"""Muon for the matrices and kernels of a network, AdamW for everything else.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) makes the update of a weight matrix nearly
orthogonal. torch's takes matrices only; the kernels of convolutions are given to it as matrices
[out, in · height · width] that share their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer over all parameters of a model; AdamW has those with one axis, embeddings, first and last layers.

    A learning rate serves both: Muon's updates are brought to the size of AdamW's.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.01):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._kernels = [p for name, p in named if is_inner_matrix(name, p)]
        rest = [p for name, p in named if not is_inner_matrix(name, p)]
        super().__init__([*self._kernels, *rest], {"lr": lr})
        self._matrices = [nn.Parameter(as_matrix(p.detach(), like=p)) for p in self._kernels]
        self._muon = torch.optim.Muon(self._matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else as_matrix(kernel.grad, like=kernel)
        for optimizer in (self._muon, self._adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adam": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adam"])


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    outside = any(part in name for part in ("embedding", "conv_in", "conv_out"))
    return parameter.ndim in (2, 4) and not outside


def as_matrix(values: Tensor, like: Tensor) -> Tensor:
    """[out, in] as it is, [out, in, h, w] → [out, in · h · w] in the order in which `like` lies in memory: of `like`
    itself a view."""
    if like.ndim == 2:
        return values
    if like.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(values), -1)

"""What a layer computes from its weights alone, kept for as long as they stay the same."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

MOST_BYTES = 4 * 2**20
"""Larger results are not kept: many layers hold one each."""

MOST_RESULTS = 4


class Kept:
    """Results of a function of some weights, for inference on a CPU.

    Weights are compared by value, since they can change without a trace (`weight.data.copy_`). That would make a GPU
    wait, so nothing is kept there; nor where a gradient is needed, or while torch compiles.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, tuple[list[Tensor], tuple[Tensor, ...]]] = {}

    def get(
        self, key: Hashable, weights: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `compute` returns, or returned before with equal weights.

        Args:
            key: everything else that the result depends on.
            weights: everything that may change.
            compute: from the weights.
        """
        needs_gradient = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if needs_gradient or torch.compiler.is_compiling() or any(w.device.type != "cpu" for w in weights):
            return compute()
        found = self._results.get(key)
        if found is not None and all(map(torch.equal, found[0], weights)):
            return found[1]
        results = compute()
        if sum(result.nbytes for result in results) <= MOST_BYTES:
            if len(self._results) >= MOST_RESULTS:
                self._results = {}
            self._results[key] = [weight.detach().clone() for weight in weights], results
        return results

    def __deepcopy__(self, memo: object) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()

"""A patched denoiser needs hardly more memory than an exact one."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from support.denoisers import CASES
from support.denoisers.case import Case, enlarged
from torch import Tensor

import diffattn
from diffattn.functional import sample_tokens
from diffattn.functional.coasting import calibrate, coast
from diffattn.functional.landmark import Tokens
from diffattn.measure.memory import peak_mib

BALANCED: dict[str, Any] = {"num_agents": 1, "agent_ratio": 31 / 32, "min_tokens": 0, "max_head_error": float("1e9")}
"""The landmarks of the default preset in layers of 2,048 tokens and more: N/32."""

MOST = 1.05
MORE = {"ZImageTransformer2DModel texts of two lengths": 1.1}
"""Samples whose padding stands behind all of their tokens are answered one by one, and the answers put together."""

TOKENS = 1024
CPU = torch.device("cpu")


def times(case: Case) -> int:
    """How many times the rows and columns that give a picture or video of at least `TOKENS` tokens."""
    found = 1
    while prod(case.grid) * found**2 < TOKENS:
        found += 1
    return found


def peak(run: Callable[[], Any]) -> float:
    """MiB that a second run allocates on top of what there was; the first one may keep tables for later."""
    run()
    found = peak_mib(run, CPU)
    assert found is not None
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patched_needs_at_most_a_twentieth_more_than_exact(case: Case) -> None:
    """The peak of all tensors during a run of two steps, the first of which finds what the second uses again, so that
    what layers keep for later steps counts as well. Pictures of 1,024 tokens and more, texts in the proportion to them
    that the tiny inputs have (an eighth or so, as 512 tokens beside a picture of 1024x1024 in FLUX), heads as many and
    as narrow as the tiny configurations have them: n x n matrices weigh more there than in published sizes."""
    model = case.build(**case.enlarged)
    with enlarged(times(case)):
        given = case.inputs(2 if case.batched else 1, torch.Generator().manual_seed(1))

        def run() -> None:
            for share in (1.0, 0.9):
                case.call(model, given, level=share * case.level)

        exact = peak(run)
        with diffattn.patch(model, **BALANCED) as handle:
            patched = peak(run)
            report = handle.report()
    assert report.calls_passed_through == 0, str(report)
    assert report.calls_accelerated == 2 * 2 * case.num_calls(2 if case.batched else 1)
    assert patched <= MORE.get(str(case), MOST) * exact, f"{patched:.2f} MiB instead of {exact:.2f}"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_matrices_of_landmarks_take_no_more_memory_than_the_queries() -> None:
    """Heads are taken in parts: with as many landmarks as channels times six, all their matrices at once are six times
    the queries."""
    heads, grid, number = 16, (32, 32), 192
    q = normal(1, heads, 1024, 32)
    tokens = Tokens(q, q, q, sample_tokens(q, grid, number), sample_tokens(q, grid, number))
    of_queries = q.numel() * 4 / 2**20
    n = tokens.key_landmarks.shape[2]
    assert heads * n * n * 4 / 2**20 > of_queries
    _, _, known = calibrate(tokens, 1e-5)
    for run in (lambda: calibrate(tokens, 1e-5), lambda: coast(tokens, 1e-5, known)):
        with torch.no_grad():
            assert peak(run) < 3 * of_queries  # matrices, the output, and what is as large as landmarks


def test_a_calibration_keeps_no_matrix() -> None:
    q = normal(1, 4, 1024, 16)
    tokens = Tokens(q, q, q, sample_tokens(q, (32, 32), 64), sample_tokens(q, (32, 32), 64))
    _, _, known = calibrate(tokens, 1e-5)
    kept = [known.sharpness, known.gamma, known.seen]
    assert sum(x.untyped_storage().nbytes() for x in kept) < 1024

"""Comparing approximations of self-attention: a run on a tiny model, and the sizes at which each is exact."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))

import attention_candidates as candidates
import attention_error
from attention_candidates import Layer

from diffattn.functional import sample_tokens


def layer(side: int = 8, scale: float = 1.0) -> Layer:
    q, k, v = (torch.randn(1, 2, side**2, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    return Layer(q.transpose(1, 2).flatten(2), scale * q, k, v)


def error(found: Tensor, it: Layer) -> float:
    return attention_error.relative_error(found, candidates.exact(it))


@pytest.mark.parametrize(
    ("run", "limit"),
    [
        (lambda it: candidates._landmarks(it, 64, sample_tokens), 0.02),  # but for the damping
        (lambda it: candidates.landmarks_and_window(it, 64), 0.05),
        (lambda it: candidates.reused(it, 64), 0.02),
        (lambda it: candidates.subsampled(it, 1), 1e-5),
        (lambda it: candidates.pooled_keys(it, 1), 1e-5),
        (lambda it: candidates.tiled(it, 1), 1e-5),
    ],
    ids=["landmarks", "landmarks and a window", "landmarks of before", "subsampled", "pooled keys", "tiles"],
)
def test_with_as_many_as_tokens_it_is_exact(run: Callable[[Layer], Tensor], limit: float) -> None:
    it = layer()
    assert error(run(it), it) < limit


def test_a_window_over_the_whole_picture_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    it = layer(scale=0.5)
    assert error(candidates.landmarks_and_window(it, 4), it) > 0.05
    monkeypatch.setattr(candidates, "WINDOW", 15)
    assert error(candidates.landmarks_and_window(it, 4), it) < 1e-3


def test_a_window_is_what_lies_around_a_query() -> None:
    near = candidates._near((8, 8), torch.device("cpu"))
    found = near[8 * 3 + 4].reshape(8, 8)
    expected = torch.zeros(8, 8)
    expected[1:6, 2:7] = 1
    torch.testing.assert_close(found, expected)


def test_a_first_order_expansion_is_exact_where_all_queries_are_alike() -> None:
    it = layer()
    same = Layer(it.x, it.q[:, :, :1].expand_as(it.q), it.k, it.v)
    assert error(candidates.first_order(same), same) < 1e-5


@pytest.mark.slow
def test_every_candidate_runs_on_a_tiny_model_and_is_reported(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd", tmp_path / "tokenizer")
    pipe.save_pretrained(tmp_path / "sd")
    out = tmp_path / "out"
    attention_error.main(
        model=str(tmp_path / "sd"), prompts="a cat, red", steps=4, guidance=2.5, size=32, min_tokens=256, out=out
    )
    found = json.loads((out / "errors.json").read_text())
    families = {c.family for c in candidates.candidates()}
    assert "landmarks and an exact window" in families
    assert {row["family"] for row in found["rows"]} == families
    assert all(0 < row["error"] < 10 and row["cost"] > 0 and row["tokens"] == 256 for row in found["rows"])
    assert len({row["layer"] for row in found["rows"]}) == 3
    assert found["settings"]["prompts"] == ["a cat", "red"]
    table = (out / "errors.md").read_text()
    assert all(f"| {family} |" in table for family in families)
    assert (out / "errors.png").stat().st_size > 10_000

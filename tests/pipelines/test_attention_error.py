"""Comparing approximations of self-attention: a run on a tiny model, and the sizes at which each is exact."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny, tiny_joint
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
        model=str(tmp_path / "sd"), prompts="a cat, red", steps=4, guidance=2.5, size=32, min_tokens=None, out=out
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


@pytest.mark.slow
def test_a_joint_transformer_is_measured_with_its_text(tmp_path: Path) -> None:
    tiny_joint.sd3_pipeline(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd3")
    out = tmp_path / "out"
    attention_error.main(
        model=str(tmp_path / "sd3"), prompts="a cat", steps=4, guidance=2.5, size=None, min_tokens=256, out=out
    )
    rows = json.loads((out / "errors.json").read_text())["rows"]
    assert {row["family"] for row in rows} == {c.family for c in candidates.joint_candidates(1)}
    assert {row["layer"] for row in rows} == {f"transformer_blocks.{i}.attn" for i in range(3)}
    assert all(row["tokens"] == 256 and 0 <= row["error"] < 10 for row in rows)  # 0 where all heads run exact
    exactly = [row["text_error"] for row in rows if not row["family"].startswith("landmarks")]
    assert max(exactly) < 1e-4  # the other methods answer the text's queries one by one
    assert max(row["text_error"] for row in rows) < 0.5
    assert "| of the text | heads run exact |" in (out / "errors.md").read_text()


def test_recording_leaves_no_hook_and_changes_no_picture(tmp_path: Path) -> None:
    pipe: Any = tiny_joint.sd3_pipeline(tmp_path / "tokenizer")
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    before = pipe(["a cat"], generator=[torch.Generator().manual_seed(0)], **call).images
    with torch.no_grad():
        run = attention_error.record(pipe, ["a cat"], 3, 2.0, None, 256)
    assert len(run.records) == 6  # of three layers in two steps
    layer = run.records[0][2]
    assert layer.text == layer.q.shape[2] - 256
    assert torch.equal(pipe(["a cat"], generator=[torch.Generator().manual_seed(0)], **call).images, before)
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())

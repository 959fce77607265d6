"""Every denoiser of diffusers through the same contract; a new class costs a row and a tiny configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.denoisers import CASES
from support.denoisers.case import Case, noise_level_of
from torch import Tensor, nn

import diffattn
from diffattn.architectures import architecture_of
from diffattn.architectures.plug import plug_of

FEW: dict[str, Any] = {"num_agents": 6, "min_tokens": 0, "max_head_error": float("1e9")}
OTHERS: dict[str, dict[str, Any]] = {"keys": {"factor": 2}, "tiles": {"tiles": 2}}
"""Other methods that follow tokens wherever they lie, or say why not."""

COMPILED = {
    "SD3Transformer2DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel",
    "CogView4Transformer2DModel masked", "MochiTransformer3DModel",
}  # fmt: skip
"""Text before, behind and of several lengths; masks; videos."""

VIEWS = {"OmniGenTransformer2DModel", "MiniMaxH3Transformer3DModel", "UVit2DModel"}
"""Their schedulers, as the pipelines configure them, have time steps of another kind than these tests pass."""

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def inputs(case: Case, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    return case.inputs(batch, torch.Generator().manual_seed(seed))


@every_case
def test_passing_through_is_bit_equal_and_removing_restores_the_same_objects(case: Case) -> None:
    model, given = case.build(), inputs(case)
    exact = case.call(model, given)
    before = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    handle = diffattn.patch(model, num_agents=1, min_tokens=10**6)
    handle.quiet()
    assert torch.equal(case.call(model, given), exact)
    assert handle.report().calls_passed_through == case.num_calls(2)
    handle.remove()
    assert all(model.get_submodule(name).processor is original for name, original in before.items())
    assert torch.equal(case.call(model, given), exact)


@every_case
def test_every_layer_is_accelerated_and_close_to_exact(case: Case) -> None:
    model, given = case.build(), inputs(case)
    exact = case.call(model, given)
    with diffattn.patch(model, **FEW) as handle:
        out = case.call(model, given)
        report = handle.report()
    assert (report.calls_accelerated, report.calls_passed_through) == (case.num_calls(2), 0), str(report)
    assert out.shape == exact.shape
    assert out.isfinite().all()
    assert not torch.equal(out, exact)


@every_case
def test_other_processors_of_diffusers_are_accelerated_as_well(case: Case) -> None:
    model, given = case.build(), inputs(case)
    if not hasattr(model, "set_default_attn_processor"):
        pytest.skip("diffusers has no other processors for it")
    with diffattn.patch(model, **FEW):
        expected = case.call(model, given)
    model.set_default_attn_processor()
    assert_the_same(case, model, given, expected)
    if case.name.startswith("UNet") and hasattr(model, "set_attention_slice"):
        model.set_attention_slice(1)
        assert_the_same(case, model, given, expected)


def assert_the_same(case: Case, model: nn.Module, given: dict[str, Any], expected: Tensor) -> None:
    """With a patch, every layer is accelerated, and the output is as expected."""
    with diffattn.patch(model, **FEW) as handle:
        out = case.call(model, given)
        report = handle.report()
    assert (report.calls_accelerated, report.calls_passed_through) == (case.num_calls(2), 0), str(report)
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)  # random weights amplify what is rounded


@every_case
def test_the_grid_is_where_the_tokens_lie(case: Case) -> None:
    model, given = case.build(), inputs(case)
    with diffattn.patch(model, **FEW) as handle:
        calls = Watched(model)
        case.call(model, given)
        tokens = {layer.tokens for layer in handle.report().layers if layer.accelerated}
    grids = {case.grid, *case.more_grids}
    assert {layout.grid for layout, _, _ in calls} == grids
    assert case.context in {layout.num_context for layout, _, _ in calls}
    assert case.references in {layout.references for layout, _, _ in calls}
    assert tokens == {torch.Size(grid).numel() for grid in grids}


@every_case
def test_text_is_answered_exactly(case: Case) -> None:
    if not case.context:
        pytest.skip("no tokens without a place")
    model, given = case.build(), inputs(case)
    with diffattn.patch(model, **FEW):
        calls = Watched(model)
        case.call(model, given)
    assert calls
    for layout, out, exact in calls:
        torch.testing.assert_close(layout.context(out), layout.context(exact), rtol=1e-4, atol=1e-5)
        assert layout.num_context == 0 or not torch.allclose(layout.on_grid(out), layout.on_grid(exact), rtol=1e-3)


@pytest.mark.parametrize("method", OTHERS)
@every_case
def test_other_methods_follow_the_tokens_or_say_why_not(case: Case, method: str) -> None:
    model, given = case.build(), inputs(case)
    exact = case.call(model, given)
    with diffattn.patch(model, method, **OTHERS[method], min_tokens=0) as handle:
        handle.quiet()
        calls = Watched(model)
        out = case.call(model, given)
        report = handle.report()
    declined = {reason for layer in report.layers for reason in layer.passed_through}
    if method == "keys":
        assert declined == set()
    assert all("pictures: tiles cover only one" in reason for reason in declined), declined
    assert bool(calls) == bool(report.calls_accelerated)
    assert report.calls_accelerated <= len(calls)  # samples that are answered one by one are one call of their layer
    assert report.calls_accelerated + report.calls_passed_through == case.num_calls(2)
    assert out.shape == exact.shape
    assert out.isfinite().all()
    assert torch.equal(out, exact) == (not calls)
    for layout, found, true in calls:
        torch.testing.assert_close(layout.context(found), layout.context(true), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(layout.on_grid(found), layout.on_grid(true), rtol=1e-3)


@every_case
def test_a_batch_is_its_samples(case: Case) -> None:
    if not case.batched:
        pytest.skip("one sample per call")
    model, given = case.build(), inputs(case)
    with diffattn.patch(model, **FEW, damping=1e-3):  # tokens that are alike, as of padding, would amplify rounding
        together = case.call(model, given)
        alone = [case.call(model, case.one_of(given, i, 2)) for i in range(2)]
    expected = torch.cat(alone)  # a sample that saw the other one would differ by far more than rounding, amplified
    assert (together - expected).norm() < 1e-3 * expected.norm()


@every_case
def test_the_noise_level_is_the_schedulers(case: Case) -> None:
    scheduler = case.scheduler()
    scheduler.set_timesteps(5)
    model, given = case.build(), inputs(case)
    with diffattn.patch(model, **FEW) as handle:
        for i in (0, len(scheduler.timesteps) // 2, len(scheduler.timesteps) - 1):
            case.call(model, given, level=float(scheduler.timesteps[i]) / 1000)
            entry = handle.last_call()
            assert entry is not None
            assert entry["noise_level"] == pytest.approx(noise_level_of(scheduler, i), abs=2e-3)


@pytest.mark.filterwarnings("ignore:100% of the heads run exact:diffattn.DiffAttnWarning")
@every_case
def test_the_calls_of_a_run_know_what_the_first_one_found(case: Case) -> None:
    """The time that a pipeline passes, however it is scaled and rounded, belongs to the run of its scheduler."""
    if case.name.split()[0] in VIEWS:
        pytest.skip("its pipeline passes time steps of another kind, or none")
    scheduler = case.scheduler()
    scheduler.set_timesteps(9)
    model, given = case.build(), inputs(case)
    limited: dict[str, Any] = FEW | {"max_head_error": 1e-9}
    handle = diffattn.patch(model, **limited)
    for t in scheduler.timesteps[:3]:
        case.call(model, given, level=float(t) / 1000)
    report, calls = handle.report(), case.num_calls(2)
    assert (report.runs, report.calls_accelerated, report.calls_passed_through) == (1, calls, 2 * calls)
    assert all("of the heads are too far" in reason for layer in report.layers for reason in layer.passed_through)


@every_case
def test_a_deep_copy_is_patched_by_itself(case: Case) -> None:
    model, given = case.build(), inputs(case)
    exact = case.call(model, given)
    with diffattn.patch(model, **FEW):
        copied = copy.deepcopy(model)
        accelerated = case.call(model, given)
    assert torch.equal(case.call(copied, given), accelerated)
    assert torch.equal(case.call(model, given), exact)


@pytest.mark.slow
@every_case
def test_it_compiles_whole_where_the_unpatched_model_does(case: Case) -> None:
    compiles_whole(case, "agent", FEW, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("case", [case for case in CASES if str(case) in COMPILED], ids=str)
def test_other_methods_compile_whole_too(case: Case, method: str) -> None:
    compiles_whole(case, method, OTHERS[method] | {"min_tokens": 0}, tolerance=1e-4)


def compiles_whole(case: Case, method: str, options: dict[str, Any], tolerance: float) -> None:
    given = inputs(case)
    model = case.build()
    exact = case.call(model, given)
    with diffattn.patch(model, method, **options):
        expected = case.call(model, given)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with diffattn.patch(compiled, method, **options) as handle:
        try:
            out = case.call(compiled, given)
        except Exception as error:
            torch._dynamo.reset()
            if not compiles_unpatched(case, given):
                pytest.skip(f"the unpatched model does not compile whole either: {type(error).__name__}")
            raise
        assert handle.report().calls_accelerated == case.num_layers
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 2)
    assert not torch.allclose(out, exact, rtol=tolerance, atol=tolerance / 2)


def compiles_unpatched(case: Case, given: dict[str, Any]) -> bool:
    try:
        case.call(torch.compile(case.build(), backend="eager", fullgraph=True), given)
    except Exception:
        return False
    return True


def _plugs(model: nn.Module) -> list[Any]:
    found = [plug_of(part) for m in model.modules() for part in (m, getattr(m, "processor", None))]
    return [plug for plug in found if plug is not None]


class Watched(list[tuple[Any, Tensor, Tensor]]):
    """(layout, output, exact output) of every accelerated call of a patched model to come."""

    def __init__(self, model: nn.Module) -> None:
        for plug in _plugs(model):
            plug.functions = tuple(self._watch(f) for f in plug.functions)

    def _watch(self, function: Any) -> Any:
        def watched(q: Tensor, k: Tensor, v: Tensor, call: Any) -> Tensor:
            out = function(q, k, v, call)
            mask = call.mask
            if call.context_mask is not None:  # a row per query
                of_picture = mask.expand(*mask.shape[:-2], call.layout.num_tokens, mask.shape[-1])
                mask = call.layout.join(of_picture, call.context_mask)
            exact = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            self.append((call.layout, out, exact))
            return out

        return watched


def test_an_unknown_denoiser_is_refused_with_where_to_read_on() -> None:
    with pytest.raises(TypeError, match=r"Linear is not supported.*adding an architecture"):
        architecture_of(nn.Linear(2, 2))

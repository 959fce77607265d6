"""The attention benchmark on tiny transformers of every class: contents of a result, and the floor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peers.floor import ValueProcessor
from support.denoisers import CASES
from torch import nn

from diffattn.architectures.denoisers import self_attention_layers
from diffattn.benchmarks.attention import Benchmark, BenchmarkConfig, Covered, _prepare_eager, figures
from diffattn.benchmarks.attention_report import plot, table
from diffattn.benchmarks.variants import FLOOR, SDPA, TOME, LeftOut, apply_variant
from diffattn.measure.interleave import Timings
from diffattn.measure.models import MODELS, PUBLISHED
from diffattn.patching.patch import find_patch

TINY = tuple(name for name in MODELS if name not in PUBLISHED)
TRANSFORMERS = tuple(name for name in TINY if name != "tiny")


def measure(out: Path, **options: Any) -> dict[str, Any]:
    settings = {"variants": ("balanced", FLOOR), "rounds": 2, "min_tokens": 0, "device": "cpu", "batch": 1}
    return Benchmark(BenchmarkConfig(**{**settings, **options}), out).run(say=lambda line: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(tmp_path_factory.mktemp("bench"), models=TRANSFORMERS, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_class_runs_through_the_benchmark(measured: dict[str, Any], name: str) -> None:
    (entry,) = (entry for entry in measured["results"] if entry["model"] == name)
    row, variants = MODELS[name], entry["variants"]
    assert entry["complete"]
    assert entry["class"] == row.kind
    assert entry["pixels"] == str(row.shape(entry["size"]))
    assert set(entry["tokens"]) == {"0"}
    layers = len(self_attention_layers(row.build("meta", torch.float32, row.shortened("cpu", torch.float32))))
    assert {v: variants[v]["layers"] for v in variants} == {SDPA: 0, "balanced": layers, FLOOR: layers}
    assert variants[SDPA]["peak_ratio"] == 1
    assert all(variant["peak_call_mib"] > 0 for variant in variants.values())
    assert 0 <= variants["balanced"]["exact_head_share"] <= 1
    assert "exact_head_share" not in variants[FLOOR]


def test_a_result_says_how_many_layers_it_has(measured: dict[str, Any]) -> None:
    depths = {entry["model"]: entry["depth"] for entry in measured["results"]}
    assert depths["tiny-flux"] == "3 of 6 layers"
    assert depths["tiny-wan"] == "2 layers"
    text = table(measured)
    assert "tiny FLUX transformer (for tests) (3 of 6 layers), 512x512 px" in text
    assert "128x96x13 px" in text
    assert "exact heads" in text


@pytest.mark.slow
def test_all_layers_on_request(tmp_path: Path) -> None:
    results = measure(tmp_path, models=("tiny-flux",), variants=(FLOOR,), rounds=1, all_layers=True)
    assert [entry["depth"] for entry in results["results"]] == ["6 layers"]
    with pytest.raises(ValueError, match="made with another all_layers"):
        Benchmark(BenchmarkConfig(models=("tiny-flux",), device="cpu", min_tokens=0, batch=1), tmp_path, resume=True)


@pytest.mark.slow
def test_the_plot_has_a_panel_for_videos(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(measured, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def run(model: nn.Module, name: str = "tiny", size: int = 128) -> torch.Tensor:
    args, kwargs = MODELS[name].inputs(model, size, batch=2)
    with torch.no_grad():
        return torch.stack(list(model(*args, **kwargs)[0]))


def test_the_floor_of_a_unet_is_what_values_alone_give() -> None:
    model = MODELS["tiny"].build("cpu", torch.float32)
    with apply_variant(FLOOR, model, (0, 1)) as coverage:
        found = run(model)
        assert coverage() == 7
    for _, module in self_attention_layers(model):
        module.set_processor(ValueProcessor())
    torch.testing.assert_close(found, run(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_floor_keeps_what_stands_around_the_attention(name: str) -> None:
    row = MODELS[name]
    model = row.build("cpu", torch.float32)
    exact, calls = run(model, name, row.sizes[0]), []
    for _, module in self_attention_layers(model):
        module.to_q.register_forward_hook(lambda *_: calls.append(1))
    with apply_variant(FLOOR, model, (0,)) as coverage:
        found = run(model, name, row.sizes[0])
        assert coverage() == len(calls) == len(self_attention_layers(model))
    assert found.isfinite().all()
    assert not torch.equal(found, exact)
    assert torch.equal(run(model, name, row.sizes[0]), exact)


def test_the_floor_of_layers_without_set_processor() -> None:
    case = next(case for case in CASES if case.name == "MochiTransformer3DModel")
    model = case.build()
    given = case.inputs(2, torch.Generator().manual_seed(0))
    exact = case.call(model, given)
    assert not any(hasattr(module, "set_processor") for _, module in self_attention_layers(model))
    with apply_variant(FLOOR, model, (0,)) as coverage:
        assert not torch.equal(case.call(model, given), exact)
        assert coverage() == case.num_layers
    assert torch.equal(case.call(model, given), exact)


def test_token_merging_is_left_out_of_transformers() -> None:
    pytest.importorskip("tomesd")
    model = MODELS["tiny-flux"].build("meta", torch.float32)
    with pytest.raises(LeftOut, match="UNets only, not of a FluxTransformer2DModel"), apply_variant(TOME, model, (0,)):
        pass


ROUNDS = ({SDPA: 4.0, "balanced": 2.0, FLOOR: 1.0}, {SDPA: 8.0, "balanced": 4.0, FLOOR: 2.0})


def test_figures_that_follow_from_the_floor() -> None:
    covered = {SDPA: Covered(0), "balanced": Covered(3, 0.25), FLOOR: Covered(3)}
    found = figures(Timings(SDPA, ROUNDS), covered, {SDPA: 100.0, "balanced": 90.0, FLOOR: None})
    assert found["attention_share"] == 0.75
    assert found["ceiling"] == 4
    balanced = found["variants"]["balanced"]
    assert balanced["share_of_floor_saving"] == pytest.approx(2 / 3)
    assert (balanced["layers"], balanced["exact_head_share"]) == (3, 0.25)
    assert (balanced["peak_call_mib"], balanced["peak_ratio"]) == (90, 0.9)
    assert "peak_ratio" not in found["variants"][FLOOR]


def test_a_floor_that_saves_nothing_has_no_ceiling() -> None:
    rounds = ({SDPA: 1.0, FLOOR: 1.5}, {SDPA: 1.0, FLOOR: 0.5})
    found = figures(Timings(SDPA, rounds), {SDPA: Covered(0), FLOOR: Covered(1)})
    assert found["attention_share"] is found["ceiling"] is None
    found = figures(Timings(SDPA, ({SDPA: 1.0},)), {SDPA: Covered(0)})
    assert found["attention_share"] is found["ceiling"] is None


def test_what_a_run_does_once_is_no_part_of_a_step() -> None:
    row = MODELS["tiny-wan"]
    model, config = row.build("cpu", torch.float32), BenchmarkConfig(min_tokens=0, batch=1)
    inputs = row.inputs(model, row.sizes[0], batch=1)
    with torch.no_grad(), _prepare_eager(model, [SDPA, "balanced"], (0,), config, inputs) as (calls, around, covered):
        with around("balanced"):
            handle = find_patch(model)
            assert handle is not None
            assert handle.report().runs == 1
            calls["balanced"]()
            assert handle.report().runs == 1
        with around(SDPA):
            calls[SDPA]()
    assert {name: found.layers for name, found in covered().items()} == {"balanced": 2, SDPA: 0}


def test_peaks_are_kept_when_rounds_are_added(tmp_path: Path) -> None:
    options = {"models": ("tiny-wan",), "variants": (FLOOR,)}
    first = measure(tmp_path, **options, rounds=1)["results"][0]["variants"]
    config = BenchmarkConfig(models=("tiny-wan",), variants=(FLOOR,), rounds=2, min_tokens=0, device="cpu", batch=1)
    again = Benchmark(config, tmp_path, resume=True).run(say=lambda line: None)["results"][0]
    assert again["rounds"] == 2
    assert {v: again["variants"][v]["peak_call_mib"] for v in first} == {v: first[v]["peak_call_mib"] for v in first}

"""The attention benchmark on a tiny UNet: complete results, resuming, and variants that leave no trace."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from diffattn.benchmarks.attention import RESULT_FILE, Benchmark, BenchmarkConfig
from diffattn.benchmarks.attention_report import plot, style_of, table
from diffattn.benchmarks.plots import COLOURS, style_of_number
from diffattn.benchmarks.variants import FLOOR, OTHER_METHODS, SDPA, TOME, VARIANTS, LeftOut, apply_variant
from diffattn.cli.bench import app
from diffattn.measure.models import MODELS
from diffattn.measure.tables import conditions, rounds_of, timing_cells
from diffattn.tables import text_table

CONFIG = BenchmarkConfig(models=("tiny",), sizes=(64, 128), rounds=2, min_tokens=0, device="cpu")


def silent(line):
    pass


@pytest.fixture(scope="module")
def unet():
    return MODELS["tiny"].build("cpu", torch.float32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, Benchmark(CONFIG, folder).run(say=silent)


def run(unet, size=128):
    args, kwargs = MODELS["tiny"].inputs(unet, size, batch=2)
    with torch.no_grad():
        return unet(*args, **kwargs)[0]


def state(unet):
    """Everything that a variant could leave changed."""
    return [
        (id(m), type(m), id(getattr(m, "processor", None)), sorted(m.__dict__), len(m._forward_pre_hooks))
        for m in unet.modules()
    ]


@pytest.mark.slow
def test_the_models_have_the_sizes_they_are_named_for():
    from diffusers import UNet2DConditionModel

    millions = {}
    for name in ("sd15", "sdxl"):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**MODELS[name].config)
        millions[name] = round(sum(p.numel() for p in unet.parameters()) / 1e6, 1)
        assert set(MODELS[name].levels) <= set(MODELS[name].attention_levels)
    assert millions == {"sd15": 859.5, "sdxl": 2567.5}


@pytest.mark.slow
def test_random_weights_keep_the_output_finite_and_are_the_same_every_time(unet):
    out = run(unet)
    assert out.isfinite().all()
    assert 0.01 < out.std() < 100
    assert torch.equal(out, run(MODELS["tiny"].build("cpu", torch.float32)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_the_output_and_leaves_the_model_as_it_was(unet, variant):
    if variant == TOME:
        pytest.importorskip("tomesd")
    exact, before = run(unet), state(unet)
    with apply_variant(variant, unet, (0, 1), min_tokens=0) as coverage:
        changed = run(unet)
        layers = coverage()
    assert torch.equal(changed, exact) == (variant == SDPA) == (layers == 0)
    assert state(unet) == before
    assert torch.equal(run(unet), exact)


@pytest.mark.parametrize("variant", ["balanced", TOME, FLOOR])
def test_a_variant_is_undone_after_an_exception(unet, variant):
    if variant == TOME:
        pytest.importorskip("tomesd")
    before = state(unet)
    with pytest.raises(KeyboardInterrupt), apply_variant(variant, unet, (0, 1), min_tokens=0):
        raise KeyboardInterrupt
    assert state(unet) == before


def merges(block):
    return block._tome_info["args"]["max_downsample"] > 0


@pytest.mark.parametrize("levels", [(0,), (1,), (0, 1)])
def test_all_variants_cover_the_same_layers(unet, levels):
    counts = {}
    for variant in ("fast", *OTHER_METHODS, TOME, FLOOR):
        if variant == TOME:
            pytest.importorskip("tomesd")
        with apply_variant(variant, unet, levels, min_tokens=0) as coverage:
            if variant == TOME:
                merging = [m for m in unet.modules() if type(m).__name__ == "ToMeBlock" and merges(m)]
                assert len(merging) == coverage()
            run(unet)
            counts[variant] = coverage()
    assert set(counts.values()) == {{(0,): 3, (1,): 4, (0, 1): 7}[levels]}


def test_tome_and_presets_that_cannot_run_say_why(unet, monkeypatch):
    with pytest.raises(LeftOut, match="level 1 is not covered"), apply_variant("paper", unet, (1,)):
        pass
    monkeypatch.setitem(sys.modules, "tomesd", None)
    with pytest.raises(LeftOut, match="pip install"), apply_variant(TOME, unet, (0,)):
        pass


@pytest.mark.slow
def test_results_are_complete(measured):
    folder, results = measured
    assert json.loads((folder / RESULT_FILE).read_text()) == json.loads(json.dumps(results))
    assert results["settings"]["dtype"] in ("float32", "bfloat16")
    assert {"cpu", "cores", "threads", "versions", "commit"} <= set(results["machine"])
    keys = [(e["model"], e["size"], e["mode"]) for e in results["results"]]
    assert keys == [("tiny", 64, "eager"), ("tiny", 128, "eager")]
    for entry in results["results"]:
        assert entry["complete"]
        assert entry["rounds"] == 2
        assert {*entry["variants"], *entry["left_out"]} == set(VARIANTS)
        assert all(len(v["seconds_per_round"]) == 2 for v in entry["variants"].values())
        assert entry["variants"][FLOOR]["layers"] == 7
    assert results["results"][1]["tokens"] == {"0": 256, "1": 64}
    assert results["results"][1]["variants"]["balanced"]["layers"] == 3  # 64 agents cannot serve 64 tokens


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1e-9, float("inf")])
def test_heads_run_exact_beyond_the_given_limit(unet, tmp_path, limit):
    given = {
        "sizes": (128,),
        "rounds": 1,
        "warmup": 0,
        "variants": ("balanced", "paper", "keys"),
        "max_head_error": limit,
    }
    results = Benchmark(replace(CONFIG, **given), tmp_path).run(say=silent)
    assert results["results"][0]["variants"]["balanced"]["exact_head_share"] == (limit < 1)
    assert not results["results"][0]["left_out"]
    assert "Infinity" not in (tmp_path / RESULT_FILE).read_text()
    resumed = Benchmark(replace(CONFIG, **given), tmp_path, resume=True)
    assert resumed.is_complete
    with pytest.raises(ValueError, match="made with another max_head_error"):
        Benchmark(CONFIG, tmp_path, resume=True)


def test_share_of_floor_saving_is_as_defined(measured):
    for entry in measured[1]["results"]:
        ratio = {name: v["time_ratio"]["median"] for name, v in entry["variants"].items()}
        quartile = entry["variants"][FLOOR]["time_ratio"]["iqr"][1]
        for name, variant in entry["variants"].items():
            if name in (SDPA, FLOOR):
                assert "share_of_floor_saving" not in variant
            elif quartile >= 1:
                assert variant["share_of_floor_saving"] is None
            else:
                assert variant["share_of_floor_saving"] == pytest.approx((1 - ratio[name]) / (1 - ratio[FLOOR]))


def test_resume_measures_only_what_is_missing(measured):
    folder, results = measured
    lines = []
    again = Benchmark(CONFIG, folder, resume=True)
    assert again.is_complete
    assert again.run(say=lines.append)["results"] == results["results"]
    assert not lines


@pytest.mark.slow
def test_resume_goes_on_within_a_size(tmp_path):
    config = BenchmarkConfig(models=("tiny",), sizes=(64,), variants=("floor",), rounds=3, device="cpu")

    def interrupt(line):
        if "round 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Benchmark(config, tmp_path).run(say=interrupt)
    partial = json.loads((tmp_path / RESULT_FILE).read_text())["results"]
    assert [(e["rounds"], e["complete"]) for e in partial] == [(2, False)]
    lines = []
    done = Benchmark(config, tmp_path, resume=True).run(say=lines.append)["results"]
    assert [(e["rounds"], e["complete"]) for e in done] == [(3, True)]
    assert sum("round" in line for line in lines) == 1
    before = partial[0]["variants"][FLOOR]["seconds_per_round"]
    assert done[0]["variants"][FLOOR]["seconds_per_round"][:2] == before


def test_resume_refuses_other_conditions(measured):
    folder, _ = measured
    other = BenchmarkConfig(models=("tiny",), sizes=(64,), min_tokens=0, device="cpu", batch=1)
    with pytest.raises(ValueError, match="another batch"):
        Benchmark(other, folder, resume=True)


def test_a_time_budget_leaves_a_valid_file(tmp_path):
    benchmark = Benchmark(
        BenchmarkConfig(models=("tiny",), sizes=(64, 128), variants=("floor",), device="cpu"), tmp_path
    )
    benchmark.run(time_budget=1e-9, say=silent)
    assert not benchmark.is_complete


@pytest.mark.slow
def test_table_and_plot(measured, tmp_path):
    text = table(measured[1])
    assert "tiny UNet" in text
    assert "balanced" in text
    pytest.importorskip("matplotlib")
    plot(measured[1], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_variant_looks_different_whatever_their_number(measured, tmp_path):
    styles = [style_of(name) for name in VARIANTS if name != SDPA]
    assert len({(s["color"], s.get("marker")) for s in styles}) == len(VARIANTS) - 1
    assert style_of("balanced") == {"label": "balanced", "color": COLOURS[0], "marker": "o"}
    many = [tuple(style_of_number(i).values()) for i in range(3 * len(COLOURS))]
    assert len(set(many)) == len(many)
    pytest.importorskip("matplotlib")
    results = json.loads(json.dumps(measured[1]))  # of a later version, with a variant that this one does not know
    for entry in results["results"]:
        entry["variants"]["a newcomer"] = entry["variants"]["balanced"]
    assert "a newcomer" in table(results)
    plot(results, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_text_tables():
    text = text_table(("name", "seconds", "never used"), [("a", "1", ""), ("longer", "20", "")])
    assert text.splitlines() == ["name    seconds", "a       1", "longer  20"]
    assert text_table(("name", "x"), []) == ""
    assert text_table(("name", "x"), [("a", "")], drop_empty=False) == "name  x\na"
    with pytest.raises(ValueError, match="a row has 1 cells, the head 2"):
        text_table(("name", "x"), [("a",)])


def test_lines_and_cells_that_all_reports_share(measured):
    machine = {"cpu": "a CPU", "threads": 2, "versions": {"torch": "9.9"}}
    results = {"machine": machine, "settings": {"dtype": "float32", "batch": 2}}
    assert conditions(results) == "a CPU, 2 threads, float32, batch 2, torch 9.9"
    assert conditions({**results, "machine": machine | {"gpu": "a GPU"}}) == "a GPU, float32, batch 2, torch 9.9"
    assert rounds_of({"rounds": 3, "complete": True}) == "3 rounds"
    assert rounds_of({"rounds": 1, "complete": False}) == "1 rounds, incomplete"
    variant = {
        "seconds": {"median": 1.5, "iqr": [1.25, 2.0]},
        "time_ratio": {"median": 0.5, "iqr": [0.25, 0.75]},
        "speedup": 2.0,
    }
    assert timing_cells(variant) == ("1.5", "1.25-2", "2.00", "0.500", "0.250-0.750")


def test_plot_without_matplotlib_says_what_to_install(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        plot(measured[1], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("sd9",)}, "sd9"),
        ({"variants": ("turbo",)}, "turbo"),
        ({"sizes": (100,)}, "got 100"),
        ({"sizes": ()}, "at least one"),
        ({"rounds": 0}, "got 0"),
        ({"models": ("sdxl",), "levels": (0,)}, r"\[1, 2\]"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**options)


@pytest.mark.slow
def test_the_command(tmp_path):
    command = ["attention", "--models", "tiny", "--sizes", "64", "--variants", "floor", "--rounds", "1"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / RESULT_FILE).is_file()
    result = CliRunner().invoke(app, [*command[:2], "tiny-flux", *command[5:], "--all-layers", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "tiny FLUX transformer (for tests) (6 layers), 512x512 px" in result.output
    assert CliRunner().invoke(app, [*command, "--sizes", "100", "--out", str(tmp_path)]).exit_code == 2

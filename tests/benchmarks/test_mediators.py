"""The mediator benchmark on a tiny block and model: what is compared, complete results, resuming, what is left out."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from diffattn.benchmarks import mediators as mediator_benchmark
from diffattn.benchmarks.mediator_report import plot, table
from diffattn.benchmarks.mediator_subjects import BLOCK, MODEL, SOFTMAX, WHAT, Subject, gflops, memory_needed
from diffattn.benchmarks.mediators import (
    FORWARD,
    MODES,
    RESULT_FILE,
    TRAINING,
    MediatorBenchmark,
    MediatorBenchmarkConfig,
    TimedCase,
    pays_from,
)
from diffattn.cli.bench import app
from diffattn.measure.flops import forward_gflops
from diffattn.measure.memory import peak_mib
from diffattn.models import DiT

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = MediatorBenchmarkConfig(
    widths=("tiny",), sizes=(16, 64), mediators=(4, 16), rounds=2, device="cpu", dtype="float32"
)
MIB = 2**20


def subject(what, tokens=64, device=CPU):
    return Subject(what, "tiny", tokens, (4, 16), 2, device, torch.float32)


def silent(line):
    pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, MediatorBenchmark(CONFIG, folder).run(say=silent)


# What is compared.


@pytest.mark.parametrize("what", WHAT)
def test_softmax_and_mediators_share_their_weights_and_are_the_same_every_time(what):
    s, again = subject(what), subject(what)
    exact, mediating = dict(s.exact.named_parameters()), dict(s.mediating.named_parameters())
    assert exact.keys() < mediating.keys()
    assert all(weight is mediating[name] for name, weight in exact.items())
    assert all(torch.equal(w, mediating[name]) for name, w in again.mediating.named_parameters())
    assert all(w.device == CPU and w.isfinite().all() for w in mediating.values())


@pytest.mark.parametrize("what", WHAT)
def test_every_variant_computes_something_else_and_gradients_of_all_its_weights(what):
    s = subject(what)
    outputs, gradients = {}, {}
    for name in s.variants:
        module, n = (s.exact, 0) if name == SOFTMAX else (s.mediating, int(name))
        forward, inputs = s._forward(module, n, training=True)
        out = forward()
        out.square().mean().backward()
        assert out.isfinite().all()
        outputs[name] = out.detach()
        leaves = dict(module.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
        gradients[name] = {key for key, leaf in leaves.items() if leaf.grad is not None}
        expected = {key for key in leaves if ".biases." not in key or f".biases.{n}." in key}
        assert gradients[name] == expected
        for leaf in leaves.values():
            leaf.grad = None
    first, *others = outputs.values()
    assert all(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("what", WHAT)
def test_a_training_step_leaves_no_gradients_and_a_forward_pass_makes_none(what):
    s = subject(what)
    for training in (True, False):
        s.step("4", training)()
        assert all(p.grad is None for p in s.mediating.parameters())


def test_nothing_is_computed_on_the_meta_device():
    assert {p.device for p in subject(MODEL, device=META).exact.parameters()} == {META}


@pytest.mark.parametrize("what", WHAT)
def test_memory_needed_is_weights_and_in_training_gradients_and_activations(what):
    s = subject(what)
    weights = 4 * sum(p.numel() for p in s.mediating.parameters())
    assert memory_needed(s, training=False) == weights
    assert 3 * weights < memory_needed(replace(s, tokens=1024), training=True) < 1000 * weights


def test_a_training_step_needs_about_the_memory_that_was_foreseen():
    s = Subject(MODEL, "tiny", 256, (4, 64), 2, CPU, torch.float32)
    weights = memory_needed(s, training=False) / MIB
    foreseen = memory_needed(s, training=True) / MIB - weights
    held = peak_mib(s.step("64", True), CPU)
    assert held is not None
    assert 0.5 * foreseen < held < 1.5 * foreseen


def test_peak_memory_is_the_most_that_was_held_at_once():
    x = torch.randn(256, 1024)  # 1 MiB

    def call():
        a = x * 2
        b = a + 1  # two more
        del a
        (b + 1).sum()  # two again

    assert peak_mib(call, CPU) == pytest.approx(2, abs=0.01)


def test_peak_memory_of_training_has_the_gradients():
    s = subject(BLOCK)
    gradients = 4 * sum(p.numel() for p in s.exact.parameters()) / MIB
    forward, training = (peak_mib(s.step(SOFTMAX, mode), CPU) or 0.0 for mode in (False, True))
    assert training > forward + gradients


# Results.


def test_results_are_complete(measured):
    folder, results = measured
    assert json.loads((folder / RESULT_FILE).read_text()) == json.loads(json.dumps(results))
    assert {"cpu", "cores", "threads", "versions", "commit"} <= set(results["machine"])
    keys = {(e["model"], e["size"], e["mode"]) for e in results["results"]}
    assert keys == {(f"{what} tiny", tokens, mode) for what in WHAT for tokens in (16, 64) for mode in MODES}
    assert results["left_out"] == []
    for entry in results["results"]:
        assert entry["complete"]
        assert list(entry["variants"]) == [SOFTMAX, "4", "16"]
        for variant in entry["variants"].values():
            assert len(variant["seconds_per_round"]) == 2
            assert variant["peak_mib"] > 0


def test_gflops_of_training_are_three_times_those_of_forward_but_for_what_has_no_gradient(measured):
    figures = {(e["model"], e["size"], e["mode"]): e["variants"] for e in measured[1]["results"]}
    for what in ("block tiny", "model tiny"):
        forward, training = (figures[what, 64, mode] for mode in (FORWARD, TRAINING))
        for n in (SOFTMAX, "4", "16"):
            assert 2.8 * forward[n]["gflops"] < training[n]["gflops"] <= 3.001 * forward[n]["gflops"]
        assert forward["4"]["gflops"] < forward["16"]["gflops"] < forward[SOFTMAX]["gflops"]


def test_gflops_of_a_deep_model_are_those_counted_on_all_its_layers():
    s = Subject(MODEL, "S", 256, (16,), 1, META, torch.float32)
    assert isinstance(s.mediating, DiT)
    assert gflops(s, training=False)["16"] == pytest.approx(forward_gflops(s.mediating, 16), rel=1e-9)


def test_resume_measures_only_what_is_missing(measured):
    folder, results = measured
    again, lines = MediatorBenchmark(CONFIG, folder, resume=True), []
    assert again.is_complete
    assert again.run(say=lines.append)["results"] == results["results"]
    assert not lines
    assert not MediatorBenchmark(replace(CONFIG, rounds=3), folder, resume=True).is_complete


def test_resume_goes_on_within_a_comparison(tmp_path):
    config = replace(CONFIG, what=(BLOCK,), sizes=(16,), modes=(TRAINING,), rounds=3)

    def interrupt(line):
        if "round 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MediatorBenchmark(config, tmp_path).run(say=interrupt)
    before = json.loads((tmp_path / RESULT_FILE).read_text())["results"]
    assert [(e["rounds"], e["complete"]) for e in before] == [(2, False)]
    lines = []
    done = MediatorBenchmark(config, tmp_path, resume=True).run(say=lines.append)["results"]
    assert [(e["rounds"], e["complete"]) for e in done] == [(3, True)]
    assert sum("round" in line for line in lines) == 1
    seconds = [e[0]["variants"]["16"]["seconds_per_round"] for e in (before, done)]
    assert seconds[1][:2] == seconds[0]


def test_resume_refuses_other_conditions(measured):
    with pytest.raises(ValueError, match="another batch"):
        MediatorBenchmark(replace(CONFIG, batch=3), measured[0], resume=True)


def test_the_cheapest_comes_first(measured):
    jobs = [
        TimedCase(Subject(e["model"].split()[0], "tiny", e["size"], (4, 16), 1, CPU, torch.float32), e["mode"])
        for e in measured[1]["results"]
    ]
    work = [job.work for job in jobs]
    assert work == sorted(work)


def test_a_time_budget_leaves_out_what_would_take_too_long_and_says_so(tmp_path):
    config = replace(CONFIG, what=(BLOCK,), rounds=1)
    benchmark = MediatorBenchmark(config, tmp_path)
    results = benchmark.run(time_budget=1e-6, say=silent)
    assert len(results["results"]) == 1  # the first is always measured: only then is it known how long things take
    assert len(results["left_out"]) == 3
    assert "minutes, too long for the time budget" in results["left_out"][0]["why"]
    assert not benchmark.is_complete
    assert results["left_out"][0]["why"] in table(results)
    again = MediatorBenchmark(config, tmp_path, resume=True)
    assert again.run(say=silent)["left_out"] == []
    assert again.is_complete


def test_what_memory_has_no_room_for_is_left_out_and_not_missed(tmp_path, monkeypatch):
    needed = memory_needed(subject(MODEL, 16, META), training=True)
    monkeypatch.setattr(mediator_benchmark, "total_memory", lambda device: needed)  # a small machine
    benchmark = MediatorBenchmark(replace(CONFIG, batch=2, sizes=(16,), rounds=1), tmp_path)
    results = benchmark.run(say=silent)
    assert [(e["model"], e["mode"]) for e in results["left_out"]] == [("model tiny", TRAINING)]
    assert "GiB of memory" in results["left_out"][0]["why"]
    assert len(results["results"]) == 3
    assert benchmark.is_complete


def entry(size, mode, **upper_quartiles):
    variants = {n.removeprefix("n"): {"time_ratio": {"iqr": [0.1, q]}} for n, q in upper_quartiles.items()}
    return {"model": "block S", "size": size, "mode": mode, "variants": variants}


def test_mediators_pay_from_the_size_after_which_they_are_never_slower():
    results = {
        "results": [
            entry(1024, FORWARD, softmax=1.0, n4=0.8, n16=0.9, n64=0.9),
            entry(256, FORWARD, softmax=1.0, n4=0.9, n16=1.0, n64=0.9),
            entry(4096, FORWARD, softmax=1.0, n4=0.4, n16=0.5, n64=1.2),
            entry(256, TRAINING, softmax=1.0, n4=1.3),
        ]
    }
    assert pays_from(results) == {
        "block S": {FORWARD: {"4": 256, "16": 1024, "64": None}, TRAINING: {"4": None}},
    }


def test_table_and_plot(measured, tmp_path):
    text = table(measured[1])
    for part in ("block tiny, 16 tokens, forward", "n=16", "GFLOPs", "peak MiB", "without an optimizer"):
        assert part in text
    assert "numbers of tokens at which mediators are faster:\nblock tiny, forward: n=4 " in text
    pytest.importorskip("matplotlib")
    plot(measured[1], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_plot_without_matplotlib_says_what_to_install(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        plot(measured[1], tmp_path / "a.png")


# Bad input, and the command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ("head",)}, "what must be one of block, model, got 'head'"),
        ({"widths": ("M",)}, "widths must be one of S, B, L, XL, tiny, got 'M'"),
        ({"modes": ("sampling",)}, "modes must be one of forward, training"),
        ({"sizes": (200,)}, "perfect squares, got 200"),
        ({"sizes": ()}, "sizes must name at least one"),
        ({"mediators": (5,)}, "perfect square, got 5"),
        ({"mediators": (64,), "sizes": (16,)}, "larger than the grid of 4x4"),
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        MediatorBenchmarkConfig(**options)


def test_the_command(tmp_path):
    command = ["mediator", "--widths", "tiny", "--sizes", "16", "--what", "block", "--rounds", "1", "--mediators", "4"]
    where = ["--device", "cpu", "--out", str(tmp_path), "--json", str(tmp_path / "x.json")]
    result = CliRunner().invoke(app, [*command, *where])
    assert result.exit_code == 0, result.output
    assert "block tiny, 16 tokens, training, 1 rounds" in result.output
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads((tmp_path / RESULT_FILE).read_text())
    bad = CliRunner().invoke(app, [*command, "--sizes", "17", *where])
    assert bad.exit_code == 2
    assert "perfect squares, got 17" in bad.output


def test_the_command_says_when_the_time_was_up(tmp_path):
    command = [
        "mediator",
        "--widths",
        "tiny",
        "--sizes",
        "16,64",
        "--what",
        "block",
        "--rounds",
        "1",
        "--mediators",
        "4",
    ]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--out", str(tmp_path), "--time-budget", "1e-9"])
    assert result.exit_code == 1
    assert "continue with --resume" in result.output

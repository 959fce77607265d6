"""The program that checks that a patch makes no step slower: what it compares, resumes and computes."""

import json
from pathlib import Path
from typing import Any

import check_never_slower
import pytest
import torch
import typer
from check_never_slower import CONTROL, EXACT, FIRST, FIRST_RUN, LATER, RUN, START, ratios, table
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner, Result

from diffattn.patching.patch import find_patch


def run(out: Path, *more: str) -> Result:
    app = typer.Typer()
    app.command()(check_never_slower.main)
    given = ["--models", "tiny", "--sizes", "64,128", "--device", "cpu", "--dtype", "float32"]
    given += ["--seconds", "0", "--out", str(out), *more]
    return CliRunner().invoke(app, given)


@pytest.mark.slow
def test_rounds_are_kept_and_a_resumed_check_adds_the_missing_ones(tmp_path: Path) -> None:
    assert run(tmp_path, "--rounds", "1").exit_code == 0
    before = json.loads((tmp_path / "never-slower.json").read_text())["results"]
    assert [(entry["model"], entry["size"], len(entry["rounds"])) for entry in before] == [
        ("tiny", 64, 1),
        ("tiny", 128, 1),
    ]
    resumed = run(tmp_path, "--rounds", "2")
    after = json.loads((tmp_path / "never-slower.json").read_text())["results"]
    assert [entry["rounds"][0] for entry in after] == [entry["rounds"][0] for entry in before]
    assert [set(r) for entry in after for r in entry["rounds"]] == [{EXACT, CONTROL, START, LATER, FIRST}] * 4
    assert all(0 <= entry["layers"][0] <= entry["layers"][1] == 7 for entry in after)
    text = (tmp_path / "never-slower.md").read_text()
    assert text in resumed.output
    assert text.count("| tiny |") == 2


def test_short_steps_are_timed_until_their_times_add_up() -> None:
    times = {EXACT: 1.0, CONTROL: 1.0, START: 1.0, LATER: 1.0, FIRST: 1.0}
    enough = check_never_slower._enough
    assert not enough([times] * 3, rounds=2, seconds=20)
    assert enough([times] * 4, rounds=2, seconds=20)
    assert not enough([times] * 4, rounds=5, seconds=20)
    assert enough([times] * 100, rounds=2, seconds=1000)


@pytest.mark.slow
def test_a_size_takes_more_rounds_where_its_steps_are_short(tmp_path: Path) -> None:
    assert run(tmp_path, "--rounds", "1", "--sizes", "64", "--seconds", "0.5").exit_code == 0
    (entry,) = json.loads((tmp_path / "never-slower.json").read_text())["results"]
    assert 1 < len(entry["rounds"]) <= check_never_slower.MOST_ROUNDS
    before = sum(sum(r.values()) for r in entry["rounds"][:-1])
    assert before < 0.5 or len(entry["rounds"]) == check_never_slower.MOST_ROUNDS


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    assert run(tmp_path, "--rounds", "1", "--sizes", "64").exit_code == 0
    refused = run(tmp_path, "--rounds", "1", "--batch", "1")
    assert refused.exit_code == 2
    assert "other settings" in refused.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--models", "tiny,nothing"], "unknown model 'nothing'"),
        (["--sizes", "64,65"], "multiples of"),
        (["--models", "emoji-sd", "--sizes", "72"], "got 72"),
        (["--sizes", "64,a"], "'a'"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(tmp_path: Path, given: list[str], message: str) -> None:
    refused = run(tmp_path / "out", *given)
    assert refused.exit_code == 2
    assert message in refused.output
    assert not (tmp_path / "out").exists()


def test_a_patch_is_there_where_it_should_be(tmp_path: Path) -> None:
    model = check_never_slower.MODELS["tiny"].build("cpu", torch.float32)
    inputs = check_never_slower.MODELS["tiny"].inputs(model, 256, 1)  # smaller ones need not be timed
    step = check_never_slower.Step(model, inputs, torch.device("cpu"), tmp_path, check_never_slower._scheduler(model))
    with torch.no_grad():
        step.accelerated()
        known = (tmp_path / "known.json").read_text()
        for variant, patched in ((EXACT, False), (CONTROL, False), (START, True), (LATER, True), (FIRST, True)):
            with step.around(variant):
                patch: Any = find_patch(model)
                assert (patch is not None) == patched
                step.call()
                if patched:  # a first call times both ways, a later one reads what the first has found
                    assert (tmp_path / "new.json").exists() == (variant == FIRST)
            assert find_patch(model) is None
    assert (tmp_path / "known.json").read_text() == known


class Operations(TorchDispatchMode):
    """Counts operations."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tiny", "tiny-sd3"])
def test_the_second_step_reuses_what_the_first_has_found(tmp_path: Path, name: str) -> None:
    kind = check_never_slower.MODELS[name]
    model = kind.build("cpu", torch.float32)
    scheduler = check_never_slower._scheduler(model)
    step = check_never_slower.Step(model, kind.inputs(model, 256, 1), torch.device("cpu"), tmp_path, scheduler)
    cache = tmp_path / "known.json"
    with torch.no_grad():
        step.accelerated()
        known = json.loads(cache.read_text())
        for kinds in known["machines"].values():
            for decision in kinds.values():
                decision.update(faster=True, seconds=1.0, exact_seconds=3.0)
        cache.write_text(json.dumps(known))
        counts = {}
        for variant, call in step.calls().items():
            with step.around(variant), Operations() as operations:
                call()
            counts[variant] = operations.number
    assert counts[LATER] < counts[START]
    assert counts[EXACT] == counts[CONTROL] <= counts[LATER]


def test_a_run_looks_again_in_every_eighth_step() -> None:
    entry = {
        "model": "a", "size": 64, "layers": [1, 2], "peak_mib": {EXACT: 10.0, START: 8.0},
        "rounds": [{EXACT: 2.0, CONTROL: 2.2, START: 3.0, LATER: 1.0, FIRST: 5.0}],
    }  # fmt: skip
    found = {name: spread.median for name, spread in ratios(entry, steps=9).items()}
    assert found == pytest.approx({CONTROL: 1.1, RUN: (2 * 3 + 7) / 18, FIRST_RUN: (5 + 3 + 7) / 18})
    assert ratios(entry, steps=8)[FIRST_RUN].median == pytest.approx((5 + 7) / 16)
    machine = {"cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}, "commit": "c"}
    text = table({"machine": machine, "settings": {"dtype": "float32", "batch": 1, "steps": 8}, "results": [entry]})
    assert "| a | 64 | 1 of 2 | 1.100 (1.100–1.100) | 0.625 (0.625–0.625) | 0.750 (0.750–0.750) | 0.80 | 1 |" in text

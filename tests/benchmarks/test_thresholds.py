"""Thresholds: which row decides, this machine's own file, and the command that measures."""

import json
from pathlib import Path

import pytest
import torch
from support.closed_folder import close
from typer.testing import CliRunner

from diffattn.benchmarks.thresholds import (
    NUM_AGENTS,
    SizeResult,
    lines_from,
    measure_thresholds,
    row_from,
    save_thresholds,
    thresholds_from,
)
from diffattn.cli.bench import app
from diffattn.files import read_json, write_json
from diffattn.methods.agent import AgentAttention
from diffattn.methods.thresholds import (
    MERGE,
    below_smallest,
    load_thresholds,
    min_tokens_for,
    read_thresholds,
    shipped_file,
    user_file,
)

CPU = torch.device("cpu")
TABLE = {"cpu": {"16": 256, "64": 1024}, "cuda": {"16": 4096}}
RESULTS = [
    SizeResult(64, 3, {"16": 1.5}),
    SizeResult(256, 3, {"16": 0.5, "64": 1.2}),
    SizeResult(1024, 3, {"16": 0.2, "64": 0.6}),
]


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    path = tmp_path / "settings" / "thresholds.json"
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(path))
    return path


@pytest.mark.parametrize(("agents", "tokens"), [(1, 256), (16, 256), (17, 272), (40, 640), (64, 1024), (128, 2048)])
def test_between_measured_numbers_of_agents_lies_a_line(agents, tokens):
    assert min_tokens_for(TABLE, "cpu", agents) == tokens


def test_an_unknown_device_counts_as_cuda():
    assert min_tokens_for(TABLE, "mps", 16) == 4096
    assert min_tokens_for(TABLE, "cpu", None) == 1024  # no row of its own: as the largest number of agents
    assert min_tokens_for({"cuda": {"16": 4096, MERGE: 9}}, "cuda", None) == 9


def test_beside_a_number_that_is_not_known_nothing_is_known():
    table = {"cuda": {"16": 256, "64": None, MERGE: None}}
    found = {agents: min_tokens_for(table, "cuda", agents) for agents in (8, 16, 17, 64, 100, None)}
    assert found == {8: 256, 16: 256, 17: None, 64: None, 100: None, None: None}
    assert below_smallest(256, 255) == "255 tokens: exact attention is faster below 256"
    assert below_smallest(256, 256) is None
    assert "exact attention was faster at all sizes measured" in (below_smallest(None, 10**6) or "")


def test_unknown_thresholds_run_exact(own_file):
    write_json(own_file, {"devices": {"cpu": {"16": 256, "64": None}}})
    agents = {n: AgentAttention(num_agents=n, agent_ratio=None) for n in (16, 64)}
    assert agents[16].reason_slower(10**6, "cpu") is None
    assert "exact attention was faster" in (agents[64].reason_slower(10**6, "cpu") or "")


def test_the_shipped_table_is_complete_and_says_what_is_measured():
    table = read_thresholds(shipped_file())
    status = read_json(shipped_file())["status"]
    assert {"cpu", "cuda"} <= set(table)
    assert all(set(row) == {*map(str, NUM_AGENTS), MERGE} for row in table.values())
    assert set(status) == set(table)
    assert set(status.values()) <= {"measured", "assumed"}


def test_this_machines_file_wins_for_the_devices_it_has(own_file):
    assert user_file() == own_file
    shipped = read_thresholds(shipped_file())
    assert load_thresholds() == shipped
    write_json(own_file, {"devices": {"cpu": {"16": 99}}})
    assert load_thresholds() == shipped | {"cpu": {"16": 99}}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"devices": {"cpu": {}}}', '{"devices": {"cpu": {"x": 1}}}'])
def test_a_damaged_file_is_named(own_file, text):
    own_file.parent.mkdir()
    own_file.write_text(text)
    with pytest.raises(ValueError, match=r"thresholds\.json.*diffattn bench thresholds"):
        load_thresholds()
    result = CliRunner().invoke(app, ["thresholds", "--device", "cpu"])
    assert result.exit_code == 2
    assert own_file.read_text() == text


def test_the_smallest_number_of_tokens_from_which_agents_stay_faster():
    assert thresholds_from(RESULTS) == {"16": 256, "64": 1024}
    dip = [SizeResult(64, 3, {"16": 0.5}), SizeResult(256, 3, {"16": 0.95}), SizeResult(1024, 3, {"16": 0.5})]
    assert thresholds_from(dip)["16"] == 1024


def test_agents_that_were_not_faster_keep_what_is_not_contradicted():
    slow = [
        SizeResult(576, 3, {"16": 2.0, "64": 4.0, "256": 9.0, MERGE: 3.0}),
        SizeResult(2304, 3, {"16": 0.1, "64": 1.0, "256": 2.0, "1024": 5.0, MERGE: 1.0}),
    ]
    before = {"cpu": {"16": 400, "64": 400, "256": 2304, "1024": 9216, MERGE: 4096}, "cuda": {}}
    row = row_from(slow, "cpu", before)
    assert row == {"16": 2304, "64": None, "256": None, "1024": 9216, MERGE: 4096}
    assert lines_from(slow, row) == [
        "16 agents are faster from 2304 tokens up",
        "64 agents are not faster up to 2304 tokens; exact attention until a call is timed",
        "256 agents are not faster up to 2304 tokens; exact attention until a call is timed",
        "1024 agents are not faster up to 2304 tokens; assumed faster from 9216 up, as in the package",
        "merged agents are not faster up to 2304 tokens; assumed faster from 4096 up, as in the package",
    ]
    few = slow[:1]
    assert row_from(few, "cpu", before)["1024"] == 9216
    assert lines_from(few, row_from(few, "cpu", before))[3].startswith("1024 agents were not measured; assumed")


def test_saving_keeps_other_devices(own_file):
    save_thresholds(own_file, CPU, torch.float32, RESULTS)
    data = read_json(own_file)
    data["devices"]["cuda"], data["status"]["cuda"] = {"16": 7}, "measured"
    write_json(own_file, data)
    assert save_thresholds(own_file, CPU, torch.float32, RESULTS[:2]) == {"16": 256}
    row = row_from(RESULTS[:2], "cpu", read_thresholds(shipped_file()))
    data = read_json(own_file)
    assert data["devices"] == {"cuda": {"16": 7}, "cpu": row}
    assert data["status"] == {"cuda": "measured", "cpu": "measured"}
    assert data["measured"]["cpu"]["dtype"] == "float32"
    assert data["measured"]["cpu"]["time_ratios"]["256"] == {"16": 0.5, "64": 1.2}
    assert load_thresholds()["cpu"] == row


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_reading_names_what_is_wrong(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(tmp_path / "a.json")


@pytest.mark.slow
def test_measuring_small_grids():
    results = measure_thresholds(CPU, torch.float32, sides=(8, 12), time_budget=60.0, say=lambda line: None)
    assert [r.tokens for r in results] == [64, 144]
    assert [set(r.ratios) for r in results] == [{"16", "merge"}, {"16", "64", "merge"}]
    assert all(ratio > 0 for r in results for ratio in r.ratios.values())


def test_the_time_budget_leaves_out_large_grids():
    lines = []
    results = measure_thresholds(CPU, torch.float32, sides=(8, 12, 512), time_budget=0.5, say=lines.append)
    assert results[-1].tokens < 512 * 512
    assert "time budget" in lines[-1]


def test_the_command_writes_the_file_that_is_read(own_file):
    result = CliRunner().invoke(app, ["thresholds", "--device", "cpu", "--time-budget", "0.02"])
    assert result.exit_code == 0, result.output
    data = json.loads(own_file.read_text())
    assert data["status"] == {"cpu": "measured"}
    assert load_thresholds()["cpu"] == data["devices"]["cpu"]
    largest = max(map(int, data["measured"]["cpu"]["time_ratios"]))
    assert all(tokens is None or tokens != largest + 1 for tokens in data["devices"]["cpu"].values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "64"], "--sizes '64' applies to a model: give --model too"),
        (["--preset", "fast"], "--preset 'fast' applies to a model: give --model too"),
        (["--model", "emoji-sd", "--sizes", "x"], "--sizes takes numbers separated by commas, got 'x'"),
        (["--model", "emoji-sd", "--time-budget", "2"], "--time-budget 2 applies to the measurement without --model"),
        (["--time-budget", "1e-9"], "--time-budget must be enough minutes for the smallest grid, got 1e-09"),
    ],
)
def test_options_that_would_be_ignored_are_refused(own_file, words, says):
    done = CliRunner().invoke(app, ["thresholds", "--device", "cpu", *words])
    assert done.exit_code == 2
    assert done.stderr == f"diffattn: {says}\n"
    assert not own_file.exists()


@pytest.mark.slow
def test_the_cache_is_filled_for_a_model(tmp_path):
    cache, out = tmp_path / "decisions.json", tmp_path / "out.json"
    words = ["thresholds", "--model", "emoji-sd", "--sizes", "128,256", "--out", str(cache), "--json", str(out)]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    timed = read_json(out)["sizes"]
    assert set(timed) == {"128", "256"}
    assert timed["256"]
    assert all(text.endswith("measured here") for kinds in timed.values() for text in kinds.values())
    (stored,) = read_json(cache)["machines"].values()
    assert set(stored) == {kind for kinds in timed.values() for kind in kinds}
    wrong = CliRunner().invoke(app, ["thresholds", "--model", "emoji-sd", "--shipped"])
    assert wrong.exit_code != 0


def test_a_table_in_a_folder_that_must_not_be_entered_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(own := tmp_path / "thresholds.json"))
    close(own, monkeypatch)
    assert load_thresholds() == read_thresholds(shipped_file())

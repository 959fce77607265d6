"""The day with a GPU, rehearsed on a CPU: everything once, resumed, and items that fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_day
import pytest
import torch
import typer
from day.alone import fastest_exact
from day.item import Item, Setting
from day.report import markdown
from day.run import BEGUN, CONDITIONS, DONE, FAILED, OUT_OF_MEMORY, TABLE, TO_DO, UNFINISHED, Day
from typer.testing import CliRunner

from diffattn.machine import describe_machine
from diffattn.measure.interleave import Timings

CPU = torch.device("cpu")


def rehearse(out: Path, *options: str) -> Any:
    app = typer.Typer()
    app.command()(gpu_day.main)
    command = ["--out", str(out), "--tiny", "--device", "cpu", "--dtype", "float32", *options]
    return CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("day")
    result = rehearse(out, "--minutes", "30")
    assert result.exit_code == 0, result.output
    return out, result.output


def records(out: Path) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in (out / "items").glob("*.json")]
    return {record["name"]: record for record in found}


def test_the_plan_comes_first_with_the_share_of_every_item(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "--plan")
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines() if "%" in line]
    assert len(rows) >= 10
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rehearsal_measures_every_item(rehearsed: tuple[Path, str]) -> None:
    out, printed = rehearsed
    found = records(out)
    assert {record["status"] for record in found.values()} == {DONE}
    assert {record["kind"] for record in found.values()} == {"attention", "step", "thresholds", "middle"}
    assert printed.index("item") < printed.index(" ...")  # the plan is printed before anything is measured
    assert all(name in printed for name in found)


@pytest.mark.slow
def test_attention_alone_names_the_fastest_exact_backend(rehearsed: tuple[Path, str]) -> None:
    result = records(rehearsed[0])["attention-64-144"]["result"]
    assert "exact, as torch chooses" in result["variants"]
    exact = {name: v["seconds"]["median"] for name, v in result["variants"].items() if name == "exact, flash"}
    assert result["fastest_exact"] == result["reference"] == min(exact, key=lambda name: exact[name])
    assert "exact, cuDNN" in result["left_out"]  # which needs CUDA
    assert result["variants"][result["reference"]]["time_ratio"]["median"] == 1
    timings = [len(v["seconds_per_round"]) for v in result["variants"].values()]
    assert set(timings) == {result["rounds"]}


@pytest.mark.slow
def test_no_head_of_attention_alone_falls_back(rehearsed: tuple[Path, str]) -> None:
    found = [record["result"] for record in records(rehearsed[0]).values() if record["kind"] == "attention"]
    assert all(result["exact_heads"]["landmarks, calibrating"] == 0 for result in found)
    assert all(set(result["exact_heads"]) <= set(result["variants"]) for result in found)


def test_the_fastest_exact_is_a_backend_with_a_name() -> None:
    seconds = {"exact, flash": 2.0, "exact, efficient": 1.0, "exact, as torch chooses": 0.5, "keys": 0.25}
    assert fastest_exact(Timings("exact, flash", (seconds,))) == "exact, efficient"
    assert fastest_exact(Timings("keys", ({"exact, as torch chooses": 1.0, "keys": 2.0},))) == "exact, as torch chooses"


@pytest.mark.slow
def test_coasting_launches_less_than_calibrating(rehearsed: tuple[Path, str]) -> None:
    result = records(rehearsed[0])["middle-256"]["result"]
    assert {"calibrating, compiled", "coasting, compiled"} <= set(result["variants"])
    parts = result["parts"]
    assert 0 < parts["middle step, coasting"]["number"] < parts["middle step, calibrating"]["number"]
    assert parts["coasting"]["number"] < parts["calibrating"]["number"]


@pytest.mark.slow
def test_the_table_has_a_section_for_every_kind(rehearsed: tuple[Path, str]) -> None:
    text = (rehearsed[0] / TABLE).read_text()
    assert "rehearsal" in text
    for title in ("Attention alone", "Whole steps", "Thresholds", "The middle step", "Calls of landmarks, compiled"):
        assert f"## {title}" in text
    widths = {line.count("|") for line in text.partition("## Whole steps")[2].partition("##")[0].splitlines() if line}
    assert len(widths - {0}) == 1
    assert "Not measured" not in text


def test_landmarks_that_are_faster_nowhere_stand_in_the_table() -> None:
    ratios = {"1024": {"16": 0.5, "64": 1.25}, "256": {"16": 1.5}, "4096": {"16": 0.25, "64": 1.5}}
    record = {"kind": "thresholds", "result": {"complete": True, "thresholds": {"16": 1024}, "time_ratios": ratios}}
    machine = describe_machine(CPU)
    text = markdown({"machine": machine, "tiny": False, "dtype": "float32"}, [record])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [["16", "1,024", "0.25 at 4,096"], ["64", "not up to 4,096", "1.50 at 4,096"]]


@pytest.mark.slow
def test_the_next_call_measures_nothing_again(rehearsed: tuple[Path, str]) -> None:
    out, _ = rehearsed
    before = {path: path.stat().st_mtime_ns for path in (out / "items").glob("*.json")}
    result = rehearse(out)
    assert result.exit_code == 0
    assert " ..." not in result.output
    assert before == {path: path.stat().st_mtime_ns for path in (out / "items").glob("*.json")}


@pytest.mark.slow
def test_results_of_another_precision_are_not_mixed(rehearsed: tuple[Path, str]) -> None:
    command = ["--out", str(rehearsed[0]), "--tiny", "--device", "cpu", "--dtype", "bfloat16"]
    app = typer.Typer()
    app.command()(gpu_day.main)
    assert CliRunner().invoke(app, command).exit_code == 2


class Asked:
    """Items that count how often they were measured."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def item(self, name: str, result: Any, minutes: float = 0.1) -> Item:
        def measure(deadline: float) -> dict[str, Any]:
            self.names.append(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return Item(name, "other", name, minutes, measure)


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def day_of(tmp_path: Path) -> Callable[..., Day]:
    return lambda *items: Day(Setting(CPU, torch.float32, tmp_path), items)


def run(day: Day, minutes: float = 9, **options: Any) -> bool:
    return day.run(minutes, say=lambda line: None, **options)


def test_what_fails_is_recorded_and_only_tried_again_when_asked(asked: Asked, day_of: Callable[..., Day]) -> None:
    items = [
        asked.item("fails", RuntimeError("no kernel")),
        asked.item("large", torch.OutOfMemoryError("too large")),
        asked.item("large on a CPU", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
        asked.item("fine", {"complete": True}),
    ]
    day = day_of(*items)
    assert run(day)
    assert [day.status(item) for item in items] == [FAILED, OUT_OF_MEMORY, OUT_OF_MEMORY, DONE]
    table = (day.setting.out / TABLE).read_text()
    assert "RuntimeError: no kernel" in table
    assert "OutOfMemoryError: too large" in table
    assert len(asked.names) == 4
    assert run(day_of(*items))
    assert len(asked.names) == 4
    run(day_of(*items), retry=True)
    assert asked.names[4:] == ["fails", "large", "large on a CPU"]


def test_one_item_is_measured_and_none_begun_that_does_not_fit(asked: Asked, day_of: Callable[..., Day]) -> None:
    items = [asked.item("a", {"complete": True}, 20), asked.item("b", {"complete": True}, 20)]
    items.append(asked.item("short", {"complete": True}, 1e-9))
    assert not run(day_of(*items), minutes=1)
    assert asked.names == ["a", "short"]
    assert run(day_of(*items), minutes=1)
    assert asked.names == ["a", "short", "b"]


def test_an_unfinished_item_is_gone_on_with(asked: Asked, day_of: Callable[..., Day]) -> None:
    item = asked.item("long", {"complete": False})
    assert not run(day_of(item))
    assert day_of(item).status(item) == UNFINISHED
    assert not run(day_of(item))
    assert asked.names == ["long", "long"]


def test_an_item_that_the_user_stops_counts_as_not_begun(asked: Asked, day_of: Callable[..., Day]) -> None:
    item = asked.item("stopped", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(day_of(item))
    assert day_of(item).status(item) == TO_DO


def test_an_item_in_which_the_process_died_is_not_tried_again(asked: Asked, day_of: Callable[..., Day]) -> None:
    item = asked.item("deadly", {"complete": True})
    day = day_of(item)
    path = day.setting.out / "items" / "deadly.json"

    def die(deadline: float) -> dict[str, Any]:
        return json.loads(path.read_text())  # what a process leaves behind that ends here

    run(day_of(Item("deadly", "other", "deadly", 0.1, lambda deadline: {"complete": True, **die(deadline)})))
    path.write_text(json.dumps(json.loads(path.read_text())["result"]))
    again = day_of(item)
    assert again.status(item) == BEGUN
    assert run(again)
    assert asked.names == []
    run(day_of(item), retry=True)
    assert asked.names == ["deadly"]


def test_nothing_else_is_measured_after_an_error_of_the_card(
    asked: Asked, day_of: Callable[..., Day], monkeypatch: pytest.MonkeyPatch
) -> None:
    def release(device: torch.device) -> None:  # so does a card after such an error
        if asked.names[-1] == "breaks":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("day.run._release", release)
    items = [asked.item("breaks", RuntimeError("CUDA error: an illegal memory access was encountered"))]
    items.append(asked.item("next", {"complete": True}))
    assert not run(day_of(*items))
    assert asked.names == ["breaks"]
    assert run(day_of(*items))
    assert asked.names == ["breaks", "next"]


def test_results_of_another_card_are_refused(asked: Asked, day_of: Callable[..., Day]) -> None:
    day = day_of(asked.item("a", {"complete": True}))
    run(day)
    path = day.setting.out / CONDITIONS
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"machine": found["machine"] | {"gpu": "another"}}))
    with pytest.raises(ValueError, match=r"gpu \('another', now None\).*choose another --out"):
        day_of(asked.item("a", {"complete": True}))

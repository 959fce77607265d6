"""Runs that measure speed and quality: limits, contents, files, which can be compared, damaged files."""

import csv
import io
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import web

import diffattn.app.jobs.worker as worker_module
from diffattn.app.jobs import JobProgress, Limits, Measurement, QualityRun, Stopped, Worker
from diffattn.app.jobs.kept import MOST, keep, not_kept, runs_to_show
from diffattn.app.jobs.quality_run import (
    REFERENCE_FILE,
    RUNS_FILE,
    comparable,
    read_runs,
    runs_as_csv,
    save_runs,
    why_apart,
)
from diffattn.drawing.loading import embedded_models
from diffattn.evaluation.quality import compare
from diffattn.metrics.extractors import load_extractor
from diffattn.metrics.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return web.tiny_worker(web.save_models(tmp_path_factory.mktemp("quality") / "models", side=64))


def ask(worker: Worker, models: Any = ("one",), **changes: Any) -> Measurement:
    given: dict[str, Any] = dict(accelerations=["agent/fast"], numbers="4", samples=8, steps=1, prompts="a\n\n b ",
                                 extractor="emoji-classifier")  # fmt: skip
    return worker.limits.measurement(list(models), **(given | changes))


def measured(worker: Worker, asked: Measurement) -> list[QualityRun]:
    return [event for event in worker.measure("a", asked) if isinstance(event, QualityRun)]


@pytest.fixture(scope="module")
def run(worker: Worker) -> QualityRun:
    return measured(worker, ask(worker))[0]


def test_a_run_has_times_scores_and_their_protocol(run: QualityRun) -> None:
    assert [line.acceleration for line in run.lines] == ["none", "agent/fast", "agent n=4"]
    exact, fast, four = run.lines
    assert exact.speedup == 1
    assert all(line.seconds.q25 <= line.seconds.median <= line.seconds.q75 for line in run.lines)
    assert None not in (exact.gflops, fast.gflops, four.gflops)
    assert exact.gflops > max(fast.gflops, four.gflops)  # type: ignore[operator,type-var]
    protocol = exact.quality.protocol
    assert (protocol.num_pictures, protocol.steps, protocol.seeds) == (8, 1, "0..7")
    assert protocol.reference == "exact pictures of one, seeds 8..15"
    assert run.prompts == ("a", "b")
    assert set(compare(exact.quality, fast.quality)) >= {"fid", "kid"}
    assert exact.quality.scores != fast.quality.scores


def test_the_same_seeds_give_the_same_scores(worker: Worker, run: QualityRun) -> None:
    again = measured(worker, ask(worker, numbers=""))[0]
    for line, same in zip(again.lines, run.lines, strict=False):
        assert line.quality.scores == pytest.approx(same.quality.scores)
    assert len(comparable([run, again], by_time=True)) == 1


def test_a_stored_reference_and_stored_prompts_are_used(tmp_path: Path, run: QualityRun) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models"))
    place = tmp_path / "models" / "one"
    save_runs([run], place / RUNS_FILE)
    pictures = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Reference.of("noise", [pictures], load_extractor("emoji-classifier")).save(place / REFERENCE_FILE)
    shipped = embedded_models()  # each has a run of its own
    assert [stored.title for stored in worker.stored_runs()][len(shipped) :] == [run.title]
    found = measured(worker, ask(worker, numbers="", prompts="", extractor="automatic"))[0]
    assert found.prompts == run.prompts
    assert found.lines[0].quality.protocol.reference == "noise"
    assert len(comparable([run, found], by_time=False)) == 2
    assert "reference" in why_apart(found, run)
    (place / RUNS_FILE).write_text("{")
    assert [stored.model for stored in worker.stored_runs()] == shipped


def test_a_model_without_prompts_says_what_to_do(worker: Worker) -> None:
    with pytest.raises(ValueError, match="enter prompts"):
        measured(worker, ask(worker, prompts=""))


def test_classes_and_numbers_of_mediators(tmp_path: Path) -> None:
    worker = web.tiny_worker(web.save_sits(tmp_path / "models", "sit"))
    asked = ask(worker, ["sit"], prompts="", accelerations=["mediator/fast"], extractor="cifar-classifier")
    run = measured(worker, asked)[0]
    assert [line.acceleration for line in run.lines] == ["none", "mediator/fast", "mediator n=4"]
    assert run.prompts[:2] == ("0", "1")


def test_models_are_measured_one_at_a_time_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = web.tiny_worker(web.save_sits(tmp_path / "models", "one", "two"))
    seen, alive, load = list[weakref.ref[Any]](), list[int](), worker_module.load_pipeline

    def load_and_count(*args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        pipe: Any = load(*args)
        seen.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(worker_module, "load_pipeline", load_and_count)
    measured(
        worker,
        ask(
            worker,
            ["one", "two"],
            prompts="1",
            accelerations=["mediator/fast"],
            numbers="",
            extractor="cifar-classifier",
        ),
    )
    assert alive == [0, 0, 0]  # the second is looked at before the first is measured


def test_what_is_timed_makes_no_previews(worker: Worker) -> None:
    list(worker.generate("a", web.ask(worker)))
    assert worker._loaded is not None
    assert worker._loaded[2] is not None
    events = list(worker.measure("a", ask(worker, numbers="")))
    told = [event for event in events if isinstance(event, JobProgress) and event.step]
    assert told
    assert all(event.preview is None for event in told)


def test_stop_drops_the_run_and_leaves_the_model_clean(worker: Worker) -> None:
    def stop_soon() -> None:
        for event in worker.measure("a", ask(worker, samples=8, steps=50)):
            if isinstance(event, JobProgress) and event.step:
                worker.stop("a")

    with pytest.raises(Stopped):
        stop_soon()
    assert worker._loaded is not None
    unet = worker._loaded[1].unet
    assert not unet._forward_pre_hooks
    assert not any(type(p).__module__.startswith("diffattn") for p in unet.attn_processors.values())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"models": []}, "choose one or more models"), ({"models": "one"}, "models must be a list"),
        ({"models": [3]}, "models must be a list"), ({"models": list("abc")}, "at most 2 models"),
        ({"accelerations": ["x"]}, "unknown acceleration"), ({"accelerations": [], "numbers": ""}, "choose 1 to 8"),
        ({"numbers": "1,2,3,4,5,6,7,8,9"}, "choose 1 to 8"), ({"numbers": "4; rm"}, "numbers must be whole numbers"),
        ({"numbers": "0"}, "from 1 to 65536"), ({"numbers": 4}, "numbers must be whole numbers"),
        ({"samples": 7}, "from 8 to 256"), ({"samples": 10**9}, "from 8 to 256"), ({"samples": math.nan}, "pictures"),
        ({"steps": 0}, "steps"), ({"guidance": math.inf}, "guidance"), ({"seed": 2**63}, "seed"),
        ({"prompts": 3}, "prompts must be text"), ({"prompts": "x" * 101}, "at most 100 characters"),
        ({"extractor": "../x"}, "extractor must be one of"), ({"against": "x"}, "against must be one of"),
    ],
    ids=str,
)  # fmt: skip
def test_hostile_measurements_are_refused(worker: Worker, bad: dict[str, Any], says: str) -> None:
    given = {"models": ["one"], "accelerations": ["agent/fast"]} | bad
    with pytest.raises(ValueError, match=says):
        worker.limits.measurement(given.pop("models"), **given)


def test_files_hold_the_runs_as_they_were(run: QualityRun, tmp_path: Path) -> None:
    save_runs([run], tmp_path / "runs.json")
    assert read_runs(tmp_path / "runs.json") == [run]
    rows = list(csv.DictReader(io.StringIO(runs_as_csv([run, replace(run, title="=1+1")]))))
    assert [row["acceleration"] for row in rows[:3]] == ["none", "agent/fast", "agent n=4"]
    assert float(rows[1]["fid"]) == run.lines[1].quality.scores["fid"]
    assert json.loads(rows[0]["protocol"])["num_pictures"] == 8
    assert rows[3]["run"] == "'=1+1"  # no formula


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other"), lambda d: d.update(runs={}), lambda d: d.update(runs=[3]),
        lambda d: d["runs"][0].pop("machine"), lambda d: d["runs"][0].update(lines=[]),
        lambda d: d["runs"][0]["lines"][0].update(seconds=None),
        lambda d: d["runs"][0]["lines"][0].update(speedup=math.nan),
        lambda d: d["runs"][0]["lines"][0].update(speedup=10**400),
        lambda d: d["runs"][0]["lines"][0].update(gflops=10**13),
        lambda d: d["runs"][0]["lines"][0]["seconds"].update(median=True),
        lambda d: d["runs"][0]["lines"][0]["quality"]["scores"].update(fid=1.7e308),
        lambda d: d["runs"][0]["lines"][0]["quality"]["scores"].update(kid=-1.7e308),
        lambda d: d["runs"][0]["lines"][0]["quality"]["protocol"].update(options=nested(100)),
        lambda d: d["runs"][0]["lines"][0]["quality"]["scores"].update(fid=math.inf),
        lambda d: d["runs"][0]["lines"][0]["quality"]["scores"].pop("kid"),
        lambda d: d["runs"][0]["lines"][0]["quality"]["protocol"].pop("steps"),
        lambda d: d.update(runs=d["runs"] * 101),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_in_words(run: QualityRun, tmp_path: Path, change: Any) -> None:
    save_runs([run], tmp_path / "runs.json")
    data = json.loads((tmp_path / "runs.json").read_text())
    change(data)
    (tmp_path / "runs.json").write_text(json.dumps(data))
    with pytest.raises(ValueError) as refused:  # noqa: PT011, each says something else
        read_runs(tmp_path / "runs.json")
    assert str(tmp_path) not in str(refused.value)


def test_a_figure_that_no_float_holds_is_refused(run: QualityRun) -> None:
    data = run.to_dict()
    data["lines"][0]["speedup"] = 10**400
    with pytest.raises(ValueError, match=r"a figure must be a number of at most 1e\+12, got 1000"):
        QualityRun.from_dict(data)


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def test_other_protocols_and_machines_stand_apart(run: QualityRun) -> None:
    lines = tuple(
        replace(x, quality=replace(x.quality, protocol=replace(x.quality.protocol, steps=9))) for x in run.lines
    )
    other = replace(run, title="other", lines=lines)
    faster = replace(run, title="faster", machine={**run.machine, "cpu": "another"})
    assert comparable([run, other, faster], by_time=True) == [[run], [other], [faster]]
    assert comparable([run, other, faster], by_time=False) == [[run, faster], [other]]
    assert why_apart(run, other) == "steps"
    assert why_apart(run, faster) == "machine"


def test_own_runs_are_kept_up_to_a_number(run: QualityRun) -> None:
    kept: list[dict[str, Any]] = []
    for i in range(MOST + 3):
        kept = keep(kept, [replace(run, title=str(i))])
    assert [one["title"] for one in kept] == [str(i) for i in range(3, MOST + 3)]
    assert keep(kept, [replace(run, title="5")])[-1]["title"] == "5"
    twice = [replace(run, title="new"), replace(run, title="new", model="other")]
    assert [one["title"] for one in keep(kept, twice)][-2:] == [str(MOST + 2), "new"]
    assert keep(kept, twice)[-1]["model"] == "other"
    assert (not_kept(kept, twice), not_kept(kept[2:], twice)) == (1, 0)
    shown = runs_to_show([run], [*kept[:1], run.to_dict()])
    assert [one.title for one in shown] == ["3", run.title]


def test_the_limits_show_the_largest_number_of_pictures() -> None:
    assert Limits(samples=9).measurement(["x"], accelerations=["agent/fast"], samples=9).samples == 9

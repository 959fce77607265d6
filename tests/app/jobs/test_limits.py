"""Limits of a job that depend on the model, what may be downloaded, and estimates of durations."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from support import web
from support.tiny_dit import tiny_dit

from diffattn.app.jobs import Drawn, JobProgress, Limits, Measurement, Models, Worker
from diffattn.app.jobs.estimates import Estimates
from diffattn.app.jobs.pace import Pace
from diffattn.app.jobs.quality_run import REFERENCE_FILE
from diffattn.app.jobs.speed_quality import extractor_for
from diffattn.app.jobs.suited import suited_to_all
from diffattn.drawing.request import UNPATCHED, Request
from diffattn.metrics.extractors import load_extractor
from diffattn.metrics.reference import Reference
from diffattn.sampling import SiTPipeline

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing

OFFLINE = ["cifar-classifier", "emoji-classifier"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 32x32 pixels; "group/two" has a reference."""
    folder = web.save_models(tmp_path_factory.mktemp("limits") / "models")
    reference().save(folder / "group" / "two" / REFERENCE_FILE)
    return folder


def reference() -> Reference:
    pictures = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Reference.of("noise", [pictures], load_extractor("emoji-classifier"))


def measurement(worker: Worker, model: str = "one", **changes: Any) -> Measurement:
    given = dict(accelerations=["agent/fast"], samples=8, steps=1, prompts="a", extractor="emoji-classifier")
    return worker.limits.measurement([model], **(given | changes))


JOBS: dict[str, Callable[[Worker, Request], Any]] = {
    "generate": lambda worker, request: worker.generate("a", request),
    "compare": lambda worker, request: worker.compare("a", request, ["agent/fast"]),
    "measure": lambda worker, request: worker.measure("a", measurement(worker)),
}


# The size of a model's own


@pytest.mark.parametrize("job", JOBS)
def test_a_models_own_size_is_held_against_the_limit(folder: Path, job: str) -> None:
    worker = Worker(Models(folder), Limits(side=16), "cpu")
    with pytest.raises(ValueError, match="width 32 is above the limit of 16 pixels; give a smaller width"):
        list(JOBS[job](worker, web.ask(worker)))
    hooks = web.traces_of_patching(web.loaded(worker))
    assert hooks[:2] == (0, 0)
    assert not any(name.startswith("diffattn") for name in hooks[2].values())


def test_a_size_that_is_half_the_models_own_is_checked_too(folder: Path) -> None:
    worker = Worker(Models(folder), Limits(side=16), "cpu")
    with pytest.raises(ValueError, match="height 32 is above the limit of 16"):
        list(worker.generate("a", web.ask(worker, width=16)))
    assert isinstance(list(worker.generate("a", web.ask(worker, width=16, height=16)))[-1], Drawn)
    with pytest.raises(ValueError, match="width 32 is above"):  # before the job
        worker.estimates.seconds_for(web.ask(worker))
    assert worker.estimates.seconds_for(web.ask(worker, model="owner/name")) is None  # nobody knows its size yet


# All steps of a job


def test_the_work_of_a_job_has_an_end(folder: Path) -> None:
    worker = Worker(Models(folder), Limits(calls=100), "cpu")
    asked = worker.limits.request("one", "", steps=50, num_images=2)
    with pytest.raises(ValueError, match="2 pictures of 51 steps are 102 steps in all, but at most 100 are allowed"):
        worker.limits.request("one", "", steps=51, num_images=2)
    with pytest.raises(ValueError, match="4 pictures of 50 steps"):
        worker.compare("a", asked, ["agent/fast"])
    with pytest.raises(ValueError, match="4 pictures of 50 steps"):
        worker.estimates.seconds_for(asked, 4)
    assert measurement(worker, steps=4).num_variants == 2  # and a reference: 3 times 8 pictures
    with pytest.raises(ValueError, match="24 pictures of 5 steps"):
        measurement(worker, steps=5)


def test_the_largest_measurement_of_the_default_limits_is_refused() -> None:
    limits, ways = Limits(), [f"agent/{preset}" for preset in ("balanced", "fast")]
    with pytest.raises(ValueError, match="at most 25000"):
        limits.measurement(["a", "b"], accelerations=ways, numbers="1,2,3,4,5,6", samples=256, steps=100)
    assert limits.measurement(["a"], accelerations=ways, samples=256, steps=20).samples == 256


# What may be downloaded


def test_without_the_hub_only_extractors_that_come_with_the_package_are_used(folder: Path) -> None:
    worker = Worker(Models(folder, hub=False), device="cpu")
    assert worker.models.extractors() == OFFLINE
    for chosen in ("dinov2", "clip", "inception", "automatic"):
        named = "dinov2" if chosen == "automatic" else chosen
        for refuse in (worker.estimates.seconds_to_measure, lambda asked: list(worker.measure("a", asked))):
            with pytest.raises(ValueError, match=f"{named}' would be downloaded.*choose one of {', '.join(OFFLINE)}"):
                refuse(measurement(worker, extractor=chosen))
    assert worker._loaded is None


def test_automatic_is_the_extractor_of_the_stored_reference_if_it_may_be(folder: Path, tmp_path: Path) -> None:
    offline, online = Models(folder, hub=False), Models(folder)
    assert online.extractors() == [*OFFLINE, "inception", "dinov2", "clip"]
    assert extractor_for("one", "automatic", online) == "dinov2"
    assert extractor_for("group/two", "automatic", offline) == "emoji-classifier"
    models = Models(web.save_sits(tmp_path / "models", "sit"), hub=False)
    replace(reference(), extractor="clip").save(tmp_path / "models" / "sit" / REFERENCE_FILE)
    with pytest.raises(ValueError, match="'clip' would be downloaded"):
        extractor_for("sit", "automatic", models)
    assert extractor_for("sit", "cifar-classifier", models) == "cifar-classifier"
    (tmp_path / "models" / "sit" / REFERENCE_FILE).write_text("x")
    with pytest.raises(ValueError, match=f"'sit/{REFERENCE_FILE}' is not a reference") as refused:
        extractor_for("sit", "automatic", models)
    assert str(tmp_path) not in str(refused.value)


# How long it takes


@pytest.mark.parametrize("job", JOBS)
def test_every_job_that_draws_teaches_the_pace(folder: Path, job: str) -> None:
    worker = web.tiny_worker(folder)
    assert worker.estimates.seconds_for(web.ask(worker)) is None
    list(JOBS[job](worker, web.ask(worker)))
    assert worker.estimates.seconds_for(web.ask(worker)) is not None
    assert worker.estimates.seconds_for(web.ask(worker, model="group/two")) is None


def test_the_pace_is_that_of_the_way_and_the_size_and_exact_until_the_way_is_known() -> None:
    pace, exact = Pace(), Request("m", "", method=UNPATCHED, steps=20, width=256, height=256)
    assert pace.seconds(exact, 256, 256) is None
    pace.learn(exact, seconds=5.0, calls=[1.0, *[0.2] * 19])  # the first call waits for the text encoder
    assert pace.seconds(exact, 256, 256) == pytest.approx(5)
    assert pace.seconds(replace(exact, steps=40), 256, 256) == pytest.approx(9)
    assert pace.seconds(replace(exact, steps=2), 256, 256) == pytest.approx(1.4)
    fast = replace(exact, method="agent", preset="fast")
    assert pace.seconds(fast, 256, 256) == pytest.approx(5)
    pace.learn(fast, seconds=3.0, calls=[0.1] * 20)
    assert pace.seconds(fast, 256, 256) == pytest.approx(3)
    assert pace.seconds(replace(fast, preset="balanced"), 256, 256) == pytest.approx(5)
    assert pace.seconds(exact, 512, 256) is None  # it grows faster than the pixels: nothing is promised
    assert pace.seconds(replace(exact, model="other"), 256, 256) is None


def drawn(pace: Pace, side: int, power: float, cold: float = 1.0) -> float:
    """Teach a picture of 20 steps; the time of a step grows with this power of the pixels, the VAE's with the pixels.

    Returns:
        Its seconds without the `cold` ones of the first call, which waits for the text encoder.
    """
    pixels = (side / 256) ** 2
    step, fixed = 0.25 * pixels**power, 0.4 * pixels
    request = Request("m", "", method=UNPATCHED, steps=20, width=side, height=side)
    pace.learn(request, cold + 20 * step + fixed, [cold + step, *[step] * 19])
    return 20 * step + fixed


@pytest.mark.parametrize("power", [1.0, 1.3, 1.9])
@pytest.mark.parametrize(("known", "asked"), [((256, 512), 384), ((256, 384), 512), ((384, 512), 256)])
def test_a_size_that_was_not_drawn_is_scaled_by_the_growth_between_two_that_were(
    power: float, known: tuple[int, int], asked: int
) -> None:
    pace, exact = Pace(), Request("m", "", method=UNPATCHED, steps=20)
    for side in known:
        drawn(pace, side, power)
    expected = drawn(Pace(), asked, power)
    assert pace.seconds(exact, asked, asked) == pytest.approx(expected, rel=0.3)
    for far in (32, 4096):
        assert pace.seconds(exact, far, far) is None  # nothing is promised so far from what was drawn


def test_without_a_cold_start_the_law_comes_back() -> None:
    pace, exact = Pace(), Request("m", "", method=UNPATCHED, steps=20)
    for side in (256, 512):
        drawn(pace, side, 1.3, cold=0.0)
    for side, steps in ((384, 20), (640, 20), (512, 50)):
        step = 0.25 * (side / 256) ** 2.6
        found = pace.seconds(replace(exact, steps=steps), side, side)
        assert found == pytest.approx(steps * step + 0.4 * (side / 256) ** 2)


def test_of_two_runs_the_faster_counts_and_of_three_the_middle() -> None:
    pace, exact = Pace(), Request("m", "", method=UNPATCHED, steps=10, width=256, height=256)
    for seconds, expected in ((6.0, 6.0), (2.0, 2.0), (2.2, 2.2), (2.1, 2.1), (9.0, 2.2)):
        pace.learn(exact, seconds, [seconds / 10] * 10)
        assert pace.seconds(exact, 256, 256) == pytest.approx(expected)


def test_a_recipe_has_a_pace_whatever_method_it_names() -> None:
    pace, recipe = Pace(), {"method": "agent", "options": {"num_agents": 4}}
    asked = Request("m", "", recipe=recipe, steps=10, width=256, height=256)
    pace.learn(replace(asked, method="agent"), 3.0, [0.3] * 10)  # as `prepare` fills it in
    assert pace.seconds(asked, 256, 256) == pytest.approx(3)


def test_what_the_files_do_not_tell_is_known_once_a_model_was_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "models" / "one")
    worker = web.tiny_worker(tmp_path / "models")
    list(worker.generate("a", web.ask(worker, acceleration="automatic")))
    for part in ("unet", "vae"):  # as on the hub, where nothing is read beforehand
        shutil.rmtree(tmp_path / "models" / "one" / part)
    assert worker.models.describe("one").size is None
    assert worker.estimates.seconds_for(web.ask(worker, acceleration="automatic")) is not None


def test_two_steps_of_a_warm_up_teach_nothing(folder: Path) -> None:
    worker = web.tiny_worker(folder)
    worker.warm_up("one")
    assert worker._loaded is not None
    assert worker.estimates.seconds_for(web.ask(worker)) is None


def test_a_size_above_the_limit_has_no_time(folder: Path) -> None:
    worker = web.tiny_worker(folder)
    list(worker.generate("a", web.ask(worker)))
    with pytest.raises(ValueError, match="above the limit of 64 pixels"):
        worker.estimates.seconds_for(replace(web.ask(worker), width=128))
    with pytest.raises(ValueError, match="width 33 is not a positive multiple of 8 pixels"):
        worker.estimates.seconds_for(replace(web.ask(worker), width=33))


def test_accelerations_are_checked_for_every_model_before_one_is_measured(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "models")
    web.save_sits(tmp_path / "models", "sit")
    worker = web.tiny_worker(tmp_path / "models")
    asked = worker.limits.measurement(
        ["one", "sit"], accelerations=["agent/fast"], samples=8, steps=2, prompts="1", extractor="cifar-classifier"
    )
    with pytest.raises(ValueError, match=r"'agent/fast' does not work for model 'sit'; choose from: automatic, none,"):
        list(worker.measure("a", asked))
    assert worker._loaded is None
    for job in (
        lambda: worker.compare("a", web.ask(worker), ["mediator/fast"]),
        lambda: worker.generate("a", web.ask(worker, acceleration="mediator/fast")),
    ):
        with pytest.raises(ValueError, match="'mediator/fast' does not work for model 'one'"):
            list(job())
    assert worker._loaded is None


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"numbers": "5"}, "perfect square"),  # right for the first model, which has agents
        ({"prompts": "a cat"}, "unknown class name 'a cat'"),
        ({"guidance": 9.0}, "guidance"),
    ],
    ids=str,
)
def test_what_one_model_cannot_draw_is_told_before_the_other_is_measured(
    folder: Path, tmp_path: Path, bad: dict[str, Any], says: str
) -> None:
    shutil.copytree(folder, tmp_path / "models")
    unguided = SiTPipeline(tiny_dit(in_channels=3, null_class=False), FlowMatchEulerDiscreteScheduler(shift=1))
    unguided.save_pretrained(tmp_path / "models" / "sit")
    worker = web.tiny_worker(tmp_path / "models")
    given: dict[str, Any] = {"accelerations": ["automatic"], "samples": 8, "steps": 1, "prompts": "1"} | bad
    asked = worker.limits.measurement(["one", "sit"], extractor="cifar-classifier", **given)
    events = []
    with pytest.raises(ValueError, match=says):
        events.extend(worker.measure("a", asked))
    assert not any(event.step for event in events if isinstance(event, JobProgress))


def test_automatic_is_another_method_in_each_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "models")
    web.save_sits(tmp_path / "models", "sit")
    worker = web.tiny_worker(tmp_path / "models")
    assert suited_to_all(worker.models.place(name) for name in ("one", "sit")) == ["automatic", "none"]
    found: Any = list(worker.compare("a", web.ask(worker, model="sit", prompt="1"), ["automatic"]))[-1]
    assert found.variants[1].name == "automatic"
    assert found.variants[1].report.method == "mediator"


def test_the_pace_is_that_of_steps_whatever_calls_they_take(folder: Path) -> None:
    worker = web.tiny_worker(folder)
    list(worker.generate("a", web.ask(worker)))
    pipe = web.loaded(worker)
    worker.estimates = Estimates(worker.models, worker.limits)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    drawn: Any = list(worker.generate("a", web.ask(worker, steps=6)))[-1]
    assert len(drawn.trace.seconds) == 11
    assert worker.estimates.seconds_for(web.ask(worker, steps=6)) == pytest.approx(drawn.pictures[0].seconds)


def test_a_stored_reference_shortens_the_estimate_only_where_it_is_used(folder: Path) -> None:
    worker = web.tiny_worker(folder)
    list(worker.generate("a", web.ask(worker, model="group/two")))

    def pictures(**changes: Any) -> float:
        asked = measurement(worker, "group/two", **changes)
        one, all_of_it = (
            worker.estimates.seconds_for(Request("group/two", "", steps=1)),
            worker.estimates.seconds_to_measure(asked),
        )
        assert one is not None
        assert all_of_it is not None
        return all_of_it / one

    warm = 2  # pictures of one step, one for each way
    assert pictures() == pytest.approx(16 + warm)
    assert pictures(extractor="automatic") == pytest.approx(16 + warm)
    assert pictures(extractor="cifar-classifier") == pytest.approx(24 + warm)
    assert pictures(against="exact") == pytest.approx(24 + warm)

"""Decisions by timing are stored with an evaluation, and a resumed run follows them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import tiny
from support.clock import Clock, clock

import diffattn
from diffattn.evaluation.draw_set import DrawConfig, draw_set, following
from diffattn.evaluation.run_folder import DECISIONS, Processes, RunFolder
from diffattn.preflight import preflight

__all__ = ["clock"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # where nothing is faster


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    found = tiny.pipeline("sd", tmp_path / "tokenizer")
    found.set_progress_bar_config(disable=True)
    return found


def drawn(pipe: Any, folder: Path, given: Any, pictures: int) -> list[bytes]:
    run = RunFolder(folder, {"pictures": "same"}, Processes())
    config = DrawConfig(prompts=["a cat"], num_pictures=pictures, batch=2, steps=2, width=16, height=16)
    draw_set(pipe, config, run, given)
    return [path.read_bytes() for path in sorted(folder.glob("pictures/*.png"))]


@pytest.mark.slow
@pytest.mark.parametrize("own_patch", [False, True])
def test_a_resumed_run_decides_as_before(
    pipe: Any, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, own_patch: bool
) -> None:
    monkeypatch.setenv("DIFFATTN_CALIBRATE", str(tmp_path / "one.json"))
    given = {"num_agents": 4, "agent_ratio": None}

    def draw(folder: str, pictures: int) -> list[bytes]:
        if not own_patch:
            return drawn(pipe, tmp_path / folder, given, pictures)
        with diffattn.patch(pipe, **given):
            return drawn(pipe, tmp_path / folder, None, pictures)

    whole = draw("whole", 6)
    draw("resumed", 2)
    made = json.loads((tmp_path / "resumed" / DECISIONS).read_text())
    assert set(made.values()) == {0.4}  # half the time of exact attention leaves this share of it
    clock.method = 10.0
    monkeypatch.setenv("DIFFATTN_CALIBRATE", str(tmp_path / "two.json"))  # as on another day
    assert draw("resumed", 6) == whole
    assert draw("another", 6) != whole


def test_a_pipeline_that_cannot_be_patched_decides_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {}, Processes())
    with following(DiffusionPipeline(), run):
        pass
    assert run.decisions() == {}


@pytest.mark.slow
def test_a_picture_is_drawn_again_from_its_record(pipe: Any, tmp_path: Path, clock: Clock) -> None:
    from diffattn.drawing.draw import generate, prepare
    from diffattn.drawing.request import Request, request_of

    def draw(request: Request) -> Any:
        ready, patch = prepare(pipe, request)
        (picture,) = generate(pipe, ready)
        if patch is not None:
            patch.remove()
        return picture

    with pytest.MonkeyPatch.context() as context:
        context.setenv("DIFFATTN_CALIBRATE", str(tmp_path / "decisions.json"))
        options = {"num_agents": 4, "agent_ratio": None}
        first = draw(Request("tiny", "a cat", options=options, steps=2, width=16, height=16))
    assert set(first.record["decisions"].values()) == {0.4}
    record = json.loads(json.dumps(dict(first.record)))
    again = draw(request_of(record))
    assert again.image.tobytes() == first.image.tobytes()
    assert again.record["decisions"] == record["decisions"]
    exact = draw(Request("tiny", "a cat", method="none", steps=2, width=16, height=16))
    assert exact.record["decisions"] is None
    assert exact.image.tobytes() != first.image.tobytes()
    with pytest.raises(ValueError, match="method 'none' has no decisions"):
        Request("tiny", "a cat", method="none", decisions={"kind": True})


@pytest.mark.slow
def test_the_preflight_follows_what_it_finds(
    pipe: Any, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = pipe.unet
    size = (32, 32)  # latents: enough tokens for the number of agents that presets use
    torch.manual_seed(0)
    why = {layer.name: layer.why_exact for layer in preflight(unet, *size, rounds=1).layers}
    assert all(why.values()) is False or clock.calls == 0
    monkeypatch.setenv("DIFFATTN_CALIBRATE", str(tmp_path / "decisions.json"))
    clock.method = 10.0
    found = preflight(unet, *size, rounds=1)
    assert clock.calls > 0
    assert all(layer.why_exact for layer in found.layers)
    assert found.time_ratio is None

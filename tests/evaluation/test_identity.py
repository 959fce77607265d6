"""What must match for a run to be resumed, and for two results to be compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from support import tiny, web

import diffattn
from diffattn.evaluation import DrawConfig, EvaluateConfig, evaluate
from diffattn.evaluation.identity import _value, describe_patch, device_label
from diffattn.evaluation.quality import QualityResult, compare
from diffattn.methods.agent import AgentAttention
from diffattn.metrics.adm import write_pictures
from diffattn.sampling import SiTPipeline

DRAW = DrawConfig(num_pictures=2, steps=2, guidance=1.0, batch=2)
FEW = {"num_agents": 4, "agent_ratio": None, "max_head_error": 10.0, "min_tokens": 0}


@pytest.fixture(scope="module")
def sit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return web.save_sits(tmp_path_factory.mktemp("identity"), "sit") / "sit"


@pytest.fixture
def pipe(sit: Path) -> SiTPipeline:
    found = SiTPipeline.from_pretrained(sit)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two pictures to compare with: no extractor is needed."""
    generator = torch.Generator().manual_seed(0)
    write_pictures(tmp_path / "pair.npz", torch.randint(256, (2, 3, 16, 16), generator=generator).to(torch.uint8))
    return tmp_path / "pair.npz"


def run(pipe: Any, folder: Path, pair: Path, **changes: Any) -> QualityResult:
    options: dict[str, Any] = {"draw": DRAW} | changes
    return evaluate(pipe, folder=folder, paired=pair, config=EvaluateConfig(), **options)


@pytest.mark.parametrize(
    "other",
    [
        {"schedule": {0.5: {"num_mediators": 4}, 0.0: {"num_mediators": 16}}},
        {"schedule": {0.7: {"num_mediators": 4}, 0.0: {"num_mediators": 64}}},
        {"schedule": {"kind": "latent_change", "entries": [{"num_mediators": 4}, "exact"], "thresholds": [0.5]}},
        {"schedule": {0.5: {"num_mediators": 4}, 0.0: {"num_mediators": 64}}, "layers": ["blocks.1.attn"]},
        {"recipe": {"method": "mediator", "options": {"num_mediators": 4}}},
    ],
    ids=["options of a phase", "a bound", "kind of schedule", "layers", "recipe"],
)
def test_a_patched_pipeline_goes_on_under_the_same_patch_only(
    pipe: SiTPipeline, tmp_path: Path, pair: Path, other: dict[str, Any]
) -> None:
    first = {"schedule": {0.5: {"num_mediators": 4}, 0.0: {"num_mediators": 64}}}
    with diffattn.patch(pipe, "mediator", **first):  # type: ignore[arg-type]
        drawn = run(pipe, tmp_path / "run", pair)
    with diffattn.patch(pipe, "mediator", **other), pytest.raises(ValueError, match="another protocol: acceleration"):
        run(pipe, tmp_path / "run", pair)
    again = run(pipe, tmp_path / "run", pair, acceleration={"method": "mediator", **first})  # it comes to the same
    assert again.scores == pytest.approx(drawn.scores, rel=1e-6)


def test_schedules_and_predicates_given_as_objects_are_told_by_what_they_say(
    pipe: SiTPipeline, tmp_path: Path, pair: Path
) -> None:
    def given(threshold: float, layer: str) -> dict[str, Any]:
        entries = [{"num_mediators": 4}, {"num_mediators": 64}]
        schedule = diffattn.LatentChangeSchedule(entries, [threshold])  # type: ignore[attr-defined]
        return {"method": "mediator", "schedule": schedule, "layers": lambda spec: spec.name == layer}

    first = run(pipe, tmp_path / "run", pair, acceleration=given(0.5, "blocks.0.attn"))
    assert run(pipe, tmp_path / "run", pair, acceleration=given(0.5, "blocks.0.attn")) == first
    for threshold, layer in ((0.6, "blocks.0.attn"), (0.5, "blocks.1.attn")):
        with pytest.raises(ValueError, match="another protocol: acceleration"):
            run(pipe, tmp_path / "run", pair, acceleration=given(threshold, layer))


def test_a_number_of_mediators_that_was_set_by_hand_is_another_run(
    pipe: SiTPipeline, tmp_path: Path, pair: Path
) -> None:
    run(pipe, tmp_path / "run", pair)
    pipe.transformer.set_num_mediators(4)
    with pytest.raises(ValueError, match="another protocol: num_mediators: 64, now 4"):
        run(pipe, tmp_path / "run", pair)


def test_every_network_counts_not_the_denoiser_alone(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd", tmp_path)
    draw = DrawConfig(num_pictures=2, prompts=["cat"], steps=1, batch=2)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    write_pictures(tmp_path / "pair.npz", torch.randint(256, (2, 3, size, size), generator=generator).to(torch.uint8))
    run(pipe, tmp_path / "run", tmp_path / "pair.npz", draw=draw)
    for part in (pipe.vae, pipe.text_encoder):
        weight = next(part.parameters())
        with torch.no_grad():
            weight.add_(1e-3)
        with pytest.raises(ValueError, match="another protocol: weights"):
            run(pipe, tmp_path / "run", tmp_path / "pair.npz", draw=draw)
        with torch.no_grad():
            weight.sub_(1e-3)


def test_the_thresholds_in_force_and_the_defaults_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd", tmp_path)

    def described() -> Any:
        with diffattn.patch(pipe):
            return describe_patch(pipe)

    before = described()
    assert before["methods"]["agent"][0]["damping"] == AgentAttention().damping  # given by nobody
    own = tmp_path / "thresholds.json"
    own.write_text(json.dumps({"devices": {"cpu": {"16": 4}}}))
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(own))
    assert described() != before


def test_further_arguments_of_the_pipeline_are_told_by_their_content() -> None:
    many = torch.zeros(5000)
    other = many.clone()
    other[2500] = 1  # what print leaves out
    picture = Image.new("RGB", (4, 4))
    assert _value(many) == _value(many.clone()) != _value(other)
    assert _value([picture]) == _value([picture.copy()]) != _value([Image.new("RGB", (4, 4), "red")])
    assert _value({"b": 1, "a": None}) == _value({"a": None, "b": 1}) != _value({"a": None, "b": 2})
    assert " at 0x" not in _value(object())


def test_a_tuned_recipe_is_told_layer_by_layer(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd", tmp_path)
    names = [layer.name for layer in diffattn.patch(pipe, **FEW).report().layers if layer.left_alone is None]
    diffattn.unpatch(pipe)

    def described(number: int) -> Any:
        settings = {f"agent-{n}": {"method": "agent", "options": FEW | {"num_agents": n}} for n in (4, 16)}
        layers = {name: {"0.0": "agent-4"} for name in names} | {names[-1]: {"0.0": f"agent-{number}"}}
        recipe = {"diffattn_recipe": 1, "settings": settings, "layers": layers}
        with diffattn.patch(pipe, recipe=recipe):
            return describe_patch(pipe)

    assert described(4) == described(4) != described(16)
    assert describe_patch(pipe) is None


def test_results_of_differently_configured_schedulers_do_not_compare(pipe: Any, tmp_path: Path, pair: Path) -> None:
    one = run(pipe, tmp_path / "one", pair)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1)  # the same as loaded, made by hand
    same = run(pipe, tmp_path / "same", pair)
    assert compare(one, same)["psnr"] == 0
    changes: list[dict[str, Any]] = [{"shift": 3.0}, {"use_karras_sigmas": True}]
    for number, config in enumerate(changes):
        other_scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **config)
        pipe.scheduler = other_scheduler
        other = run(pipe, tmp_path / str(number), pair)
        assert other.protocol.sampler == one.protocol.sampler
        with pytest.raises(ValueError, match=r"protocols differ in options\.scheduler: "):
            compare(one, other)


def test_the_device_of_a_protocol() -> None:
    assert device_label(torch.device("cpu")) == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named() -> None:
    assert device_label(torch.device("cuda")) == f"cuda: {torch.cuda.get_device_name()}"

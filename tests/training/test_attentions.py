"""Training with every attention: two steps, resuming, the plan, and what is refused beforehand."""

from pathlib import Path

import pytest
from support.tiny_training import last, run
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.models import DiT
from diffattn.models.attention import ATTENTION
from diffattn.sampling import SiTPipeline
from diffattn.training.config import TrainConfig
from diffattn.training.plan import TrainPlan, make_plan

ONE_STEP = ["run.steps=2", "run.save_every=1", "run.log_every=1"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
def test_two_steps_with_every_attention(attention: str, pictures: Path, tmp_path: Path) -> None:
    folder = run(pictures, tmp_path, *ONE_STEP, f"model.attention={attention}")
    model = SiTPipeline.from_pretrained(folder).transformer
    assert isinstance(model, DiT)
    assert set(model.attention) == {attention}
    said: list[str] = []
    run(pictures, tmp_path, *ONE_STEP, "run.steps=3", f"model.attention={attention}", said=said)
    assert "resuming at step 2" in said
    assert all(x.isfinite().all() for x in last(tmp_path)[0]["model"].values())


@pytest.mark.slow
def test_a_mixture_in_steps_learns_from_a_teacher(pictures: Path, tmp_path: Path) -> None:
    steps = ["model.steps=[[8,1],[16,1]]", *ONE_STEP]
    teacher = run(pictures, tmp_path / "teacher", *steps, "model.attention=softmax")
    said: list[str] = []
    run(pictures, tmp_path / "student", *steps, "model.attention=[circulant, inline]", f"model.start={teacher}",
        f"objective.distill={teacher}", said=said)  # fmt: skip
    assert any("of the parameters are new" in line for line in said)
    with pytest.raises(ValueError, match="must be as wide as the model's: the same steps"):
        run(pictures, tmp_path / "plain", *ONE_STEP, "model.attention=inline", f"objective.distill={teacher}")


def dry_run(pictures: Path, out: Path, *settings: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["train", "--dry-run", "--data", str(pictures), "--out", str(out), "--device", "cpu", "data.size=8",
              "model.hidden_size=16", "model.num_heads=2", "model.num_layers=2", "model.mediators=[1,4]", *settings]
    )  # fmt: skip
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_dry_run_counts_every_attention(attention: str, pictures: Path, tmp_path: Path) -> None:
    code, text = dry_run(pictures, tmp_path / "run", f"model.attention={attention}")
    assert code == 0
    assert ("1: " if attention == "mediator" else f"{attention}: ") in text
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_memory_of_a_plan_follows_what_is_trained_and_kept() -> None:
    def plan(*settings: str) -> TrainPlan:
        config = TrainConfig.read(
            settings=["model.hidden_size=64", "model.num_layers=6", "model.num_heads=2", *settings]
        )
        shape = {"num_classes": 10, "sample_size": 16, "in_channels": 3, "null_class": True}
        return make_plan(config, config.model_arguments() | shape)

    plain, number = plan(), plan().parameters
    assert plain.weight_gib == pytest.approx(4 * 5 * number / 2**30)
    assert plan("objective.distill=x").weight_gib < 4 * 6 * number / 2**30
    assert plain.weight_gib < plan("objective.distill=x").weight_gib
    assert 4 * 4 * number / 2**30 < plan("optim.name=muon").weight_gib < plain.weight_gib
    frozen = plan("model.freeze_backbone=true")
    assert 4 * 2 * number / 2**30 < frozen.weight_gib < 4 * 3 * number / 2**30
    assert frozen.activation_gib < plain.activation_gib
    assert plan("run.gradient_checkpointing=true").activation_gib < plain.activation_gib / 3
    assert all(found.parameters == number for found in (frozen, plan("optim.name=muon")))


@pytest.mark.parametrize(("settings", "says"), [
    (["model.attention=linear"], "attention must be one of softmax, agent, mediator, inline"),
    (["model.attention=[inline]"], "attention must be one name or one for each of 2 layers, got 1"),
    (["model.attention=focused_linear", "model.attention_options={focused_linear: {power: 0}}"],
     "power must be a finite number of at least 1, got 0"),
    (["model.steps=[[6,1],[16,1]]"], "multiple of 8 channels per head and of 4, got [6, 16]"),
    (["model.steps=[[8,1],[16,3]]"], "add up to num_layers=2, got [1, 3]"),
])  # fmt: skip
def test_bad_settings_are_one_line_and_exit_code_2(
    settings: list[str], says: str, pictures: Path, tmp_path: Path
) -> None:
    code, text = dry_run(pictures, tmp_path, *settings)
    assert code == 2
    assert says in text

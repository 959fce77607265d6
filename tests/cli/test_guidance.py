"""The default guidance belongs to the model: stored when it is trained, and read by everything that draws with it."""

import json
from pathlib import Path

import pytest
import torch
from support.commands import call
from support.tiny_training import TINY, make_pictures
from typer.testing import Result

from diffattn.app.jobs.choices import Models
from diffattn.drawing.loading import load_pipeline
from diffattn.sampling import SiTPipeline


def trained(folder: Path, *settings: str) -> tuple[Path, str]:
    """The pipeline of a finished run, and what the run said."""
    folder.mkdir()
    (folder / "pictures").mkdir()
    pictures = make_pictures(folder / "pictures")
    where = ("--data", pictures, "--out", folder / "run", "--device", "cpu")
    done = call("train", *TINY, "run.steps=2", *settings, *where)
    assert done.exit_code == 0, done.output
    return folder / "run/pipeline", done.stdout


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> tuple[Path, str]:
    return trained(tmp_path_factory.mktemp("guided") / "x", "run.guidance=1.75")


@pytest.fixture(scope="module")
def unguided(tmp_path_factory) -> tuple[Path, str]:
    """Trained without label dropout, so without a null class."""
    sampled = ["objective.label_dropout=0", "run.sample_every=2", "run.sample_steps=1"]
    return trained(tmp_path_factory.mktemp("unguided") / "x", *sampled)


def generated(model: Path, out: Path, *more: object) -> tuple[Result, float | None]:
    """The command's result, and the guidance that it drew with."""
    words = ("--model", model, "--prompt", "dark", "--steps", 2, "--out", out / "a.png", "--json", out / "a.json")
    done = call("generate", *words, "--device", "cpu", *more)
    if done.exit_code:
        return done, None
    return done, json.loads((out / "a.json").read_text())["pictures"][0]["guidance"]


@pytest.mark.slow
def test_the_guidance_of_the_training_is_the_models_own(guided, tmp_path) -> None:
    model, _ = guided
    assert json.loads((model / "model_index.json").read_text())["guidance_scale"] == 1.75
    done, guidance = generated(model, tmp_path)
    assert guidance == 1.75
    assert "FlowMatchEulerDiscreteScheduler, 2 steps, guidance 1.75" in done.stdout
    assert generated(model, tmp_path, "--guidance", 3)[1] == 3
    assert Models(model.parent).describe("pipeline").guidance == 1.75


def test_a_call_without_guidance_takes_the_models_own_and_it_survives_saving(guided, tmp_path) -> None:
    SiTPipeline.from_pretrained(guided[0]).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        pipe(0, 2, generator=torch.Generator().manual_seed(0), output_type="latent", **given).images  # type: ignore[operator]
        for given in ({}, {"guidance_scale": 1.75}, {"guidance_scale": 1.0})
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.slow
def test_evaluate_and_tune_draw_with_the_models_own(guided, tmp_path) -> None:
    words = ("--model", guided[0], "--num-pictures", 2, "--steps", 2, "--device", "cpu", "--paired")
    done = call("evaluate", *words, "--out", tmp_path / "e", "--json", tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "e.json").read_text())["protocol"]["guidance"] == 1.75
    assert "2 steps, guidance 1.75" in done.stdout
    words = ("--model", guided[0], "--steps", 4, "--samples", 2, "--budget", 1, "--device", "cpu")
    done = call("tune", *words, "--out", tmp_path / "recipe.json")
    assert done.exit_code == 0, done.output
    assert '"guidance": 1.75' in (tmp_path / "recipe.json").read_text()


@pytest.mark.slow
def test_training_without_label_dropout_warns_and_the_model_says_that_it_has_no_null_class(unguided) -> None:
    model, said = unguided
    assert "objective.label_dropout=0 trains no null class" in said
    assert "(guidance 1, Euler, 1 steps)" in said  # of the grid
    assert json.loads((model / "transformer/config.json").read_text())["null_class"] is False
    pipe = SiTPipeline.from_pretrained(model)
    assert pipe.own_guidance == 1
    assert pipe.transformer.y_embedder.embedding_table.num_embeddings == 2


@pytest.mark.slow
def test_without_a_null_class_pictures_are_drawn_without_guidance_and_it_is_said(unguided, tmp_path) -> None:
    done, guidance = generated(unguided[0], tmp_path)
    assert guidance == 1
    assert "drawn without guidance: the model was trained without a null class (label dropout 0)" in done.stdout
    assert "drawn without guidance" not in generated(unguided[0], tmp_path, "--guidance", 1)[0].stdout
    words = ("--model", unguided[0], "--num-pictures", 2, "--steps", 2, "--device", "cpu", "--paired")
    assert "drawn without guidance: " in call("evaluate", *words, "--out", tmp_path / "e").stdout
    for command in ("generate", "evaluate"):
        words = ["--model", unguided[0], "--steps", 2, "--guidance", 1.5, "--out", tmp_path / "x"]
        words += ["--prompt", "dark"] if command == "generate" else ["--num-pictures", 2, "--paired"]
        done = call(command, *words, "--device", "cpu")
        assert done.exit_code == 2
        assert "without a null class" in done.stderr
        assert "guidance must be at most 1, got 1.5" in done.stderr


def test_a_pipeline_refuses_to_be_saved_with_guidance_that_it_cannot_give(unguided) -> None:
    pipe = SiTPipeline.from_pretrained(unguided[0])
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a model with a null class"):
        SiTPipeline(pipe.transformer, pipe.scheduler, guidance_scale=2.0)

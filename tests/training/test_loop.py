"""The training loop: what it learns, what survives a stop, what it refuses."""

import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from support.tiny_training import TINY, assert_same, last, run

from diffattn.metrics.classifier import Classifier
from diffattn.metrics.extractors import OfflineExtractor
from diffattn.sampling import SiTPipeline
from diffattn.training import checkpoints
from diffattn.training.config import OptimConfig, TrainConfig
from diffattn.training.loop import NonFiniteLoss, Trainer, learning_rate
from diffattn.training.setup import set_up


class Interrupted(Exception):
    pass


def interrupted_after(step: int, monkeypatch) -> None:
    """Training stops, as if killed, when so many steps are done."""
    original = Trainer.step

    def limited(self, x, y):
        if self.progress.step == step:
            raise Interrupted
        return original(self, x, y)

    monkeypatch.setattr(Trainer, "step", limited)


@pytest.mark.parametrize(
    "settings",
    [(), ("optim.schedule=cosine", "objective.time=logit_normal"), ("optim.name=muon", "optim.lr=5e-3")],
    ids=["", "cosine", "muon"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(pictures, tmp_path, monkeypatch, settings) -> None:
    run(pictures, tmp_path / "whole", *settings)
    with monkeypatch.context() as patched:
        interrupted_after(5, patched)
        with pytest.raises(Interrupted):
            run(pictures, tmp_path / "resumed", *settings)
    saved = tmp_path / "resumed" / "checkpoints"
    assert checkpoints.latest(saved) == saved / "step-00000003"
    torch.manual_seed(99)  # whatever happens in between
    said: list[str] = []
    run(pictures, tmp_path / "resumed", *settings, said=said)
    assert "resuming at step 3" in said
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_accumulation_gives_the_gradient_of_the_whole_batch(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "one", "run.steps=2", "optim.lr=1e-4")
    run(pictures, tmp_path / "two", "run.steps=2", "optim.lr=1e-4", "optim.accumulation=2")
    a, b = last(tmp_path / "one")[0]["optimizer"], last(tmp_path / "two")[0]["optimizer"]
    moments = [name for name in a if name.endswith("exp_avg")]
    assert all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-3) for name in moments)


def test_the_loss_falls_and_the_pipeline_draws_what_was_learned(pictures, tmp_path) -> None:
    said: list[str] = []
    folder = run(pictures, tmp_path, "run.steps=150", "optim.batch=10", "run.log_every=50", "run.save_every=1000",
                 "objective.label_dropout=0", "optim.lr=1e-2", said=said)  # fmt: skip
    losses = [float(line.split("loss ")[1].split()[0]) for line in said if line.startswith("step ")]
    assert losses[-1] < 0.6 * losses[0]
    pipe: Any = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert dict(pipe.config["id2label"]) in ({"0": "bright", "1": "dark"}, {0: "bright", 1: "dark"})
    for number in (1, 4):
        pipe.transformer.set_num_mediators(number)
        images = pipe(["bright", "dark"], num_inference_steps=8, output_type="pt").images
        assert images[0].mean() > images[1].mean() + 0.3


def test_every_number_of_mediators_is_trained_and_bins_cover_the_times(pictures, tmp_path) -> None:
    before = TrainConfig.read(settings=TINY)
    run(pictures, tmp_path)
    moved = last(tmp_path)[0]["optimizer"]
    for n in before.model.mediators:
        assert moved[f"blocks.0.attn.biases.{n}.an_bias/exp_avg"].abs().sum() > 0


def test_a_run_with_another_configuration_is_refused_by_field(pictures, tmp_path) -> None:
    run(pictures, tmp_path, "run.steps=2")
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.003 -> 0\.5; .*run\.seed: 0 -> 4"):
        run(pictures, tmp_path, "optim.lr=0.5", "run.seed=4")
    with pytest.raises(ValueError, match=r"model\.hidden_size: 16 -> 32"):
        run(pictures, tmp_path, "model.hidden_size=32")
    run(pictures, tmp_path, "run.steps=3", "run.keep=7")  # these may change


def test_other_pictures_are_refused(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "run", "run.steps=2")
    other = tmp_path / "other"
    for name in ("bright", "dark"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(other / name / "a.png")
    with pytest.raises(ValueError, match="the pictures"):
        run(other, tmp_path / "run", "run.steps=3")


def test_bad_steps_are_skipped_counted_and_stop_the_run(pictures, tmp_path, monkeypatch) -> None:
    original = Trainer._draw
    bad = {3}

    def poisoned(self, x):
        drawn = original(self, x)
        if self.progress.step in bad:
            drawn.noise = drawn.noise * float("nan")
        return drawn

    monkeypatch.setattr(Trainer, "_draw", poisoned)
    said: list[str] = []
    run(pictures, tmp_path / "one", said=said)
    assert last(tmp_path / "one")[1]["progress"]["skipped"] == 1
    assert all(torch.isfinite(w).all() for w in last(tmp_path / "one")[0]["model"].values())
    assert any("1 steps skipped" in line for line in said)
    bad.update(range(4, 100))
    with pytest.raises(NonFiniteLoss, match=r"3 steps in a row"):
        run(pictures, tmp_path / "two", "run.max_bad_steps=3")
    saved = tmp_path / "two" / "checkpoints"
    assert checkpoints.latest(saved) == saved / "step-00000003"


def test_frozen_backbone_with_distillation(pictures, tmp_path) -> None:
    teacher = run(pictures, tmp_path / "teacher", "model.attention=softmax")
    start = [f"model.start={teacher}", f"objective.distill={teacher}", "model.freeze_backbone=true"]
    run(pictures, tmp_path / "student", *start)
    before = SiTPipeline.from_pretrained(teacher).transformer.state_dict()
    after = last(tmp_path / "student")[0]["model"]
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    assert after["blocks.0.attn.dwc.weight"].any()
    with pytest.raises(ValueError, match="neither a folder"):
        run(pictures, tmp_path / "x", "objective.distill=nowhere")


def test_distillation_with_gradient_checkpointing_learns_the_same(pictures, tmp_path) -> None:
    teacher = run(pictures, tmp_path / "teacher", "model.attention=softmax", "run.steps=1")
    settings = [f"objective.distill={teacher}", "run.steps=3"]
    run(pictures, tmp_path / "plain", *settings)
    run(pictures, tmp_path / "recomputed", *settings, "run.gradient_checkpointing=true")
    assert_same(tmp_path / "plain", tmp_path / "recomputed")


def test_weights_count_when_a_run_is_resumed_and_not_their_paths(pictures, tmp_path) -> None:
    teacher = run(pictures, tmp_path / "teacher", "model.attention=softmax", "run.steps=1")
    other = run(pictures, tmp_path / "other", "model.attention=softmax", "run.steps=2")
    shutil.copytree(teacher, tmp_path / "copy")
    names = [f"model.start={teacher}", f"objective.distill={teacher}"]
    run(pictures, tmp_path / "run", *names, "run.steps=2")
    run(pictures, tmp_path / "run", *[name.replace(str(teacher), str(tmp_path / "copy")) for name in names])
    with pytest.raises(ValueError, match=r"the weights of objective\.distill"):
        run(pictures, tmp_path / "run", names[0], f"objective.distill={other}", "run.steps=9")
    with pytest.raises(ValueError, match=r"the weights of objective\.distill"):
        run(pictures, tmp_path / "run", names[0], "run.steps=9")
    for wrong in (other, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"began from model\.start='.*', not from '.*': leave out model\.start"):
            run(pictures, tmp_path / "run", f"model.start={wrong}", names[1], "run.steps=9")
    run(pictures, tmp_path / "run", names[1], "run.steps=9")
    assert last(tmp_path / "run")[1]["config"]["model"]["start"] == str(teacher)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["start"] == str(teacher)
    with pytest.raises(ValueError, match="began from fresh weights"):
        run(pictures, tmp_path / "teacher", "model.attention=softmax", f"model.start={other}")


def test_checkpoints_of_earlier_versions_are_resumed_by_path(pictures, tmp_path, monkeypatch) -> None:
    teacher = run(pictures, tmp_path / "teacher", "model.attention=softmax", "run.steps=1")
    original = checkpoints.save

    def without_weights(root, step, tensors, state, keep):
        return original(root, step, tensors, {k: v for k, v in state.items() if k != "weights"}, keep)

    monkeypatch.setattr(checkpoints, "save", without_weights)
    run(pictures, tmp_path / "run", f"objective.distill={teacher}", "run.steps=1")
    run(pictures, tmp_path / "run", f"objective.distill={teacher}", "run.steps=2")
    shutil.copytree(teacher, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"objective\.distill: '.*teacher.*' -> '.*copy'"):
        run(pictures, tmp_path / "run", f"objective.distill={tmp_path / 'copy'}", "run.steps=3")


def test_weights_that_are_not_finite_are_not_written(pictures, tmp_path, monkeypatch) -> None:
    original = Trainer.step

    def spoiled(self, x, y):
        found = original(self, x, y)
        if self.progress.step == 4:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return found

    monkeypatch.setattr(Trainer, "step", spoiled)
    said: list[str] = []
    with pytest.raises(NonFiniteLoss, match="are not finite: the checkpoint of step 7 is not written"):
        run(pictures, tmp_path, "run.steps=7", said=said)
    assert any(line.startswith("checkpoint at step 6 not written: ") for line in said)
    assert [p.name for p in checkpoints.complete(tmp_path / "checkpoints")] == ["step-00000003"]
    assert not (tmp_path / "pipeline").exists()


def test_latents_are_cached_and_the_pipeline_decodes_them(pictures, tmp_path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=16,  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    settings = [f"data.vae={tmp_path / 'vae'}", "data.size=16", "run.steps=4"]
    folder = run(pictures, tmp_path / "run", *settings)
    cached = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "latents").glob("*.safetensors")}
    assert cached
    pipe: Any = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config["in_channels"] == 2
    assert pipe("dark", num_inference_steps=2).images[0].size == (16, 16)
    (tmp_path / "vae").rename(tmp_path / "moved")
    settings[0] = f"data.vae={tmp_path / 'moved'}"
    run(pictures, tmp_path / "run", *settings, "run.steps=5")
    assert {p: p.stat().st_mtime_ns for p in cached} == cached  # not computed again
    with pytest.raises(ValueError, match=r"data\.size must be a multiple of 2 for this autoencoder, got 15"):
        run(pictures, tmp_path / "odd", *settings, "data.size=15")


def test_classes_that_do_not_match_the_checkpoint(pictures, tmp_path) -> None:
    teacher = run(pictures, tmp_path / "teacher", "run.steps=1")
    other = tmp_path / "other"
    for name in ("bright", "dim"):
        (other / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), "red").save(other / name / f"{i}.png")
    with pytest.raises(ValueError, match=r"missing in the data: 'dark'; unknown to the model: 'dim'"):
        run(other, tmp_path / "run", f"model.start={teacher}")


def test_quality_for_every_number_of_mediators(pictures, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    extractor = OfflineExtractor("tiny", Classifier(num_classes=2, input_size=8, widths=(4, 4, 4)))
    monkeypatch.setattr("diffattn.training.watch.load_extractor", lambda name, device: extractor)
    run(pictures, tmp_path, "run.steps=4", "run.eval_every=4", "run.eval_samples=12", "run.sample_steps=2")
    line = json.loads((tmp_path / "quality.jsonl").read_text())
    assert line["step"] == 4
    assert set(line["scores"]) == {"n=1", "n=4"}
    assert set(line["scores"]["n=1"]) == {"fid", "kid", "kid_std", "precision", "recall", "accuracy"}
    assert line["scores"]["n=1"] != line["scores"]["n=4"]


def test_an_extractor_that_is_not_there_stops_the_run_before_it_trains(pictures, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown extractor 'eye'"):
        run(pictures, tmp_path, "run.eval_every=1", "run.extractor=eye")
    assert not (tmp_path / "checkpoints").exists()


def test_gradient_checkpointing_changes_nothing(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "plain", "run.steps=2")
    run(pictures, tmp_path / "recomputed", "run.steps=2", "run.gradient_checkpointing=true")
    assert_same(tmp_path / "plain", tmp_path / "recomputed")


def test_sample_grids_show_the_average_and_leave_training_alone(pictures, tmp_path) -> None:
    run(pictures, tmp_path / "plain", "run.steps=4")
    run(pictures, tmp_path / "shown", "run.steps=4", "run.sample_every=2", "run.sample_steps=2")
    assert_same(tmp_path / "plain", tmp_path / "shown")
    grids = sorted((tmp_path / "shown" / "samples").glob("*.png"))
    assert [g.name for g in grids] == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(grids[0]).size == (2 * 10 - 2, 6 * 10 - 2)  # two classes; three seeds for two numbers


def test_batches_must_divide_and_data_must_be_named(pictures) -> None:
    with pytest.raises(ValueError, match=r"data\.source must name the pictures"):
        set_up(TrainConfig.read(settings=TINY), "cpu")
    with pytest.raises(ValueError, match=r"larger than the grid"):
        set_up(TrainConfig.read(settings=[*TINY, "model.mediators=[64]", f"data.source={pictures}"]), "cpu", [].append)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)])
def test_learning_rates(schedule, end) -> None:
    config = OptimConfig(lr=2.0, schedule=schedule, final_lr=0.1, warmup=4)
    assert [learning_rate(config, i, 104) for i in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(config, 104, 104) == pytest.approx(2 * end)
    middle = learning_rate(config, 54, 104)
    assert middle == pytest.approx(2.0 if schedule == "constant" else 1.1)


def test_the_configuration_is_saved_with_the_run(pictures, tmp_path) -> None:
    run(pictures, tmp_path, "run.steps=1")
    saved = TrainConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert saved.optim.batch == 4

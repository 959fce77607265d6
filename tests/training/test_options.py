"""Options of a run that change what is computed (compilation, precision, path, weights), and the logs of it."""

from collections.abc import Callable, Iterator
from functools import partialmethod

import pytest
import torch
from accelerate.state import AcceleratorState
from support.tiny_training import last, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._dynamo.utils import counters

from diffattn.models import DiT
from diffattn.training import checkpoints
from diffattn.training.loop import Trainer


@pytest.fixture
def another_precision() -> Iterator[Callable[[], None]]:
    """accelerate has one precision per process, until this is called."""
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state()


def losses(said: list[str]) -> list[float]:
    return [float(line.split("loss ")[1].split()[0]) for line in said if line.startswith("step ")]


def test_a_compiled_run_learns_what_an_eager_one_does_from_the_teacher_too(
    pictures, tmp_path, fresh_dynamo, monkeypatch
) -> None:
    monkeypatch.setattr(DiT, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))  # inductor: a minute
    one_layer = ["model.num_layers=1", "model.mediators=[4]", "run.steps=4", "run.log_every=1"]
    teacher = run(pictures, tmp_path / "teacher", *one_layer, "model.attention=softmax", "run.steps=1")
    settings = [*one_layer, f"model.start={teacher}", f"objective.distill={teacher}", "objective.distill_weight=10"]
    run(pictures, tmp_path / "eager", *settings)
    run(pictures, tmp_path / "compiled", *settings, "run.compile=true")
    assert counters["stats"]["unique_graphs"] == 1  # hooks and all, and no step compiles it again
    assert not counters["graph_break"]
    run(pictures, tmp_path / "untaught", *settings, "objective.distill_weight=0")
    (eager, _), (compiled, _), (untaught, _) = (last(tmp_path / name) for name in ("eager", "compiled", "untaught"))
    name = "optimizer", "blocks.0.attn.dwc.weight/exp_avg"
    moment, taught, plain = (tensors[name[0]][name[1]] for tensors in (eager, compiled, untaught))
    torch.testing.assert_close(taught, moment, atol=1e-6, rtol=1e-3)
    assert (plain - moment).norm() > 0.1 * moment.norm()


def test_bf16_learns_nearly_what_fp32_does_and_keeps_its_state_in_fp32(pictures, tmp_path, another_precision) -> None:
    said: dict[str, list[str]] = {"fp32": [], "bf16": []}
    for precision, lines in said.items():
        another_precision()
        run(pictures, tmp_path / precision, f"run.precision={precision}", "run.log_every=1", said=lines)
    assert any(line.endswith("precision bf16") for line in said["bf16"])
    assert losses(said["bf16"]) == pytest.approx(losses(said["fp32"]), rel=0.02)
    for part in ("model", "ema", "optimizer"):
        assert {tensor.dtype for tensor in last(tmp_path / "bf16")[0][part].values()} == {torch.float32}
    one, other = (last(tmp_path / precision)[0]["model"] for precision in said)
    assert any(not torch.equal(one[name], other[name]) for name in one)  # it did compute in bf16


@pytest.mark.parametrize("setting", ["objective.path=gvp", "objective.min_snr=0.5"])
def test_the_path_and_the_weights_change_what_is_learned(pictures, tmp_path, setting) -> None:
    long = ["run.steps=120", "optim.batch=10", "run.log_every=40", "run.save_every=1000", "optim.lr=1e-2"]
    said: list[str] = []
    run(pictures, tmp_path / "changed", *long, setting, said=said)
    assert losses(said)[-1] < 0.8 * losses(said)[0]
    said.clear()
    run(pictures, tmp_path / "changed", *long, setting, "run.steps=121", said=said)
    assert "resuming at step 120" in said
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        run(pictures, tmp_path / "changed", *long, "run.steps=122")


def test_trackers_write_the_loss_and_the_loss_per_bin_of_t(pictures, tmp_path) -> None:
    said: list[str] = []
    run(pictures, tmp_path, "run.trackers=[tensorboard]", "objective.bins=4", "run.steps=40", "run.log_every=20",
        "run.save_every=1000", said=said)  # fmt: skip
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read.keys() == {
        "loss", "gradient_norm", "lr", "samples_per_second", "seconds_per_step", "skipped_steps",
        "loss/t0-0.25", "loss/t0.25-0.5", "loss/t0.5-0.75", "loss/t0.75-1",
    }  # fmt: skip
    assert [step for step, _ in read["loss"]] == [20, 40]
    assert [value for _, value in read["loss"]] == pytest.approx(losses(said), abs=1e-4)
    for i, (_, loss) in enumerate(read["loss"]):
        per_bin = [read[tag][i][1] for tag in read if tag.startswith("loss/")]
        assert min(per_bin) < loss < max(per_bin)
        assert per_bin != [loss] * 4


def test_a_checkpoint_that_cannot_be_written_is_tried_again(pictures, tmp_path, monkeypatch) -> None:
    original, in_the_way = Trainer.step, tmp_path / "checkpoints"
    in_the_way.write_text("a file where the folder should be")

    def step(self, x, y):
        if self.progress.step == 5:
            in_the_way.unlink()
        return original(self, x, y)

    monkeypatch.setattr(Trainer, "step", step)
    said: list[str] = []
    run(pictures, tmp_path, said=said)
    assert next(line for line in said if "not written" in line).startswith("checkpoint at step 3 not written: ")
    assert sum("not written" in line for line in said) == 1
    assert [p.name for p in checkpoints.complete(in_the_way)] == ["step-00000006", "step-00000008"]


def test_the_last_checkpoint_that_cannot_be_written_is_an_error(pictures, tmp_path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="checkpoints"):
        run(pictures, tmp_path, "run.steps=2")


def test_a_finished_run_is_not_saved_again(pictures, tmp_path) -> None:
    run(pictures, tmp_path, "run.steps=4")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")}
    run(pictures, tmp_path, "run.steps=4")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == times

"""Monitoring during training: sample grids, and quality for every number of mediators.

All processes share the drawing, so that none waits long; see `diffattn.training.processes`.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor

from diffattn.evaluation.sit_quality import Drawing, draw_classes, scores_of
from diffattn.metrics.extractors import FeatureExtractor, load_extractor
from diffattn.metrics.features import features_of
from diffattn.metrics.reference import Reference, Statistics
from diffattn.sampling import SiTPipeline
from diffattn.training.log import StepLog
from diffattn.training.loop import Trainer
from diffattn.training.processes import together
from diffattn.training.samples import Grid, pipeline_of, save_grid, tile
from diffattn.training.setup import TrainSetup
from diffattn.training.signals import Stopped, StopRequest

REFERENCE_PICTURES = 10_000
QUALITY_FILE = "quality.jsonl"
BATCH = 64


class Watcher:
    """Acts every `run.sample_every` and `run.eval_every` steps; call it after every step on every process.

    A grid or a figure that cannot be written (e.g. on a full disk) is reported, and training continues; a signal aborts
    the evaluation, and the training loop then saves and stops.

    Raises:
        ValueError: the feature extractor of the evaluation is not available.
    """

    def __init__(self, setup: TrainSetup, stop: StopRequest) -> None:
        self.setup, self.stop = setup, stop
        self.accelerator = setup.accelerator
        self.out = Path(setup.config.run.out)
        self._extractor: FeatureExtractor | None = None
        self._reference: Reference | None = None
        self._sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self._sharded:
            setup.say("a sharded model is not sampled during training: no grids, no evaluation")
        elif setup.config.run.eval_every:
            self._extractor = load_extractor(setup.config.run.extractor, device=self.accelerator.device)

    def __call__(self, trainer: Trainer, log: StepLog) -> None:
        """Handle a completed step. Every process must call it."""
        run, step = self.setup.config.run, trainer.progress.step
        for every, what in [(run.sample_every, self.show), (run.eval_every, self.evaluate)]:
            if every and not self._sharded and (step % every == 0 or step == run.steps):
                try:
                    what(trainer, log)
                except Stopped:
                    log.say(f"the samples of step {step} are skipped")
                    return

    def show(self, trainer: Trainer, log: StepLog) -> None:
        """Draw and save the sample grid of the current step."""
        run, names = self.setup.config.run, self.setup.dataset.class_names
        guidance = self.setup.config.own_guidance
        grid = Grid(range(min(len(names), 10)), 3, run.sample_steps, guidance, run.seed)
        lines = grid.lines(trainer.model)
        drawn: list[tuple[int, Any]] = []

        def pieces(pipe: SiTPipeline) -> Iterator[int]:
            for i in self._share(len(lines)):
                drawn.append((i, grid.draw(pipe, *lines[i])))
                yield 1

        with trainer.averaged() as model:
            together(self.accelerator, pieces(pipeline_of(model, names, self.setup.vae)), self.stop)
        sheet = tile([line for _, line in sorted(gather_object(drawn), key=lambda pair: pair[0])])
        how = f"guidance {guidance:g}, Euler, {run.sample_steps} steps"
        if self.accelerator.is_main_process:
            try:
                path = save_grid(sheet, self.out / "samples", trainer.progress.step)
                log.say(f"samples of step {trainer.progress.step}: {path} ({how})")
            except OSError as error:
                log.say(f"samples of step {trainer.progress.step} not written: {error}")

    def evaluate(self, trainer: Trainer, log: StepLog) -> None:
        """FID, KID, precision, recall and accuracy of the current step, unguided; appends to `quality.jsonl`."""
        run, step = self.setup.config.run, trainer.progress.step
        extractor = self._extractor
        assert extractor is not None
        drawing = Drawing(run.eval_samples, run.sample_steps, 1.0, run.seed, BATCH)
        with trainer.averaged() as model:
            pipe = pipeline_of(model, self.setup.dataset.class_names, self.setup.vae)
            reference = self.reference(extractor)
            found = {
                f"n={n}" if n else pipe.transformer.attention_label: self._scores(
                    pipe, drawing, n, reference, extractor
                )
                for n in model.mediators or (0,)
            }
        log.track({f"{score}/{n}": value for n, scores in found.items() for score, value in scores.items()}, step)
        sampler = type(pipe.scheduler).__name__
        how = {"sampler": sampler, "steps": drawing.steps, "guidance": drawing.guidance}
        if self.accelerator.is_main_process:
            try:
                with (self.out / QUALITY_FILE).open("a") as file:
                    file.write(json.dumps({"step": step, "samples": drawing.samples, **how, "scores": found}) + "\n")
            except OSError as error:
                log.say(f"{QUALITY_FILE} of step {step} not written: {error}")
        figures = "  ".join(f"{n}: {scores['fid']:.2f}" for n, scores in found.items())
        log.say(
            f"FID-{drawing.samples} ({run.extractor}, {sampler}, {drawing.steps} steps, guidance 1) of step {step}: "
            f"{figures}"
        )

    def reference(self, extractor: FeatureExtractor) -> Reference:
        """The features of at most 10,000 evenly chosen pictures; computed once, by all processes together."""
        if self._reference is None:
            data = self.setup.dataset
            chosen = torch.linspace(0, len(data) - 1, min(len(data), REFERENCE_PICTURES)).long().unique().tolist()
            mine = self._share(len(chosen))
            batches = (
                torch.stack([data[chosen[i]][0] for i in mine[start : start + BATCH]])
                for start in range(0, len(mine), BATCH)
            )
            features = self._features(batches, extractor)
            name = Path(self.setup.config.data.source).name
            self._reference = Reference(
                name, data.fingerprint, extractor.name, extractor.hash, extractor.resize, Statistics.of(features),
                features,
            )  # fmt: skip
        return self._reference

    def _scores(
        self, pipe: SiTPipeline, drawing: Drawing, number: int, reference: Reference, extractor: FeatureExtractor
    ) -> dict[str, float]:
        """Scores of one number of mediators (0: the model has none), computed by every process from all features."""
        if number:
            pipe.transformer.set_num_mediators(number)
        mine, num_classes = self._share(drawing.samples), pipe.transformer.config["num_classes"]
        features = self._features((images for images, _ in draw_classes(pipe, drawing, chosen=mine)), extractor)
        classes = torch.tensor([i % num_classes for i in self._order(drawing.samples)])
        return dict(scores_of(features, classes, num_classes, reference, extractor)[0])

    def _features(self, batches: Iterable[Tensor], extractor: FeatureExtractor) -> Tensor:
        """Features [N, d] of every process's pictures, in the order of the processes."""
        found: list[Tensor] = []

        def pieces() -> Iterator[int]:
            for images in batches:
                found.append(features_of([images], extractor))
                yield len(images)

        together(self.accelerator, pieces(), self.stop)
        return torch.cat(gather_object(found))

    def _share(self, count: int) -> range:
        """This process's share of `count` items."""
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def _order(self, count: int) -> list[int]:
        """All shares, one process after the other."""
        processes = self.accelerator.num_processes
        return [i for rank in range(processes) for i in range(rank, count, processes)]

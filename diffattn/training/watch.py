"""What is looked at while a run goes on: sample grids, and quality for every number of mediators."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from diffattn.evaluation.sit_quality import Drawing, quality_per_number
from diffattn.metrics.extractors import FeatureExtractor, load_extractor
from diffattn.metrics.reference import Reference
from diffattn.training.loop import Trainer
from diffattn.training.samples import pipeline_of, sample_grid, save_grid
from diffattn.training.setup import Setup

REFERENCE_PICTURES = 10_000
QUALITY_FILE = "quality.jsonl"


class Watcher:
    """Called after every step; works every `run.sample_every` and `run.eval_every` steps, on the first process.

    Raises:
        ValueError: the feature extractor of the evaluation is not there.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.out = Path(setup.config.run.out)
        self._extractor: FeatureExtractor | None = None
        self._reference: Reference | None = None
        self._sharded = setup.accelerator.distributed_type == DistributedType.FSDP
        if self._sharded:
            setup.say("a sharded model is not sampled while it trains: no grids, no evaluation")
        if setup.config.run.eval_every and setup.accelerator.is_main_process:
            self._extractor = load_extractor(setup.config.run.extractor, device=setup.accelerator.device)

    def __call__(self, trainer: Trainer) -> None:
        """A step is done. Every process must call it."""
        run, step = self.setup.config.run, trainer.progress.step
        due = [(run.sample_every, self.show), (run.eval_every, self.evaluate)]
        for every, what in due:
            if every and not self._sharded and (step % every == 0 or step == run.steps):
                if self.setup.accelerator.is_main_process:
                    what(trainer)
                self.setup.accelerator.wait_for_everyone()

    @property
    def guidance(self) -> float:
        """Of the grids; none for a model that was trained without the null class."""
        config = self.setup.config
        return config.run.guidance if config.objective.label_dropout else 1.0

    def show(self, trainer: Trainer) -> Path:
        """The sample grid of the present step."""
        run, names = self.setup.config.run, self.setup.dataset.class_names
        with trainer.averaged() as model:
            pipe = pipeline_of(model, names, self.setup.vae)
            grid = sample_grid(pipe, range(min(len(names), 10)), 3, run.sample_steps, self.guidance, run.seed)
        path = save_grid(grid, self.out / "samples", trainer.progress.step)
        self.setup.say(f"samples of step {trainer.progress.step}: {path}")
        return path

    def evaluate(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """FID, KID, precision, recall and accuracy of the present step, without guidance; a line of `quality.jsonl`."""
        run, step = self.setup.config.run, trainer.progress.step
        assert self._extractor is not None
        with trainer.averaged() as model:
            pipe = pipeline_of(model, self.setup.dataset.class_names, self.setup.vae)
            drawing = Drawing(run.eval_samples, run.sample_steps, 1.0, run.seed)
            found = quality_per_number(pipe, drawing, self.reference(self._extractor), self._extractor)
        flat = {f"{score}/{n}": value for n, scores in found.items() for score, value in scores.items()}
        self.setup.accelerator.log(flat, step=step)
        with (self.out / QUALITY_FILE).open("a") as file:
            file.write(json.dumps({"step": step, "samples": run.eval_samples, "scores": found}) + "\n")
        told = "  ".join(f"{n}: {scores['fid']:.2f}" for n, scores in found.items())
        self.setup.say(f"FID-{run.eval_samples} ({run.extractor}) of step {step}: {told}")
        return found

    def reference(self, extractor: FeatureExtractor) -> Reference:
        """Of at most 10,000 pictures of the data, taken evenly."""
        if self._reference is None:
            self._reference = Reference.of(Path(self.setup.config.data.source).name, self._pictures(), extractor)
        return self._reference

    def _pictures(self) -> Iterator[Tensor]:
        data = self.setup.dataset
        for i in torch.linspace(0, len(data) - 1, min(len(data), REFERENCE_PICTURES)).long().unique().tolist():
            yield data[i][0][None]

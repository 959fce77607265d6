"""Everything that is measured on one pipeline; results already in the entry are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from emoji_sd.data import load_pictures, split_names

from diffattn.architectures.denoisers import denoiser_of
from diffattn.evaluation.quality import QualityResult, compare
from diffattn.measure.interleave import interleave
from diffattn.metrics.extractors import FeatureExtractor
from diffattn.metrics.reference import Reference
from diffattn.patching.patch import find_patch

from . import SDPA, LeftOut, Setting, apply
from .pictures import Drawing, draw_pairs, paired, score
from .report import other_seeds
from .results import Results
from .timing import missing


@dataclass
class Comparison:
    """Variants of one pipeline.

    Attributes:
        entry: of `results`, filled in as figures are found.
        names: of the variants, exact attention first.
    """

    results: Results
    entry: dict[str, Any]
    names: Sequence[str]
    pipe: Any
    setting: Setting
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        """Move variants that cannot run here from `names` to the entry, with the reason; earlier runs' reasons stay."""
        left_out = self.entry["left_out"]
        for name in self.names:
            left_out.pop(name, None)
            try:
                with apply(name, self.pipe, self.setting):
                    pass
            except LeftOut as error:
                left_out[name] = str(error)
        self.names = [name for name in self.names if name not in left_out]

    def draw(self, groups: Mapping[str, Sequence[str]], drawing: Drawing) -> None:
        """The pictures of all groups of prompts, paired with the unaccelerated ones."""
        todo = [name for name in self.names if name not in self.entry["pictures"]]
        exact = {group: draw_pairs(self.pipe, prompts, drawing) for group, prompts in groups.items() if todo}
        for name in todo:
            with apply(name, self.pipe, self.setting) as draw:
                found = {g: paired(draw_pairs(draw, prompts, drawing), exact[g]) for g, prompts in groups.items()}
                self._note_layers(name)
            self.entry["pictures"][name] = found
            self.results.save()
            self.say(f"{name}: {sum(len(f['ssim']) for f in found.values())} pictures drawn")

    def score(
        self,
        names: Sequence[str],
        drawing: Drawing,
        source: Path,
        every: int,
        eye: FeatureExtractor,
        count: int,
        seed_sets: int,
    ) -> None:
        """KID and FID against all pictures of a zip, drawn by the names the model was trained on.

        Args:
            names: of the variants to score.
            source: a zip with `metadata.jsonl`.
            every: the model was trained on every so many-th name of it.
            count: pictures of each variant.
            seed_sets: exact attention is scored with so many sets of `count` seeds: the spread from seeds alone.

        Raises:
            ValueError: there are scores of another protocol; nothing is written.
        """
        others = {other_seeds(i): i for i in range(1, seed_sets)}
        wanted = (*(name for name in self.names if name in names), *others)
        todo = [name for name in wanted if name not in self.entry["scores"]]
        if not todo:
            return
        side = drawing.side or denoiser_of(self.pipe).config.sample_size * self.pipe.vae_scale_factor
        real = load_pictures(source, side)
        prompts = real.select(split_names(len(real), every, keep=True)[0]).names
        truth = Reference.of(source.name, real.images.split(64), eye)
        for name in todo:
            ours = drawing.shifted(others.get(name, 0) * count)
            with apply(SDPA if name in others else name, self.pipe, self.setting) as draw:
                result = score(draw, self.pipe, name, prompts, count, ours, truth, eye)
            self._check_protocol(result)
            self.entry["scores"][name] = {**result.to_dict(), "enough_for_fid": count > eye.num_features}
            self.results.save()
            self.say(f"{name}: KID {result.scores['kid']:.5f}, FID {result.scores['fid']:.3f}")

    def _check_protocol(self, result: QualityResult) -> None:
        """Refuses a result that cannot be compared with the existing scores."""
        for stored in self.entry["scores"].values():
            before = QualityResult.from_dict({key: stored[key] for key in ("subject", "protocol", "scores")})
            compare(before, result, may_differ=("seeds",))

    def time(
        self, arguments: Callable[[], dict[str, Any]], rounds: int, device: torch.device, warm_up: int = 2
    ) -> None:
        """Adds rounds until every variant is in so many; saved after every run.

        An interrupted round stays incomplete: a later call starts a new one, with exact attention and what is missing.

        Args:
            arguments: makes those of one timed run, `num_inference_steps` excepted.
            warm_up: steps of a run of every variant before the first that counts.
        """
        finished = self.entry["rounds"]
        for name in missing(finished, self.names, rounds) if warm_up else ():
            if "steps-" not in name:  # so few steps cannot be shortened
                self._run(name, warm_up, arguments, device)
        while todo := missing(finished, self.names, rounds):
            others = [name for name in todo if name != SDPA]
            shift = len(finished) % max(len(others), 1)
            finished.append(current := {})
            for name in (SDPA, *others[shift:], *others[:shift]):
                current[name] = self._run(name, self.setting.steps, arguments, device)
                self.results.save()
                ratio = current[name] / current[SDPA]
                self.say(f"round {len(finished)}: {name} {current[name]:.2f} s, ratio {ratio:.3f}")

    def _run(self, name: str, steps: int, arguments: Callable[[], dict[str, Any]], device: torch.device) -> float:
        """Seconds of one run."""
        with apply(name, self.pipe, self.setting) as draw:
            given = arguments()
            timed = interleave({name: lambda: draw(num_inference_steps=steps, **given)}, 1, warmup=0, device=device)
            self._note_layers(name)
        for key, peak in timed.peak_mib.items():
            self.entry["peak_mib"][key] = max(peak, self.entry["peak_mib"].get(key, 0.0))
        return timed.rounds[0][name]

    def _note_layers(self, name: str) -> None:
        """How many layers a patch accelerated, if there is one."""
        if (patch := find_patch(self.pipe)) is not None:
            self.entry["layers"][name] = patch.report().layers_accelerated

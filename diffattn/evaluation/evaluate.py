"""Quality of a pipeline, or of pictures: against reference pictures, prompts, and the unaccelerated pipeline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffattn.data.matching import Matching, check_turns
from diffattn.drawing.classes import draws_classes
from diffattn.evaluation.config import EvaluateConfig
from diffattn.evaluation.draw_set import (
    LATENTS,
    PICTURES,
    UNACCELERATED,
    DrawConfig,
    accelerated,
    draw_set,
    drawn_titles,
    picture_name,
    subjects,
    with_own_values,
)
from diffattn.evaluation.identity import Evaluated, describe_patch, device_label, identity, protocol_of, subject_name
from diffattn.evaluation.left_out import LeftOut, drawn_pictures
from diffattn.evaluation.networks import LPIPS_WEIGHTS, OF_PAIRS, OF_PROMPTS, Networks, asked_for
from diffattn.evaluation.picture_set import PictureSet, ProgressBar, no_progress, open_pictures
from diffattn.evaluation.quality import QualityResult
from diffattn.evaluation.references import Source, open_reference
from diffattn.evaluation.run_folder import RunFolder, processes
from diffattn.evaluation.scored import Scored
from diffattn.evaluation.worst_pairs import WorstPairs, save_sheet
from diffattn.files import write_json
from diffattn.metrics.adm import write_pictures
from diffattn.metrics.extractors import FeatureExtractor, load_extractor
from diffattn.metrics.reference import Reference
from diffattn.patching.recipe import read_recipe

RESULT = "result.json"


def evaluate(
    subject: DiffusionPipeline | str | Path,
    reference: str | Path | Reference | None = None,
    *,
    folder: str | Path,
    config: EvaluateConfig | None = None,
    draw: DrawConfig | None = None,
    acceleration: Mapping[str, Any] | None = None,
    paired: bool | str | Path = False,
    name: str | None = None,
    npz: str | Path | None = None,
    progress: ProgressBar = no_progress,
) -> QualityResult:
    """Score pictures, or what a pipeline draws. Call it again with the same folder to resume an interrupted run.

    Under `accelerate launch` or torchrun the processes share the work and the folder, which all of them must be able to
    access; the result is the same as with one process, and all of them return it.

    Drawn pictures that a safety checker blanked, and those with NaN or infinite values, are counted in a warning and
    left out of every score; `details["blanked"]` and `details["not_finite"]` list their seeds.

    Args:
        subject: a pipeline on its device, patched or not; or pictures: a folder, a zip, or an ADM `.npz`.
        reference: see `open_reference`. With it: FID, KID, FID∞, precision, recall, sFID, as far as pictures and
            reference allow (the others are in `details["left_out"]`, with the reason). Without it no extractor is used.
        folder: for pictures, features and `result.json`.
        config: see `EvaluateConfig`.
        draw: what a pipeline draws.
        acceleration: arguments of `diffattn.patch` for a pipeline; None: as it is.
        paired: True compares with what the pipeline draws from the same seeds without the acceleration. A path: with
            these pictures, paired by name, number or order, see `match`. Either: PSNR, PSNR of the foreground, SSIM,
            LPIPS, CLIP-I, DINO-I; and, of a pipeline's pair, the relative error of the latents.
        name: what the result calls the subject.
        npz: also write the pictures, and the class numbers of a SiT's, to this ADM file.
        progress: see `ProgressBar`.

    Returns:
        The result, also written to `result.json`; the worst pairs are in `worst_pairs.png`. Its protocol contains
        everything that the figures depend on, except the subject.

    Raises:
        ValueError: fewer than 2 pictures, or fewer than 2 that are neither blanked nor NaN; unreadable ones without
            `skip_bad`; pictures, reference and pairs of several sizes; NaN in features, scores or the reference;
            nothing to measure; a folder that holds a run under another protocol; as `load_extractor`, `ClipScore`,
            `Lpips` and `diffattn.patch`.
    """
    config, draw = config or EvaluateConfig(), draw or DrawConfig()
    is_pipeline = isinstance(subject, DiffusionPipeline)
    if is_pipeline:
        draw = with_own_values(subject, draw)
    if (alone := asked_for(config, (*OF_PAIRS, LPIPS_WEIGHTS))) and not paired:
        raise ValueError(f"there are no pairs for {' and '.join(alone)}: give paired, or pictures to compare with")
    if reference is None and not paired and not asked_for(config, OF_PROMPTS):
        raise ValueError("there is nothing to measure: give a reference, a model for clip or pickscore, or paired")
    if acceleration is not None and not is_pipeline:
        raise ValueError("pictures cannot be accelerated: acceleration is for a pipeline")
    if paired is True and acceleration is None:
        raise ValueError("paired=True compares with and without the acceleration: give one, or a path of pictures")
    if acceleration is not None and isinstance(acceleration.get("recipe"), str | Path):
        acceleration = {**acceleration, "recipe": read_recipe(acceleration["recipe"])}
    job = _Evaluation(subject, config, draw, acceleration, paired, progress)
    result = job.run(reference, Path(folder), name)
    if npz is not None:
        job.export(npz)
    return result


class _Evaluation:
    """One evaluation."""

    def __init__(
        self,
        subject: Any,
        config: EvaluateConfig,
        draw: DrawConfig,
        acceleration: Any,
        paired: Any,
        progress: ProgressBar,
    ) -> None:
        self.config, self.draw, self.acceleration, self.paired = config, draw, acceleration, paired
        self.pipe: Any = subject if isinstance(subject, DiffusionPipeline) else None
        self.among, device = processes(torch.device(config.device if self.pipe is None else self.pipe.device))
        self.device = device if self.pipe is None else self.pipe.device
        self.progress = progress if self.among.is_main else no_progress
        self.pictures = None if isinstance(subject, DiffusionPipeline) else self._open(subject)
        self.exact = None if isinstance(paired, bool) else self._open(paired)
        self.left_out: LeftOut | None = None  # of what a pipeline draws
        self.matching: Matching | None = None
        self.prompts = self._prompts()
        self.networks = Networks.load(config, self.device)

    def _open(self, path: str | Path) -> PictureSet:
        config = self.config
        return open_pictures(
            path, side=config.side, limit=config.limit, skip_bad=config.skip_bad, progress=self.progress
        )

    def _prompts(self) -> Sequence[str] | None:
        if not asked_for(self.config, OF_PROMPTS):
            return None
        found = self.config.prompts if self.pipe is None else self.draw.prompts
        if not found or draws_classes(self.pipe):
            raise ValueError("CLIP score and PickScore need the prompts that the pictures were drawn from")
        if self.pictures is not None and not self.pictures.places:
            check_turns(self.pictures.listed, len(found))
        return found

    def run(self, reference: Any, folder: Path, name: str | None) -> QualityResult:
        extractor = source = None
        if reference is not None:
            extractor, config = self._extractor(), self.config
            source = open_reference(
                reference, extractor, side=config.side, skip_bad=config.skip_bad, progress=self.progress
            )
        self._check_sizes(source)
        self._pair()
        with accelerated(self.pipe, self.acceleration):  # refused before anything is written
            how = describe_patch(self.pipe)
        setup = self._setup(source, extractor, how)
        run = RunFolder(folder, identity(setup, self.config.seed), self.among)
        if self.pipe is not None:
            self._draw(run, source)
        assert self.pictures is not None
        found = self._scores(run, source, extractor)
        label = name or (self.pictures.name if self.pipe is None else subject_name(setup))
        if self.exact is not None and self.config.worst_pairs:
            self._show_worst(found, self.pictures, self.exact, folder, label)
        result = QualityResult(label, protocol_of(setup, self.pictures, found.options), found.scores, found.details)
        if self.among.is_main:
            write_json(folder / RESULT, result.to_dict())
        self.among.wait()
        return result

    def _show_worst(self, found: Scored, mine: PictureSet, exact: PictureSet, folder: Path, label: str) -> None:
        """Write the sheet of the worst pairs, and record them in the details."""
        titles = mine.names if self.pipe is None else drawn_titles(self.pipe, self.draw, mine.rows)
        worst = WorstPairs.of(found.values, self.config.worst_pairs)
        found.details["worst_pairs"] = worst.details(mine.rows, titles)
        if self.among.is_main:
            columns = "unaccelerated" if self.paired is True else exact.name, label
            save_sheet(worst.sheet(mine, exact, titles, columns), folder)

    def export(self, path: str | Path) -> None:
        """Write the pictures to an ADM file, and the class numbers of a SiT's."""
        pictures, labels = self.pictures, None
        assert pictures is not None
        if draws_classes(self.pipe):
            classes = subjects(self.pipe, self.draw)
            labels = torch.tensor([classes[row % len(classes)] for row in pictures.rows])
        if self.among.is_main:
            write_pictures(path, pictures.batch(0, len(pictures)), labels)
        self.among.wait()

    def _setup(
        self, source: Source | None, extractor: FeatureExtractor | None, how: dict[str, Any] | None
    ) -> Evaluated:
        exact = None if self.exact is None else self.exact.hash
        return Evaluated(
            pipe=self.pipe, draw=self.draw, acceleration=self.acceleration, files=self.pictures, prompts=self.prompts,
            exact=self.paired is True or exact, source=source, extractor=extractor,
            networks=self.networks.hashes(), side=self.config.side, device=device_label(self.device), patch=how,
        )  # fmt: skip

    def _extractor(self) -> FeatureExtractor:
        given = self.config.extractor
        if isinstance(given, FeatureExtractor):
            return given.to(self.device)
        return load_extractor(given, self.config.extractor_weights, self.device)

    def _check_sizes(self, source: Source | None) -> None:
        """Check the sizes known before drawing; `draw_set` checks the first pictures that it draws."""
        side, name = self.config.side, "the drawn pictures"
        mine = None if side is None else (side, side)
        if self.pictures is not None:
            name, mine = f"the pictures of {self.pictures.name!r}", self.pictures.size
        truth, exact = source and source.size, None if self.exact is None else self.exact.size
        of_reference = f"the pictures of {source.name!r}" if source else ""
        for what, a, other, b in ((name, mine, "the reference", truth), (name, mine, "the pairs", exact),
                                  (of_reference, truth, "the pairs", exact)):  # fmt: skip
            if a is not None and b is not None and a != b:
                raise ValueError(
                    f"{what} have {a[1]}x{a[0]} pixels, {other} {b[1]}x{b[0]}; bring both to one size (--size)"
                )

    def _pair(self) -> None:
        """Reorder the pictures to pair with to match those that are scored."""
        if self.exact is None:
            return
        names, rows, places = [picture_name(i) for i in range(self.draw.num_pictures)], None, True
        if self.pictures is not None:
            names, rows, places = self.pictures.listed, self.pictures.rows, self.pictures.places
        self.exact, self.matching = self.exact.partners_of(names, rows or range(len(names)), places)

    def _draw(self, run: RunFolder, source: Source | None) -> None:
        """The pipeline's pictures, and those without acceleration."""
        fixed = self.config.side is not None  # what is drawn is brought to this size
        sizes = [x.size for x in (source, self.exact) if x is not None and x.size is not None]
        draw_set(
            self.pipe, self.draw, run, self.acceleration, paired=self.paired is True,
            size=None if fixed or not sizes else sizes[0], progress=self.progress,
        )  # fmt: skip
        self.left_out = left_out = LeftOut.of(run, self.draw, self.paired is True)
        if run.among.is_main:
            left_out.warn()
        self.pictures = drawn_pictures(run, PICTURES, left_out, self.config.side, self.progress)
        if self.paired is True:
            self.exact = drawn_pictures(run, UNACCELERATED, left_out, self.config.side, self.progress)
        elif self.exact is not None:
            self.exact = self.exact.without(left_out.rows)

    def _scores(self, run: RunFolder, source: Source | None, extractor: FeatureExtractor | None) -> Scored:
        assert self.pictures is not None
        found = Scored(run, self.pictures, self.progress)
        if self.left_out is not None:
            found.details |= self.left_out.details()
        if made := run.decisions():
            found.details["decisions"] = made
        if source is not None and extractor is not None:
            found.against_reference(source, extractor, self.config.seed)
        found.against_prompts(self.networks, self.prompts or [])
        if self.exact is not None:
            found.in_pairs(self.exact, self.networks)
        if self.matching is not None:
            found.details["matched"] = str(self.matching)
        if self.paired is True:
            errors = run.gather(LATENTS, self.draw.num_pictures, self.draw.batch)["error"]
            assert self.left_out is not None
            found.of_latents(errors if errors.ndim < 2 else errors[self.left_out.kept])
        return found

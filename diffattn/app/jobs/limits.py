"""Limits of one job. All untrusted input is validated here, whatever the page itself allows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.app.jobs.choices import AUTOMATIC, RECIPE, accelerations, method_and_preset
from diffattn.app.jobs.naming import naming
from diffattn.app.jobs.quality_run import Measurement
from diffattn.drawing.request import MAX_SEED, Request
from diffattn.files import split_lines
from diffattn.metrics.extractors import EXTRACTORS
from diffattn.patching.recipe import read_recipe

AGAINST = (AUTOMATIC, "exact")
MAX_NUMBER = 2**16
MIN_SAMPLES = 8  # fewer make precision and recall with 3 neighbours meaningless


@dataclass(frozen=True)
class Limits:
    """The largest values of one job."""

    side: int = 1024  # pixels, width and height each
    steps: int = 100
    images: int = 8
    guidance: float = 30.0
    prompt: int = 1000  # characters
    variants: int = 4  # accelerations in one comparison
    samples: int = 256  # N, pictures of each variant whose quality is measured
    measured_models: int = 2
    measured_variants: int = 8  # of each model, beside exact attention
    prompts: int = 2000  # distinct ones in a measurement
    calls: int = 25_000  # steps of all pictures of a job together
    jobs: int = 4  # of one visitor, running or queued
    jobs_of_address: int = 16  # of one user or network address
    jobs_in_all: int = 48
    seconds: float = 3600.0  # of one job, from its turn on

    def __str__(self) -> str:
        return f"At most {self.side} pixels a side, {self.steps} steps and {self.images} pictures per job."

    def request(
        self,
        model: str,
        prompt: object,
        *,
        negative_prompt: object = None,
        acceleration: object = "automatic",
        recipe: object = None,
        steps: object = 25,
        guidance: object = None,
        width: object = None,
        height: object = None,
        seed: object = 0,
        num_images: object = 1,
    ) -> Request:
        """Turn untrusted values into a `Request`.

        Args:
            model, prompt, steps, seed, num_images: as in `Request`.
            negative_prompt: None or empty: no negative prompt.
            acceleration: see `choices.accelerations`; a recipe takes precedence.
            recipe: a file for `diffattn.patch(recipe=...)`, or its content; None: no recipe.
            guidance, width, height: None for the model's own.

        Raises:
            ValueError: naming the value and what is allowed.
        """
        method, preset = method_and_preset(acceleration) if recipe is None else (None, None)
        count = _whole("number of pictures", num_images, 1, self.images)
        found = Request(
            model=model,
            prompt=self._text("prompt", prompt),
            negative_prompt=None if negative_prompt in (None, "") else self._text("negative prompt", negative_prompt),
            method=method,
            preset=preset,
            recipe=None if recipe is None else _recipe(recipe),
            steps=_whole("steps", steps, 1, self.steps),
            guidance=None if guidance is None else _number("guidance", guidance, 0, self.guidance),
            width=None if width is None else _whole("width", width, 8, self.side),
            height=None if height is None else _whole("height", height, 8, self.side),
            num_images=count,
            seed=_whole("seed", seed, 0, MAX_SEED - count),
        )
        self.check_work(count, found.steps)
        return found

    def variants_of(self, chosen: object, with_recipe: bool = False) -> list[str]:
        """The accelerations of a comparison without duplicates, a recipe last; raises `ValueError` like `request`."""
        if not isinstance(chosen, Sequence) or isinstance(chosen, str) or not (chosen or with_recipe):
            raise ValueError(f"choose one or more accelerations to compare: {', '.join(accelerations())}")
        for name in chosen:
            method_and_preset(name)
        names = [name for name in dict.fromkeys(chosen) if name != "none"] + [RECIPE] * with_recipe
        if not 1 <= len(names) <= self.variants:
            raise ValueError(f"choose 1 to {self.variants} accelerations besides none, got {len(names)}")
        return names

    def measurement(
        self, models: object, *, accelerations: object = (), numbers: object = "", samples: object = 16,
        steps: object = 20, guidance: object = None, prompts: object = "", extractor: object = AUTOMATIC,
        against: object = AUTOMATIC, seed: object = 0,
    ) -> Measurement:  # fmt: skip
        """Turn untrusted values into a `Measurement`.

        Args:
            models: list of names, as `Models.source` takes them; their existence is not checked here.
            accelerations: list, see `choices.accelerations`; exact attention is always measured.
            numbers: of agents or mediators, as text ("16, 64").
            samples, steps, guidance, seed: numbers.
            prompts: one per line; empty: the model's own.
            extractor: a name in `EXTRACTORS`, or "automatic".
            against: one of `AGAINST`.

        Raises:
            ValueError: naming the value and what is allowed.
        """
        names = [name for name in _distinct("models", models, self.measured_models) if name]
        if not names:
            raise ValueError("choose one or more models to measure")
        ways = [way for way in _distinct("accelerations", accelerations, self.measured_variants + 1) if way != "none"]
        for way in ways:
            method_and_preset(way)
        counts = list(dict.fromkeys(_numbers(numbers)))
        most, chosen = self.measured_variants, len(ways) + len(counts)
        if not 1 <= chosen <= most:
            raise ValueError(f"choose 1 to {most} accelerations and numbers besides none, got {chosen}")
        _one_of("extractor", extractor, (AUTOMATIC, *EXTRACTORS))
        _one_of("against", against, AGAINST)
        count = _whole("number of pictures", samples, MIN_SAMPLES, self.samples)
        found = Measurement(
            tuple(names), tuple(ways), tuple(counts), count, _whole("steps", steps, 1, self.steps),
            None if guidance is None else _number("guidance", guidance, 0, self.guidance), self._lines(prompts),
            str(extractor), str(against), _whole("seed", seed, 0, MAX_SEED - 2 * count),
        )  # fmt: skip
        self.check_work(len(names) * count * (found.num_variants + 1), found.steps)  # one more for a reference
        return found

    def check_size(self, width: int, height: int) -> None:
        """Raise `ValueError` for a picture above the limit, even if the size is the model's own."""
        for name, pixels in (("width", width), ("height", height)):
            if pixels > self.side:
                raise ValueError(f"{name} {pixels} is above the limit of {self.side} pixels; give a smaller {name}")

    def check_work(self, pictures: int, steps: int) -> None:
        """Raise `ValueError` if a job is too long."""
        if pictures * steps > self.calls:
            raise ValueError(
                f"{pictures} pictures of {steps} steps are {pictures * steps} steps in all, but at most {self.calls} "
                "are allowed in one job; use fewer steps, pictures or accelerations"
            )

    def _lines(self, prompts: object) -> tuple[str, ...]:
        if not isinstance(prompts, str) or len(prompts) > self.prompts * self.prompt:
            raise ValueError("prompts must be text, one prompt per line")
        found = tuple(self._text("prompt", line.strip()) for line in split_lines(prompts) if line.strip())
        if len(found) > self.prompts:
            raise ValueError(f"at most {self.prompts} prompts, got {len(found)}")
        return found

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {type(value).__name__}")
        if len(value) > self.prompt:
            raise ValueError(f"{name} must be at most {self.prompt} characters, got {len(value)}")
        return value


def _recipe(given: Any) -> Mapping[str, Any]:
    """Like `read_recipe`, but errors name a file without its folder."""
    if not isinstance(given, str | Path):
        return read_recipe(given)
    with naming(given, Path(given).name):
        return read_recipe(given)


def _number(name: str, value: Any, least: float, most: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    if not (usable and least <= value <= most):  # false for NaN and infinities
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {str(value)[:40]}")
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {str(value)[:40]}")
    return value


def _distinct(name: str, values: object, most: int) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a list of names, got {str(values)[:40]!r}")
    found = list(dict.fromkeys(values))
    if len(found) > most:
        raise ValueError(f"choose at most {most} {name}, got {len(found)}")
    return found


def _numbers(text: object) -> list[int]:
    if not isinstance(text, str) or not re.fullmatch(r"[\d\s,]*", text) or len(text) > 200:
        raise ValueError(
            f"numbers must be whole numbers with commas between them, such as 16, 64; got {str(text)[:40]!r}"
        )
    return [_whole("number of agents or mediators", int(part), 1, MAX_NUMBER) for part in re.findall(r"\d+", text)]


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {str(value)[:40]!r}")

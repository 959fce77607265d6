"""How much one job may ask for. Everything a stranger sends is checked here, whatever the page allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.generation import MAX_SEED, Request
from diffattn.jobs.choices import accelerations, method_and_preset


@dataclass(frozen=True)
class Limits:
    """The largest values of one job."""

    side: int = 1024  # pixels, width and height each
    steps: int = 100
    images: int = 8
    guidance: float = 30.0
    prompt: int = 1000  # characters
    variants: int = 4  # accelerations in one comparison

    def __str__(self) -> str:
        return f"At most {self.side} pixels a side, {self.steps} steps and {self.images} pictures a job."

    def request(
        self,
        model: str,
        prompt: object,
        *,
        negative_prompt: object = "",
        acceleration: object = "automatic",
        steps: object = 25,
        guidance: object = None,
        width: object = None,
        height: object = None,
        seed: object = 0,
        num_images: object = 1,
    ) -> Request:
        """The request for values of any type; guidance, width and height may be None, for the model's own.

        Raises:
            ValueError: naming the value and what is allowed.
        """
        method, preset = method_and_preset(acceleration)
        count = _whole("number of pictures", num_images, 1, self.images)
        return Request(
            model=model,
            prompt=self._text("prompt", prompt),
            negative_prompt=self._text("negative prompt", negative_prompt),
            method=method,
            preset=preset,
            steps=_whole("steps", steps, 1, self.steps),
            guidance=None if guidance is None else _number("guidance", guidance, 0, self.guidance),
            width=None if width is None else _whole("width", width, 8, self.side),
            height=None if height is None else _whole("height", height, 8, self.side),
            num_images=count,
            seed=_whole("seed", seed, 0, MAX_SEED - count),
        )

    def variants_of(self, chosen: object) -> list[str]:
        """The accelerations of a comparison, each once; raises `ValueError` as `request`."""
        if not isinstance(chosen, Sequence) or isinstance(chosen, str) or not chosen:
            raise ValueError(f"choose one or more accelerations to compare: {', '.join(accelerations())}")
        for name in chosen:
            method_and_preset(name)
        names = [name for name in dict.fromkeys(chosen) if name != "none"]
        if not 1 <= len(names) <= self.variants:
            raise ValueError(f"choose 1 to {self.variants} accelerations beside none, got {len(names)}")
        return names

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {type(value).__name__}")
        if len(value) > self.prompt:
            raise ValueError(f"{name} must be at most {self.prompt} characters, got {len(value)}")
        return value


def _number(name: str, value: Any, least: float, most: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    if not (usable and least <= value <= most):  # NaN and infinities are not in between
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {str(value)[:40]}")
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {str(value)[:40]}")
    return value

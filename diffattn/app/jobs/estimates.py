"""Estimates of how long jobs will take, from the pictures drawn so far."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from diffattn.app.jobs.choices import Models
from diffattn.app.jobs.compare import WARM_STEPS, requests_of
from diffattn.app.jobs.limits import Limits
from diffattn.app.jobs.pace import Pace
from diffattn.app.jobs.quality_run import Measurement
from diffattn.app.jobs.speed_quality import has_reference, variants_of
from diffattn.app.jobs.suited import own_method
from diffattn.drawing.request import UNPATCHED, Request
from diffattn.drawing.sizes import check_multiple, default_size, size_unit
from diffattn.methods import METHODS
from diffattn.patching.default_method import default_method


@dataclass(frozen=True)
class _Own:
    """What is only known of a model on the hub once it has been loaded."""

    method: str | None = None  # its default one
    size: tuple[int, int] | None = None  # width, height in pixels that it was trained for
    unit: int = 1  # pixels that both must be multiples of

    @classmethod
    def of(cls, pipe: Any) -> Self:
        try:
            return cls(default_method(pipe), default_size(pipe), size_unit(pipe))
        except (TypeError, ValueError, AttributeError):  # a pipeline that cannot be accelerated, or has no size
            return cls()


class Estimates:
    """Seconds that jobs will take on this machine.

    Args:
        models: the available ones.
        limits: of one job; jobs above them get no estimate.
    """

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models, self._limits = models, limits
        self._pace = Pace()
        self._own: dict[str, _Own] = {}  # of models that were loaded once
        self.learn = self._pace.learn

    def loaded(self, name: str, pipe: Any) -> None:
        """Remember what a model declares about itself once it is loaded."""
        self._own[name] = _Own.of(pipe)

    def seconds_for(self, request: Request, pictures: int | None = None) -> float | None:
        """Estimated seconds for a job, see `Pace`; None until the model has drawn a picture of this size.

        Args:
            request: what is drawn, and how.
            pictures: how many in all; None: those of the request.

        Raises:
            ValueError: a size or an amount of work above the limits; a size that a model once loaded cannot draw.
        """
        count = request.num_images if pictures is None else pictures
        place, own = self._models.place(request.model), self._own.get(request.model, _Own())
        size = self._models.describe(request.model).size or own.size or (None, None)
        width, height = request.width or size[0], request.height or size[1]
        self._limits.check_work(count, request.steps)
        if width is None or height is None:
            return None
        self._limits.check_size(width, height)
        check_multiple(own.unit, width, height)
        if request.method is None and request.recipe is None:  # as `prepare` fills it in
            request = replace(request, method=own_method(place) or own.method, preset="balanced")
        one = self._pace.seconds(request, width, height)
        return None if one is None else one * count

    def seconds_to_compare(self, request: Request, names: Sequence[str]) -> float | None:
        """Estimated seconds for a comparison; raises as `seconds_for`."""
        self._limits.check_work(request.num_images * (1 + len(names)), request.steps)
        ways = requests_of(request, names).values()
        return _sum(self._with_warm_up(way, request.num_images) for way in ways)

    def _with_warm_up(self, way: Request, pictures: int) -> float | None:
        """Estimated seconds for some pictures drawn with one acceleration, including its warm-up."""
        warm = self.seconds_for(replace(way, steps=min(WARM_STEPS, way.steps)), 1)
        return _sum([warm, self.seconds_for(way, pictures)])

    def seconds_to_measure(self, asked: Measurement) -> float | None:
        """Estimate for a measurement; None before each of its models has drawn a picture.

        Raises:
            ValueError: as `seconds_for`; an extractor that is not available here.
        """
        found: list[float | None] = []
        for name in asked.models:
            request = Request(name, "", steps=asked.steps)
            method = own_method(self._models.place(name)) or next(iter(METHODS))
            found += [self._with_warm_up(way, asked.samples) for way in variants_of(method, request, asked).values()]
            if not has_reference(name, asked, self._models):
                found.append(self.seconds_for(replace(request, method=UNPATCHED), asked.samples))
        return _sum(found)


def _sum(seconds: Iterable[float | None]) -> float | None:
    """The sum; None if any of them is None."""
    found = list(seconds)
    return None if None in found else sum(one for one in found if one is not None)

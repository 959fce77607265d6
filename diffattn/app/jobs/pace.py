"""How fast a model draws on this machine, learned from the pictures it has drawn."""

from diffattn.drawing.request import UNPATCHED, Request

PIXELS = 256 * 256


class Pace:
    """Seconds of one step of 256x256 pixels, per model.

    Taken from the latest exact picture, or from an accelerated one until there is an exact one. Estimates
    therefore hold for exact attention, and accelerated runs take less.
    """

    def __init__(self) -> None:
        self._exact: dict[str, float] = {}
        self._accelerated: dict[str, float] = {}

    def learn(self, request: Request, seconds: float) -> None:
        """Learn from a whole picture; the device must be synchronised at its end.

        Args:
            request: as returned by `prepare`.
            seconds: of the picture.
        """
        assert request.width is not None
        assert request.height is not None
        known = self._exact if request.method == UNPATCHED else self._accelerated
        known[request.model] = seconds / request.steps * PIXELS / (request.width * request.height)

    def seconds(self, model: str, pixels: int, steps: int) -> float | None:
        """Estimated seconds for `steps` steps of `pixels` pixels; None until the model has drawn something."""
        pace = self._exact.get(model, self._accelerated.get(model))
        return None if pace is None else pace * pixels / PIXELS * steps

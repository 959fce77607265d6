"""The demo's second part: a SiT draws the same classes with all, few, and step-wise dynamic mediators."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffattn.drawing.batch import NotFinite, draw_batch
from diffattn.drawing.draw import own_guidance
from diffattn.drawing.loading import load_demo
from diffattn.measure.interleave import Timings, interleave
from diffattn.patching.patch import patch

MODEL = "emoji-sit"


@dataclass(frozen=True)
class MediatorRow:
    """The pictures of one way to draw."""

    name: str  # "64 mediators", "dynamic", "4 mediators"
    seconds: float  # for one picture, median over the classes
    speedup: float  # over the largest number of mediators on the same class, median
    pictures: Tensor  # [P, 3, H, W] in 0..1

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return {"name": self.name, "seconds": self.seconds, "speedup": self.speedup}


class Mediators:
    """The embedded SiT, ready to draw.

    Args:
        names: of the classes, one picture each.
        steps: Euler steps of each picture.
        seed: of every picture.
        device, dtype: to draw on and in.

    Raises:
        ValueError: an unknown class.
    """

    def __init__(self, names: Sequence[str], steps: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.pipe: Any = load_demo(MODEL, dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.classes = self.pipe.get_label_ids(list(names))
        self.settings = {"num_inference_steps": steps, "guidance_scale": own_guidance(self.pipe, MODEL)}
        self.seed, self.device = seed, device
        learned = self.pipe.transformer.mediators
        self.rows: Mapping[str, int | None] = {  # None: by the time step
            f"{learned[-1]} mediators": learned[-1],
            "dynamic": None,
            f"{learned[0]} mediators": learned[0],
        }

    @property
    def num_pictures(self) -> int:
        """Number of pictures that `run` draws, including the warm-up."""
        return len(self.rows) * (1 + len(self.classes))

    def run(self, on_picture: Callable[[], None] = lambda: None) -> tuple[MediatorRow, ...]:
        """Draw every class in every way, alternating; the first class is drawn once more, uncounted, as a warm-up.

        Raises:
            NotFinite: a picture has NaN or infinite values.
        """
        timings: list[Timings] = []
        pictures: dict[str, list[Tensor]] = {name: [] for name in self.rows}
        for i, label in enumerate(self.classes):
            seen: dict[str, Tensor] = {}

            def draw(name: str, label: int = label, seen: dict[str, Tensor] = seen) -> None:
                seen[name] = self._draw(label)
                on_picture()

            calls = {name: partial(draw, name) for name in self.rows}
            timings.append(interleave(calls, 1, warmup=int(i == 0), device=self.device, around=self._applied))
            for name, picture in seen.items():
                pictures[name].append(picture)
        together = Timings(next(iter(self.rows)), tuple(r for times in timings for r in times.rounds))
        return tuple(
            MediatorRow(name, together.seconds(name).median, together.speedup(name), torch.cat(pictures[name]))
            for name in self.rows
        )

    @contextmanager
    def _applied(self, name: str) -> Iterator[None]:
        """Draw in the named way within the block."""
        number = self.rows[name]
        if number is not None:
            self.pipe.transformer.set_num_mediators(number)
            yield
            return
        with patch(self.pipe):  # with the method that suits it: mediators by the noise level
            yield

    def _draw(self, label: int) -> Tensor:
        """The picture [1, 3, H, W] in 0..1, on the CPU."""
        batch = draw_batch(self.pipe, [label], [self.seed], self.settings)
        if not batch.finite[0]:
            raise NotFinite(self.pipe, self.seed)
        return batch.images

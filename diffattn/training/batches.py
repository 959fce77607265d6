"""Batches that depend on (seed, step) alone.

Shapes: N samples, G of a global batch, b = G/P of one process, S the side of a picture, latents [c, h, w].
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffattn.data.datasets import InMemoryDataset, LabelledDataset
from diffattn.training.random import FLIP, LATENT_NOISE, SHUFFLE, step_generator


class Batches:
    """The batches of each process in each step.

    Every epoch is a new shuffle of all samples; batches may span two epochs, so no sample is dropped.
    Step k depends on (seed, k) only: a resumed run continues with the very same batches, and P processes together see,
    in rank order, what a single process would.

    Attributes:
        dataset: the samples.
        batch_size: G.
        local_batch_size: b.
        fingerprint: of the data.
        steps_per_epoch: N/G, rounded up.
    """

    def __init__(
        self,
        dataset: LabelledDataset,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        flip: bool = True,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        """
        Args:
            dataset: pictures, on demand or in memory, or latents.
            batch_size: samples per step, over all processes.
            seed: of the run.
            rank: of this process, 0 to world_size - 1.
            world_size: P.
            flip: mirror each sample left to right with probability 1/2.
            num_workers: prefetching processes, unless the data are in memory; 0 reads in this process.
            device: of the batches.

        Raises:
            ValueError: an empty data set, a batch size that the processes cannot share, or a number out of range.
        """
        if not len(dataset):
            raise ValueError("the data set is empty")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of {world_size}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of {world_size} processes, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        step_generator(seed, 0)  # refuses a seed out of range
        self.dataset, self.batch_size, self.seed, self.flip = dataset, batch_size, seed, flip
        self.local_batch_size = batch_size // world_size
        self.rows = slice(rank * self.local_batch_size, (rank + 1) * self.local_batch_size)
        self.num_workers = 0 if isinstance(dataset, InMemoryDataset) else num_workers
        self.device = torch.device(device)
        self.fingerprint = dataset.fingerprint
        self.steps_per_epoch = ceil(len(dataset) / batch_size)
        self._shuffles: dict[int, Tensor] = {}  # of the last two epochs

    def epoch(self, step: int) -> float:
        """The number of times that all samples have been seen before this step."""
        return step * self.batch_size / len(self.dataset)

    def indices(self, step: int) -> Tensor:
        """The samples of a step for all processes, int64 [G]."""
        count = len(self.dataset)
        start, parts = step * self.batch_size, []
        stop = start + self.batch_size
        while start < stop:
            epoch, at = divmod(start, count)
            parts.append(self._shuffle(epoch)[at : at + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def mirrored(self, step: int) -> Tensor:
        """Which samples of a step are mirrored, for all processes, bool [G]."""
        if not self.flip:
            return torch.zeros(self.batch_size, dtype=torch.bool)
        return torch.rand(self.batch_size, generator=step_generator(self.seed, step, FLIP)) < 0.5

    def iterate(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches from a step on, endlessly.

        Yields:
            x, float32: pictures in -1 ... 1 [b, 3, S, S], or latents [b, c, h, w] as the model takes them, drawn from
            the moments and scaled; and the class ids y, int64 [b]. Both on the device.

        Raises:
            ValueError: a picture cannot be read; the message names it.
        """
        steps = _Steps(self)
        if not self.num_workers:
            batches = map(steps.__getitem__, _Count(start_step))
        else:
            batches = DataLoader(
                steps,
                batch_size=None,
                sampler=_Count(start_step),
                num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # leaves the global generator alone
            )
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            x, y = (part.to(self.device, non_blocking=True) for part in batch)
            yield (x if x.is_floating_point() else x.float().div_(127.5).sub_(1)), y

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's samples of a step in the data set's format, on the CPU: pictures are uint8."""
        indices = self.indices(step)[self.rows]
        noise = None
        if self.dataset.needs_noise:
            generator = step_generator(self.seed, step, LATENT_NOISE)
            noise = torch.randn(self.batch_size, *self.dataset.shape, generator=generator)[self.rows]
        return self.dataset.fetch(indices, self.mirrored(step)[self.rows], noise), self.dataset.labels[indices]

    def _shuffle(self, epoch: int) -> Tensor:
        """The order of the samples in an epoch, int64 [N]."""
        if epoch not in self._shuffles:
            order = torch.randperm(len(self.dataset), generator=step_generator(self.seed, epoch, SHUFFLE))
            self._shuffles = dict([*self._shuffles.items()][-1:]) | {epoch: order}
        return self._shuffles[epoch]


class _Count:
    """Counts start, start + 1, …; every iteration starts over."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


class _Steps(Dataset):
    """Step -> batch, for workers. Errors are passed on unchanged, so that their messages stay one line."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | ValueError:
        try:
            return self.batches.load(step)
        except ValueError as error:
            return error

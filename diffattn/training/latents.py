"""Latents of pictures, encoded once and cached on disk, by one process or by all of a run."""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from diffattn.data.datasets import ImageDataset, InMemoryDataset, OnProgress
from diffattn.training.encode import Encoding, vae_hash
from diffattn.training.latent_dataset import LatentDataset
from diffattn.training.processes import on_main, together
from diffattn.training.signals import StopRequest

__all__ = ["LatentDataset", "cache_latents", "cache_together", "vae_hash"]


def cache_latents(
    dataset: ImageDataset | InMemoryDataset,
    vae: nn.Module,
    folder: str | Path,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: OnProgress | None = None,
    shard_size: int = 2048,
    num_workers: int = 0,
) -> LatentDataset:
    """Encode every picture and its mirror image, continue a partial cache, or open a complete one.

    For one process; several share the work in `cache_together`. The folder then holds an `index.json`,
    `labels.safetensors` and shards, each written under a temporary name and then renamed, so that every file is whole.
    Standard deviations are stored rather than their logarithms: in float16, tiny ones are then off by less than 4e-8.

    Args:
        dataset, vae, folder, batch_size, device, shard_size, num_workers: see `Encoding`.
        progress: called with the number of pictures done and the total.

    Raises:
        ValueError: the folder holds a cache of other data or another autoencoder, the autoencoder gives something
            that is not finite in float16, or a picture cannot be read.
        TypeError: an autoencoder of another kind.
        OSError: the folder cannot be written; its complete shards are reused later.
    """
    encoding = Encoding(dataset, vae, Path(folder), batch_size, device, shard_size, num_workers)
    size = encoding.begin()
    missing = encoding.missing(size)
    done = len(dataset) - sum(_pictures_in(shard, size, len(dataset)) for shard in missing)
    if progress is not None and done:
        progress(done, len(dataset))
    for shard in missing:
        for pictures in encoding.encode(shard, size):
            done += pictures
            if progress is not None:
                progress(done, len(dataset))
    return LatentDataset(folder)


def cache_together(
    encoding: Encoding, accelerator: Accelerator, stop: StopRequest, progress: OnProgress | None = None
) -> LatentDataset:
    """Encode pictures like `cache_latents`, sharing the missing shards among all processes of a run.

    With folders on local disks, each process then encodes what its own disk still lacks.

    Args:
        encoding: what to do.
        accelerator: of the run; every process must call this.
        stop: a signal ends the work after the current batch; written shards are kept.
        progress: called with the number of pictures done and the total.

    Raises:
        ValueError, TypeError, OSError: as `cache_latents`, on every process.
        Stopped: a signal arrived.
    """
    on_main(accelerator, encoding.begin)  # alone, so that no process sees a partial cache

    def pieces(among: slice) -> Iterator[int]:
        """Encode this process's share of the missing shards, batch by batch."""
        size = encoding.begin()
        mine = encoding.missing(size)[among]
        yield 0  # every process checks before the first one writes
        for shard in mine:
            yield from encoding.encode(shard, size)

    count = len(encoding.dataset)
    rank, processes = accelerator.process_index, accelerator.num_processes

    def report(done: int) -> None:
        if progress is not None:
            progress(done, count)

    together(accelerator, pieces(slice(rank, None, processes)), stop, report)
    together(accelerator, pieces(slice(None)), stop)
    return LatentDataset(encoding.folder)


def _pictures_in(shard: int, shard_size: int, count: int) -> int:
    return min(shard_size, count - shard * shard_size)

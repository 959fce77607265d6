"""Latents of pictures, encoded once and kept on disk.

Shapes: N pictures, 2 for the picture and its mirror image, c latent channels, h×w the latent grid.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffattn.data.datasets import ImageDataset, InMemoryDataset, LabelledDataset, Progress
from diffattn.files import read_json, write_json, write_whole

FORMAT = 1
INDEX, LABELS = "index.json", "labels.safetensors"
_IDENTITY = {
    "format": "layout of the cache",
    "fingerprint": "data set",
    "size": "picture size",
    "vae": "autoencoder",
    "scaling_factor": "scaling factor",
    "shift_factor": "shift factor",
}
"""What must agree for a cache to be used again, and what messages call it."""


class LatentDataset(LabelledDataset):
    """The normal distributions that an autoencoder gives for every picture, memory-mapped.

    Made by `cache_latents`; `LatentDataset(folder)` opens a complete cache again. It can be pickled and used in worker
    processes. The attributes are those of the data set it was made of, and:

    Attributes:
        shape: (c, h, w).
        size: side of the pictures in pixels.
        scaling_factor, shift_factor: what makes the latents those of a model: (z - shift)·scaling.
        vae: SHA-256 of the autoencoder's weights.
    """

    needs_noise = True

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            ValueError: no cache in the folder, an incomplete one, or one of another format.
        """
        self.folder = Path(folder)
        index = read_json(self.folder / INDEX)
        if index.get("format") != FORMAT:
            raise ValueError(f"the cache {str(folder)!r} is of format {index.get('format')}, needed is {FORMAT}")
        self.shard_size: int = index["shard_size"]
        self.shards = [_shard_name(i) for i in range(-(-index["count"] // self.shard_size))]
        missing = [name for name in self.shards if not (self.folder / name).exists()]
        if missing:
            raise ValueError(
                f"the cache {str(folder)!r} is incomplete: {len(missing)} of {len(self.shards)} shards are missing; "
                "make it again with the same data and autoencoder, which goes on where it stopped"
            )
        self.class_names = tuple(index["class_names"])
        self.labels = load_file(self.folder / LABELS)["labels"]
        self.fingerprint: str = index["fingerprint"]
        self.vae: str = index["vae"]
        self.size: int = index["size"]
        self.scaling_factor: float = index["scaling_factor"]
        self.shift_factor: float = index["shift_factor"]
        c, h, w = index["shape"]
        self.shape = (c, h, w)
        self._open: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Mean and standard deviation, stacked along the channels, of the picture and of its mirror image, and the
        class id: float16 [2, 2c, h, w], int.

        Raises:
            IndexError: no such picture.
        """
        index = range(len(self))[index]
        shard, row = divmod(index, self.shard_size)
        return self._moments(shard)[row], int(self.labels[index])

    def fetch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None = None) -> Tensor:
        sides = mirrored.long().tolist()
        chosen = [self[i][0][side] for i, side in zip(indices.tolist(), sides, strict=True)]
        mean, std = torch.stack(chosen).float().chunk(2, dim=1)
        z = mean if noise is None else mean + std * noise
        return (z - self.shift_factor) * self.scaling_factor

    def _moments(self, shard: int) -> Tensor:
        if shard not in self._open:
            with safe_open(self.folder / self.shards[shard], framework="pt") as file:
                self._open[shard] = file.get_tensor("moments")
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def cache_latents(
    dataset: ImageDataset | InMemoryDataset,
    vae: nn.Module,
    folder: str | Path,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    shard_size: int = 2048,
    num_workers: int = 0,
) -> LatentDataset:
    """Encode every picture and its mirror image, or go on where a killed run stopped, or open what is complete.

    Call it in one process at a time. The folder then holds an `index.json`, `labels.safetensors` and shards, each
    written beside its place and moved there, so that what is there is whole. Standard deviations are kept, not their
    logarithms: float16 then errs by less than 4e-8 where they are tiny.

    Args:
        dataset: the pictures.
        vae: an `AutoencoderKL`, or another whose `encode(x).latent_dist` has a mean and a standard deviation. It is
            moved to the device and runs in its own dtype.
        folder: of the cache.
        batch_size: pictures that are encoded at once.
        device: to encode on.
        progress: called with the number of pictures done and the number of all.
        shard_size: pictures in a file; a cache that has begun keeps its own.
        num_workers: processes that decode pictures.

    Raises:
        ValueError: the folder holds a cache of other data or another autoencoder, the autoencoder gives something
            that is not finite in float16, or a picture cannot be read.
        TypeError: an autoencoder of another kind.
    """
    folder, device = Path(folder), torch.device(device)
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size and shard_size must be at least 1, got {batch_size} and {shard_size}")
    vae = vae.to(device)
    index = _begin(folder, dataset, vae, shard_size)
    size, count = index["shard_size"], len(dataset)
    for number, start in enumerate(range(0, count, size)):
        stop, path = min(start + size, count), folder / _shard_name(number)
        if not path.exists():
            parts = [torch.arange(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]
            loader = DataLoader(
                _Parts(dataset, parts), batch_size=None, num_workers=num_workers, generator=torch.Generator()
            )
            moments = []
            for part, pictures in zip(parts, loader, strict=True):
                moments.append(_encode(vae, pictures, part, device))
                if progress is not None:
                    progress(int(part[-1]) + 1, count)
            _write_tensors(path, {"moments": torch.cat(moments)})
        elif progress is not None:
            progress(stop, count)
    return LatentDataset(folder)


def _begin(folder: Path, dataset: LabelledDataset, vae: Any, shard_size: int) -> dict[str, Any]:
    """The index of the cache, which is written if there is none. What a killed run left half written is removed."""
    index = _index(dataset, vae, shard_size)
    if (folder / INDEX).exists():
        index = _checked(folder, index)
    elif any(folder.glob("shard-*.safetensors")):
        raise ValueError(f"{str(folder)!r} holds shards without an {INDEX}; choose another folder, or delete this one")
    else:
        index["shape"] = list(_latent_shape(vae, dataset.shape))
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(folder / LABELS, {"labels": dataset.labels.contiguous()})
        write_json(folder / INDEX, index)
    for stale in folder.glob(".*.part"):
        stale.unlink(missing_ok=True)
    return index


class _Parts(Dataset):
    """Pictures by batches, uint8 [b, 3, S, S], for workers. An error is handed over as it is."""

    def __init__(self, dataset: LabelledDataset, parts: list[Tensor]) -> None:
        self.dataset, self.parts = dataset, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        part = self.parts[index]
        try:
            return self.dataset.fetch(part, torch.zeros(len(part), dtype=torch.bool))
        except ValueError as error:
            return error


def _encode(vae: Any, pictures: Tensor | ValueError, indices: Tensor, device: torch.device) -> Tensor:
    """Float16 [b, 2, 2c, h, w] on the CPU."""
    if isinstance(pictures, ValueError):
        raise pictures
    x = pictures.to(device).float().div_(127.5).sub_(1)
    moments = torch.stack([_moments(vae, x), _moments(vae, x.flip(-1))], dim=1).half().cpu()
    if not moments.isfinite().all():
        wrong = indices[~moments.flatten(1).isfinite().all(1)]
        raise ValueError(
            f"the autoencoder gives numbers that are not finite in float16 for picture {int(wrong[0])}"
            f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; if its own dtype is float16, use float32"
        )
    return moments


@torch.no_grad()
def _moments(vae: Any, x: Tensor) -> Tensor:
    """Mean and standard deviation [b, 2c, h, w] of pictures in -1 ... 1."""
    training = vae.training
    vae.eval()
    try:
        output = vae.encode(x.to(next(vae.parameters()).dtype))
    finally:
        vae.train(training)
    if not hasattr(output, "latent_dist"):
        raise TypeError(f"{type(vae).__name__} gives no latent_dist; use an AutoencoderKL")
    return torch.cat([output.latent_dist.mean, output.latent_dist.std], dim=1).float()


def _latent_shape(vae: Any, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(c, h, w), by encoding a black picture."""
    _, channels, h, w = _moments(vae, torch.zeros(1, *shape, device=next(vae.parameters()).device)).shape
    return channels // 2, h, w


def _index(dataset: LabelledDataset, vae: Any, shard_size: int) -> dict[str, Any]:
    """All of the index but the shape of the latents."""
    return {
        "format": FORMAT,
        "fingerprint": dataset.fingerprint,
        "size": dataset.shape[-1],
        "vae": vae_hash(vae),
        "scaling_factor": vae.config.get("scaling_factor") or 1.0,
        "shift_factor": vae.config.get("shift_factor") or 0.0,
        "count": len(dataset),
        "shard_size": shard_size,
        "class_names": list(dataset.class_names),
    }


def _checked(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The index that is there; `ValueError` naming how it differs from the one that is wanted."""
    found = read_json(folder / INDEX)
    differing = [
        f"{text} ({str(found.get(key))[:12]}, now {str(wanted[key])[:12]})"
        for key, text in _IDENTITY.items()
        if found.get(key) != wanted[key]
    ]
    if differing:
        raise ValueError(
            f"the latents in {str(folder)!r} are of another {', another '.join(differing)}; "
            "choose another folder, or delete this one"
        )
    return found


def vae_hash(vae: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of the weights, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(save({name: tensor.detach().cpu().contiguous()}))
    return digest.hexdigest()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the file at once, after it has reached the disk."""
    write_whole(path, lambda part: save_file(tensors, part), flush=True)

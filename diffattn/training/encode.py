"""Encodes pictures into latents on disk, shard by shard.

Shapes: 2 for the picture and its mirror image, c latent channels, h×w the latent grid, b pictures of a batch.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffattn.data.datasets import ImageDataset, InMemoryDataset, LabelledDataset
from diffattn.files import CannotWrite, read_json, write_json, write_whole
from diffattn.training.latent_dataset import FORMAT, INDEX, LABELS, shard_name

STALE = 3600.0
"""Seconds after which a half-written file counts as abandoned."""

_IDENTITY = {
    "format": "layout of the cache",
    "fingerprint": "data set",
    "size": "picture size",
    "vae": "autoencoder",
    "scaling_factor": "scaling factor",
    "shift_factor": "shift factor",
}
"""Index key -> its name in messages; all must match for a cache to be reused."""


@dataclass(frozen=True)
class Encoding:
    """How pictures are encoded, and where the latents are stored.

    Args:
        dataset: the pictures.
        vae: an `AutoencoderKL`, or another whose `encode(x).latent_dist` has a mean and a standard deviation. It is
            moved to the device and runs in its own dtype.
        folder: of the cache.
        batch_size: pictures encoded at once.
        device: to encode on.
        shard_size: pictures per file; an existing cache keeps its own value.
        num_workers: processes that decode pictures.

    Raises:
        ValueError: a size below 1.
    """

    dataset: ImageDataset | InMemoryDataset
    vae: Any
    folder: Path
    batch_size: int = 32
    device: str | torch.device = "cpu"
    shard_size: int = 2048
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_size < 1:
            raise ValueError(
                f"batch_size and shard_size must be at least 1, got {self.batch_size} and {self.shard_size}"
            )

    def begin(self) -> int:
        """Write the index and the labels, or check existing ones. Returns the number of pictures per shard.

        Raises:
            ValueError: the folder holds a cache of other data or another autoencoder.
            OSError: it cannot be written.
        """
        self.vae.to(self.device)
        return _begin(self.folder, self.dataset, self.vae, self.shard_size)["shard_size"]

    def missing(self, shard_size: int) -> list[int]:
        """The shards missing from the folder."""
        numbers = range(-(-len(self.dataset) // shard_size))
        return [number for number in numbers if not (self.folder / shard_name(number)).exists()]

    def encode(self, shard: int, shard_size: int) -> Iterator[int]:
        """Encode a shard, yielding the number of pictures after every batch; writes it when advanced past the last."""
        start, stop = shard * shard_size, min((shard + 1) * shard_size, len(self.dataset))
        parts = [torch.arange(at, min(at + self.batch_size, stop)) for at in range(start, stop, self.batch_size)]
        loader = DataLoader(
            _Parts(self.dataset, parts), batch_size=None, num_workers=self.num_workers, generator=torch.Generator()
        )
        moments = []
        for part, pictures in zip(parts, loader, strict=True):
            moments.append(_encode(self.vae, pictures, part, torch.device(self.device)))
            yield len(part)
        _write_tensors(self.folder / shard_name(shard), {"moments": torch.cat(moments)})


def _begin(folder: Path, dataset: LabelledDataset, vae: Any, shard_size: int) -> dict[str, Any]:
    """The index of the cache, written if there is none. Removes half-written files of killed runs."""
    index = _index(dataset, vae, shard_size)
    if (folder / INDEX).exists():
        index = _checked(folder, index)
    elif any(folder.glob("shard-*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} contains shards without an {INDEX}; choose another folder, or delete this one"
        )
    else:
        index["shape"] = list(_latent_shape(vae, dataset.shape))
        _make(folder)
        _write_tensors(folder / LABELS, {"labels": dataset.labels.contiguous()})
        write_json(folder / INDEX, index)
    for part in folder.glob(".*.part"):
        if not _in_use(part):
            part.unlink(missing_ok=True)
    return index


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the folder of the cached latents (data.cache) cannot be created at {str(folder)!r}: {error.strerror}"
        ) from error


def _in_use(part: Path) -> bool:
    """Whether another process, of this run or another, may still be writing a file."""
    by_write_whole = re.search(r"\.[a-z0-9_]{8}\.part$", part.name)
    try:
        return by_write_whole is not None and time.time() - part.stat().st_mtime < STALE
    except OSError:  # it is gone
        return True


class _Parts(Dataset):
    """Batches of pictures, uint8 [b, 3, S, S], for workers. Errors are passed on unchanged."""

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
            f"the autoencoder gives values that are not finite in float16 for picture {int(wrong[0])}"
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
    """The index without the shape of the latents."""
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
    """The existing index; raises `ValueError` naming how it differs from `wanted`."""
    found = read_json(folder / INDEX)
    differing = [
        f"{text} ({str(found.get(key))[:12]}, now {str(wanted[key])[:12]})"
        for key, text in _IDENTITY.items()
        if found.get(key) != wanted[key]
    ]
    if differing:
        raise ValueError(
            f"the latents in {str(folder)!r} were made with another {', another '.join(differing)}; "
            "choose another folder, or delete this one"
        )
    return found


def vae_hash(vae: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of the weights, on whatever device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(save({name: tensor.detach().cpu().contiguous()}))
    return digest.hexdigest()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the file atomically, once its contents are on disk."""
    try:
        write_whole(path, lambda part: save_file(tensors, part), flush=True)
    except CannotWrite as error:
        raise OSError(
            f"the latents could not be written to {str(path.parent)!r}: {error.strerror}; "
            "complete shards will be reused"
        ) from error

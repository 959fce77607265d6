"""Latents of pictures, read from the cache that `diffattn.training.latents` writes.

Shapes: N pictures, 2 for the picture and its mirror image, c latent channels, h×w the latent grid.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffattn.data.datasets import LabelledDataset
from diffattn.files import read_json

FORMAT = 1
INDEX, LABELS = "index.json", "labels.safetensors"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class LatentDataset(LabelledDataset):
    """An autoencoder's normal distribution for every picture, memory-mapped.

    Made by `cache_latents`; `LatentDataset(folder)` opens a complete cache again. It can be pickled and used in worker
    processes. The attributes are those of the original data set, and:

    Attributes:
        shape: (c, h, w).
        size: side of the pictures in pixels.
        scaling_factor, shift_factor: map the latents to the model's: (z - shift)·scaling.
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
            raise ValueError(f"the cache {str(folder)!r} has format {index.get('format')}, but {FORMAT} is needed")
        self.shard_size: int = index["shard_size"]
        self.shards = [shard_name(i) for i in range(-(-index["count"] // self.shard_size))]
        missing = [name for name in self.shards if not (self.folder / name).exists()]
        if missing:
            raise ValueError(
                f"the cache {str(folder)!r} is incomplete: {len(missing)} of {len(self.shards)} shards are missing; "
                "repeat the encoding with the same data and autoencoder, which adds the rest"
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
            IndexError: there is no picture with this index.
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

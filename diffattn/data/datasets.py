"""Labelled pictures: decoded on demand, or all at once into memory.

Shapes: N pictures, b of a batch, S the side of a picture in pixels.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from diffattn.data.decoding import decode
from diffattn.data.files import Files
from diffattn.data.naming import few, plural

OnProgress = Callable[[int, int], None]
"""Called with the number of pictures done and the number of all pictures."""

Result = TypeVar("Result")

SHOWN = 10  # names of classes in a line
_CHUNK = 64  # pictures that a thread takes at once


class LabelledDataset(ABC):
    """Samples with class ids: the interface of all kinds of training data.

    Attributes:
        class_names: name of each class id.
        labels: class id of every sample, int64 [N].
        fingerprint: SHA-256 of the files' names, sizes, checksums and labels; equal data have equal fingerprints.
        shape: (channels, height, width) of the samples that a model is trained on.
        needs_noise: whether `fetch` takes noise.
    """

    class_names: tuple[str, ...]
    labels: Tensor
    fingerprint: str
    shape: tuple[int, int, int]
    needs_noise = False

    def __len__(self) -> int:
        return len(self.labels)

    def class_counts(self) -> dict[str, int]:
        """Number of samples of each class, 0 for empty classes."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names, counts, strict=True))

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A sample as it is stored, and its class id."""

    @abstractmethod
    def fetch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None = None) -> Tensor:
        """Samples for training: uint8 pictures [b, 3, S, S] or float32 latents [b, c, h, w].

        Args:
            indices: int64 [b].
            mirrored: bool [b], which samples to mirror left to right.
            noise: standard normal [b, *shape]; latents need it.
        """


class ImageDataset(LabelledDataset):
    """Pictures in a folder, a zip or a Hugging Face data set, decoded on demand.

    Made by `open_dataset`. It can be pickled and used in worker processes and threads, forked or spawned.

    Attributes:
        size: S.
        skipped: names of the unreadable pictures that were left out.
        base: the folder that the classes were found in, with a slash at its end; empty for the whole.
        notes: human-readable lines about unused files.
    """

    base: str = ""
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        files: Files,
        rows: Sequence[int] | Tensor,
        labels: Sequence[int] | Tensor,
        class_names: Sequence[str],
        size: int,
    ) -> None:
        """
        Args:
            files: the files that hold the pictures.
            rows: which of the files are the pictures.
            labels: class id of each picture.
            class_names: name of each class id.
            size: S, the side that pictures are cropped and resized to, in pixels.

        Raises:
            ValueError: no pictures, or a size below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        if not len(rows):
            raise ValueError(f"no pictures in {files.where!r}")
        self.files, self.size = files, size
        self.rows, self.labels = torch.as_tensor(rows), torch.as_tensor(labels)
        self.class_names, self.shape = tuple(class_names), (3, size, size)
        self.skipped: tuple[str, ...] = ()
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        if self._fingerprint is None:
            digest = hashlib.sha256("\0".join(self.class_names).encode())
            names = (self.files.names[row] for row in self.rows.tolist())
            for entry in zip(names, self.files.signatures(self.rows), self.labels.tolist(), strict=True):
                digest.update("\n{}\0{}\0{}".format(*entry).encode(errors="surrogateescape"))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def name(self, index: int) -> str:
        """The file name of a picture inside its folder or zip."""
        return self.files.names[int(self.rows[index])]

    def lines(self) -> list[str]:
        """Human-readable lines: the classes found, their folder, and what is not used."""
        origin = f" from {self.base}" if self.base else ""
        names = ", ".join(self.class_names[:SHOWN]) + (", …" if len(self.class_names) > SHOWN else "")
        skipped = f"left out: {plural(len(self.skipped), 'unreadable picture')}: {few(self.skipped)}"
        return [
            f"{plural(len(self.class_names), 'class')}{origin}: {names}",
            *([skipped] if self.skipped else []),
            *self.notes,
        ]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A picture, uint8 [3, S, S], cropped and resized as by `decode`, and its class id.

        Raises:
            ValueError: the picture cannot be read; the message names it.
            IndexError: there is no such picture.
        """
        row = int(self.rows[index])
        try:
            return decode(self.files.read(row), self.size), int(self.labels[index])
        except (OSError, ValueError) as error:
            name = self.files.names[row]
            raise ValueError(f"cannot read the picture {name!r} in {self.files.where!r}: {error}") from None

    def fetch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None = None) -> Tensor:
        return _mirror(torch.stack([self[i][0] for i in indices.tolist()]), mirrored)

    def unreadable(self, progress: OnProgress | None = None) -> dict[int, str]:
        """Decode every picture; returns index -> reason for unreadable ones."""

        def check(index: int) -> str | None:
            try:
                self[index]
            except ValueError as error:
                return str(error)
            return None

        results = enumerate(_in_threads(check, len(self), progress))
        return {index: reason for index, reason in results if reason is not None}

    def without(self, indices: Iterable[int]) -> "ImageDataset":
        """The data set without some of its pictures, whose names are added to `skipped`. The classes stay the same.

        Raises:
            ValueError: no pictures remain.
        """
        keep = torch.ones(len(self), dtype=torch.bool)
        left_out = sorted(indices)
        keep[left_out] = False
        rest = ImageDataset(self.files, self.rows[keep], self.labels[keep], self.class_names, self.size)
        rest.skipped = (*self.skipped, *(self.name(i) for i in left_out))
        rest.base, rest.notes = self.base, self.notes
        return rest


class InMemoryDataset(LabelledDataset):
    """Pictures in one tensor.

    Attributes:
        images: uint8 [N, 3, S, S].
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str], fingerprint: str) -> None:
        """
        Args:
            images: uint8 [N, 3, S, S].
            labels: int64 [N].
            class_names: name of each class id.
            fingerprint: of the data, see `LabelledDataset`.
        """
        self.images, self.labels = images, labels
        self.class_names, self.fingerprint = tuple(class_names), fingerprint
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The picture, uint8 [3, S, S], and its class id."""
        return self.images[index], int(self.labels[index])

    def fetch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None = None) -> Tensor:
        return _mirror(self.images[indices], mirrored)


def in_memory(dataset: ImageDataset | InMemoryDataset, progress: OnProgress | None = None) -> InMemoryDataset:
    """Decode every picture once, in threads, into one tensor, 3·S² bytes a picture. For small data such as CIFAR.

    Raises:
        ValueError: the tensor is larger than this machine's memory, or a picture cannot be read; the message names it.
    """
    if isinstance(dataset, InMemoryDataset):
        return dataset
    needed, available = len(dataset) * prod(dataset.shape), _memory()
    if available is not None and needed > available:
        raise ValueError(
            f"{len(dataset)} pictures of {dataset.size}x{dataset.size} need {needed / 2**30:.0f} GiB and this machine "
            f"has {available / 2**30:.0f}; read them on demand, without in_memory"
        )
    images = torch.empty(len(dataset), *dataset.shape, dtype=torch.uint8)

    def place(index: int) -> None:
        images[index] = dataset[index][0]

    for _ in _in_threads(place, len(dataset), progress):
        pass
    return InMemoryDataset(images, dataset.labels, dataset.class_names, dataset.fingerprint)


def _memory() -> int | None:
    """Bytes of memory of this machine; None if the system does not reveal it."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """The batch with some of its pictures mirrored left to right, in place."""
    if mirrored.any():
        images[mirrored] = images[mirrored].flip(-1)
    return images


def _in_threads(function: Callable[[int], Result], count: int, progress: OnProgress | None) -> Iterator[Result]:
    """Yield function(0), function(1), … in this order; the first exception ends the iteration."""

    def chunk(start: int) -> list[Result]:
        return [function(index) for index in range(start, min(start + _CHUNK, count))]

    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for results in pool.map(chunk, range(0, count, _CHUNK)):
            yield from results
            done += len(results)
            if progress is not None:
                progress(done, count)

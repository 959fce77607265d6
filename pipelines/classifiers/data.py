"""Labelled pictures from a zip, decoded once: StyleGAN/EDM (`dataset.json`) and imagefolder (`metadata.jsonl`)."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffattn.data.decoding import open_picture
from diffattn.data.indexes import rows_of_jsonl
from diffattn.files import decode_text, read_text, write_whole


@dataclass(frozen=True)
class Labelled:
    images: Tensor  # [N, 3, S, S] uint8
    labels: Tensor  # [N] int64
    names: tuple[str, ...]  # of the classes

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Labelled:
        return Labelled(self.images[indices], self.labels[indices], self.names)


def load(path: Path, size: int, column: str, cache: Path) -> Labelled:
    """All pictures of the zip as RGB, resized to `size`×`size`; decoded once, then read from the folder `cache`.

    `column`: the key of `metadata.jsonl` that holds the class name; `dataset.json` has class numbers.
    """
    stored = cache / f"{path.stem}-{size}.safetensors"
    mark = f"{path.stat().st_size}-{column}"
    if stored.exists():
        with safe_open(stored, "pt") as file:
            if file.metadata()["made_from"] == mark:
                return Labelled(
                    file.get_tensor("images"), file.get_tensor("labels"), tuple(json.loads(file.metadata()["names"]))
                )
    data = _decode_all(path, size, column)
    tensors = {"images": data.images, "labels": data.labels}
    labels = {"made_from": mark, "names": json.dumps(data.names)}
    write_whole(stored, lambda part: save_file(tensors, part, labels))
    return data


def fingerprint(data: Labelled) -> str:
    """sha256 of pixels and labels: which pictures a figure belongs to."""
    digest = hashlib.sha256(data.images.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def split_classes(labels: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """(trained, held out): of every class the `every`-th picture, the 2·`every`-th, … is held out.

    So a class with fewer than `every` pictures is only trained on.
    """
    rank = torch.zeros_like(labels)
    for c in labels.unique():
        here = labels == c
        rank[here] = torch.arange(int(here.sum()))
    held_out = rank % every == every - 1
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def _decode_all(path: Path, size: int, column: str) -> Labelled:
    images = []
    with zipfile.ZipFile(path) as archive:
        labels, names = zip(*_rows(archive, column), strict=True)
        files, numbers = zip(*labels, strict=True)
        for file in files:
            images.append(_decode(archive, file, size))
    by_number = dict(zip(numbers, names, strict=True))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Labelled(stacked, torch.tensor(numbers), tuple(by_number[i] for i in range(len(by_number))))


def _rows(archive: zipfile.ZipFile, column: str) -> Iterator[tuple[tuple[str, int], str]]:
    """((file, class number), class name) of every picture."""
    if "dataset.json" in archive.namelist():
        for file, number in read_text(decode_text(archive.read("dataset.json")))["labels"]:
            yield (file, number), file.split("/")[0]
        return
    numbers: dict[str, int] = {}
    for row in rows_of_jsonl(decode_text(archive.read("metadata.jsonl"))):
        yield (row["file_name"], numbers.setdefault(row[column], len(numbers))), row[column]


def _decode(archive: zipfile.ZipFile, file: str, size: int) -> np.ndarray:
    try:
        picture = open_picture(archive.read(file))
    except ValueError as error:
        raise ValueError(f"{archive.filename} holds a picture that cannot be read: {file}: {error}") from None
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture)

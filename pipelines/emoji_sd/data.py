"""Captioned pictures from a zip in the Hugging Face `imagefolder` layout (pictures + `metadata.jsonl`)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffattn.data.decoding import open_picture
from diffattn.data.indexes import rows_of_jsonl
from diffattn.files import decode_text


@dataclass(frozen=True)
class Pictures:
    images: Tensor  # [N, 3, S, S] uint8
    names: list[str]  # N captions

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: list[int]) -> Pictures:
        return Pictures(self.images[indices], [self.names[i] for i in indices])


def load_pictures(path: Path, size: int) -> Pictures:
    """All pictures of the zip as RGB on white, resized to `size`×`size`."""
    images, names = [], []
    with zipfile.ZipFile(path) as archive:
        for row in rows_of_jsonl(decode_text(archive.read("metadata.jsonl"))):
            images.append(_decode(archive, row["file_name"], size))
            names.append(row["text"])
    if not names:
        raise ValueError(f"{path} holds no pictures: its metadata.jsonl is empty")
    return Pictures(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), names)


def _decode(archive: zipfile.ZipFile, file: str, size: int) -> np.ndarray:
    try:
        picture = open_picture(archive.read(file))
    except ValueError as error:
        raise ValueError(f"{archive.filename} holds a picture that cannot be read: {file}: {error}") from None
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))


def split_names(count: int, every: int, keep: bool) -> tuple[list[int], list[int]]:
    """(trained, held out): every `every`-th picture is trained on (`keep`) or is the one held out."""
    picked = [i for i in range(count) if i % every == 0]
    rest = [i for i in range(count) if i % every]
    return (picked, rest) if keep else (rest, picked)


def held_out_of_vae(count: int, every: int | None) -> tuple[list[int], list[int]]:
    """(trained, held out) of the autoencoder: the second of every `every` pictures; those trained on by name are the
    first ones, which the decoder is to draw well."""
    held = [] if every is None else list(range(1, count, every))
    return [i for i in range(count) if i not in set(held)], held


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 → float -1..1."""
    return images.float() / 127.5 - 1


def shrink(x: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] float → [B, 3, size, size] by area averaging."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="area")

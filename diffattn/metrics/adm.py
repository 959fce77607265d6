"""The `.npz` layout of ADM's evaluation (Dhariwal & Nichol 2021): statistics and pictures. Never pickles.

Shapes: N pictures, H, W pixels, d features.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffattn.files import write_whole
from diffattn.metrics.features import as_uint8
from diffattn.metrics.reference import Reference, Statistics


def read_statistics(
    path: str | Path,
    extractor: str = "inception",
    extractor_hash: str = "",
    resize: str = "",
    count: int | None = None,
) -> Reference:
    """A reference from `mu` [d] and `sigma` [d, d]; `sigma` is taken as unbiased, as ADM writes it.

    Args:
        path: an `.npz` file.
        extractor, extractor_hash, resize, count: what the file was made with and from how many pictures, which it does
            not record.

    Raises:
        ValueError: a file of another kind; the message names it and what it holds.
    """
    mean, cov = (torch.from_numpy(array.astype(np.float64)) for array in _read(path, "mu", "sigma"))
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{str(path)!r}: mu must be [d] and sigma [d, d], got {list(mean.shape)} and {list(cov.shape)}"
        )
    try:
        statistics = Statistics(mean, cov, count)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} (mu is the mean, sigma the covariance): {error}") from None
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Reference(Path(path).stem, digest, extractor, extractor_hash, resize, statistics)


def write_statistics(path: str | Path, statistics: Statistics, spatial: Statistics | None = None) -> None:
    """Write `mu` and `sigma`, and `mu_s` and `sigma_s` of spatial features."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.cov.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.cov.numpy()}
    _write(path, **arrays)


def read_pictures(path: str | Path) -> Tensor:
    """Pictures `arr_0` [N, H, W, 3] as uint8 [N, 3, H, W].

    Raises:
        ValueError: a file of another kind; the message names it and what it holds.
    """
    (pictures,) = _read(path, "arr_0")
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise ValueError(
            f"{str(path)!r}: arr_0 must be uint8 [N, H, W, 3], got {pictures.dtype} {list(pictures.shape)}"
        )
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def write_pictures(path: str | Path, images: Tensor, labels: Tensor | None = None) -> None:
    """Write pictures, as `as_uint8` takes them, as `arr_0`, and class numbers [N] as `arr_1`.

    Raises:
        ValueError: as `as_uint8`; another number of labels than pictures.
    """
    pictures = as_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    if labels is None:
        return _write(path, arr_0=pictures)
    if len(labels) != len(images):
        raise ValueError(f"there must be as many labels as pictures, got {len(labels)} and {len(images)}")
    return _write(path, arr_0=pictures, arr_1=labels.cpu().numpy())


def _read(path: str | Path, *names: str) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in names if name not in file.files]:
                raise KeyError(f"it has no {' and no '.join(missing)}, but {', '.join(file.files) or 'nothing'}")
            return [file[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{str(path)!r} is of another layout: {error.args[0]}") from None
    except Exception as error:  # damaged zips and arrays make numpy raise nearly anything
        reason = str(error) or type(error).__name__
        if "pickle" in reason:  # numpy's message explains how to load it anyway
            reason = "Object arrays and other pickled content are never loaded, since that can run code"
        raise ValueError(f"{str(path)!r} is not a readable .npz file: {reason}") from error


def _write(path: str | Path, **arrays: Any) -> None:
    def write(part: Path) -> None:
        with part.open("wb") as file:  # to a path without its ending numpy adds ".npz"
            np.savez(file, **arrays)

    write_whole(Path(path), write)

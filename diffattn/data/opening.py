"""Opening a data set, whatever its layout."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from diffattn.data.datasets import ImageDataset, OnProgress
from diffattn.data.files import open_files
from diffattn.data.hub import is_hub_name, open_hub
from diffattn.data.layouts import read_listing
from diffattn.data.naming import few, plural


def open_dataset(
    source: str | Path,
    size: int,
    *,
    split: str = "train",
    label: str | None = None,
    skip_bad: bool = False,
    progress: OnProgress | None = None,
) -> ImageDataset:
    """Pictures and their classes, from one of four places.

    - A folder or zip of class folders (`class/…/picture.png`). Pictures without folders are one class, "all". Folders
      around the class folders (`images/class/…`) are looked through.
    - A folder or zip with a `dataset.json` (StyleGAN, EDM). Classes are named by their folders if each has its own,
      otherwise by their ids.
    - A folder or zip with a `metadata.jsonl` or `metadata.csv` (Hugging Face imagefolder).
    - The name `owner/name` of a Hugging Face data set, if the `datasets` library is installed.

    Pictures come in the order of their names, class names in ascending order, both as text: "10" precedes "2". What
    was chosen and what is not used is in `ImageDataset.lines`. Files that may be pictures, of a kind that Pillow cannot
    open, are left out with a warning that counts and names them. Each file counts once, whatever links lead to it.

    Args:
        source: where the pictures are; an existing folder or zip takes precedence over a name.
        size: side to which pictures are cropped and resized, in pixels, see `decode`.
        split: of a Hugging Face data set, or of a folder or zip whose pictures lie in folders such as train and val, or
            whose class folders hold such folders. Where there are no splits, "train" takes everything.
        label: the column that holds the class. None: of metadata, the column `label`; of a Hugging Face data set, the
            first `ClassLabel` column; without any, all pictures are one class.
        skip_bad: decode every picture now and leave out those that cannot be read, with a warning that counts and
            names them. Otherwise the first of them that is needed raises a `ValueError`.
        progress: called while pictures are decoded, with the number done and the total.

    Raises:
        ValueError: nothing there; no pictures; no such split or column; folders that can be read in two ways; labels
            that are incomplete, contradictory, or of files that are not there; a truncated or damaged zip.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    path = Path(source)
    if isinstance(source, str) and not path.exists() and is_hub_name(source):
        files, listing = open_hub(source, split, label)
    else:
        files = open_files(path)
        listing = read_listing(files, split, label)
    dataset = ImageDataset(files, listing.rows, listing.ids, listing.class_names, size)
    dataset.base, dataset.notes = listing.base, listing.notes
    warn_of_left_out(files.where, listing.left_out)
    return _without_bad(dataset, progress) if skip_bad else dataset


def warn_of_left_out(where: str, names: Sequence[str]) -> None:
    """Warn about files that may be pictures of kinds that cannot be opened, with their number and names."""
    if names:
        warnings.warn(
            f"{plural(len(names), 'file')} in {where!r} of a kind that Pillow cannot open here, left out: {few(names)}",
            stacklevel=3,
        )


def _without_bad(dataset: ImageDataset, progress: OnProgress | None) -> ImageDataset:
    bad = dataset.unreadable(progress)
    if not bad:
        return dataset
    names = few([dataset.name(index) for index in bad])
    count = f"{len(bad)} of {len(dataset)} pictures in {dataset.files.where!r} cannot be read"
    if len(bad) == len(dataset):
        raise ValueError(f"{count}: {names}; the first: {bad[0]}")
    warnings.warn(f"{count} and are left out: {names}", stacklevel=3)
    return dataset.without(bad)

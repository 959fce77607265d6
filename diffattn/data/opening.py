"""Opening a data set, whatever its layout."""

import warnings
from pathlib import Path

from diffattn.data.datasets import ImageDataset, Progress
from diffattn.data.files import Zip, open_files
from diffattn.data.hub import is_hub_name, open_hub
from diffattn.data.layouts import few, read_listing


def open_dataset(
    source: str | Path,
    size: int,
    *,
    split: str = "train",
    label: str | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageDataset:
    """Pictures and their classes, from one of four places.

    - A folder or zip of class folders (`class/…/picture.png`). Pictures without folders are one class, "all".
    - A folder or zip with a `dataset.json` (StyleGAN, EDM). Classes are named by their folders where each has one of
      its own, else by their ids.
    - A folder or zip with a `metadata.jsonl` or `metadata.csv` (Hugging Face imagefolder).
    - The name `owner/name` of a Hugging Face data set, if the `datasets` library is installed.

    Pictures come in the order of their names, class names in ascending order.

    Args:
        source: where the pictures are; a folder or zip that exists goes before a name.
        size: side to which pictures are brought, in pixels, see `decode`.
        split: of a Hugging Face data set, or of a folder or zip whose pictures lie in folders such as train and val.
            Where there are no splits, "train" takes everything.
        label: the column that holds the class. None: of metadata, the column `label`; of a Hugging Face data set, the
            first `ClassLabel` column; without any, all pictures are one class.
        skip_bad: decode every picture now and leave out those that cannot be read, with a warning that counts and
            names them. Otherwise the first one that is needed raises a `ValueError`.
        progress: called during that with the number of pictures done and the number of all.

    Raises:
        ValueError: nothing there, no pictures, no such split or column, labels that are incomplete or of files that
            are not there, or a damaged zip.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    path = Path(source)
    if isinstance(source, str) and not path.exists() and is_hub_name(source):
        files, listing = open_hub(source, split, label)
    else:
        files = open_files(path)
        listing = read_listing(files, split, label, look_through=isinstance(files, Zip))
    dataset = ImageDataset(files, listing.rows, listing.ids, listing.class_names, size)
    return _without_bad(dataset, progress) if skip_bad else dataset


def _without_bad(dataset: ImageDataset, progress: Progress | None) -> ImageDataset:
    bad = dataset.unreadable(progress)
    if not bad:
        return dataset
    names = few([dataset.name(index) for index in bad])
    count = f"{len(bad)} of {len(dataset)} pictures in {dataset.files.where!r} cannot be read"
    if len(bad) == len(dataset):
        raise ValueError(f"{count}: {names}; the first: {bad[0]}")
    warnings.warn(f"{count} and are left out: {names}", stacklevel=3)
    return dataset.without(bad)

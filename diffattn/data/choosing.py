"""Which folder of a data set holds the class folders: below wrappers such as `images`, and in one of the splits."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from diffattn.data.decoding import may_be_picture
from diffattn.data.files import Files
from diffattn.data.indexes import INDEXES
from diffattn.data.naming import few

SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Folder names that denote a part of the data, and the name of that part."""

CONTAINERS = frozenset(
    ("data", "dataset", "image", "images", "img", "imgs", "jpegimages", "jpg", "photos", "pictures", "png", "raw")
)
"""Folder names that describe the kind of files inside rather than a class."""

_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Place:
    """The location of the classes of a data set."""

    base: str = ""
    """The folder, with a slash at its end, that holds the class folders or the pictures; empty for the whole."""
    around: tuple[str, ...] = ("",)
    """This folder and those around it, from the inside out: an index in any of them counts."""
    inner: frozenset[str] | None = None
    """If each class folder has splits inside, the names of the one that was chosen."""
    unused: tuple[str, ...] = ()
    """Folders with pictures beside the splits."""

    def holds(self, name: str) -> bool:
        """Whether a file is of this part of the data."""
        if not name.startswith(self.base):
            return False
        return self.inner is None or name.removeprefix(self.base).split("/")[1:2] in [[part] for part in self.inner]


@dataclass
class _Level:
    """What one folder holds."""

    loose: list[str] = field(default_factory=list)
    """Pictures directly in it."""
    inside: dict[str, set[str]] = field(default_factory=dict)
    """Folder with pictures -> the folders with pictures in it; "" for pictures directly in it."""

    @classmethod
    def of(cls, pictures: Iterable[str], base: str) -> "_Level":
        found = cls()
        for name in pictures:
            if name.startswith(base):
                top, *rest = name.removeprefix(base).split("/")
                if not rest:
                    found.loose.append(name)
                else:
                    found.inside.setdefault(top, set()).add(rest[0] if len(rest) > 1 else "")
        return found

    def nested(self, folder: str) -> bool:
        """Whether all pictures of a folder lie in folders of its own."""
        return "" not in self.inside[folder]


def choose(files: Files, pictures: Sequence[str], split: str) -> Place:
    """Find the class folders by the contents of the folders.

    Args:
        files: of the data set.
        pictures: those of their names that are pictures.
        split: the part to take, where the pictures lie in parts: a name of `SPLITS`, or of any folder of folders.

    Raises:
        ValueError: an unknown split, or ambiguous folders; the message says how to choose.
    """
    known, base, around, unused, chosen = set(files.names), "", [""], [], False
    while True:
        level = _Level.of(pictures, base)
        if level.loose:
            break
        indexed = any(base + index in known for index in INDEXES)
        if indexed and not all(name.lower() in SPLITS for name in level.inside):
            break
        top = None if chosen else _split(level, files.where, split)
        if top is not None:
            chosen = True
            parts = _parts(level)
            part = parts.get(top, "")
            unused += [f"{base}{name}/" for name in level.inside if name != top and parts.get(name, part) == part]
        elif not indexed:
            top = _wrapper(level, files, base, known)
        if top is None:
            break
        base += f"{top}/"
        around.insert(0, base)
    inner = None if chosen else _splits_in_classes(level, files.where, split)
    if split != "train" and not chosen and inner is None:
        raise ValueError(f"{files.where!r} has no splits, so split must be 'train', which is everything; got {split!r}")
    return Place(base, tuple(around), inner, tuple(unused))


def _split(level: _Level, where: str, split: str) -> str | None:
    """The folder of a split, if the folders of this level are splits."""
    tops, parts = sorted(level.inside), _parts(level)
    if split in tops and split not in parts and level.nested(split):
        return split
    others = [top for top in tops if top not in parts]
    if not parts or (others and not _are_splits(level, where, parts, others)):
        return None
    wanted = SPLITS.get(split.lower(), split)
    found = [top for top in parts if top == split] or [top for top in parts if parts[top] == wanted]
    if not found:
        raise ValueError(f"no split {split!r} in {where!r}; there are: {', '.join(parts)}")
    if len(found) > 1:
        raise ValueError(f"split {split!r} may be {few(found)} in {where!r}; give the name of the folder")
    return found[0]


def _parts(level: _Level) -> dict[str, str]:
    """Folders named like a part of the data -> the name of that part.

    A name such as "training_set" or "val2017" counts where there are several parts, and folders in each of them:
    "freight_train" is a class.
    """
    tops = sorted(level.inside)
    exact = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    words = {top: _WORD.findall(top.lower()) for top in tops if top not in exact and level.nested(top)}
    loose = {top: SPLITS[word] for top, found in words.items() for word in found if word in SPLITS}
    both = dict(sorted((exact | loose).items()))
    return both if len(set(both.values())) > 1 else exact


def _are_splits(level: _Level, where: str, parts: Mapping[str, str], others: Sequence[str]) -> bool:
    """Whether folders named like splits are splits even though there are other folders beside them."""
    nested = [level.nested(top) for top in parts]
    several = len(set(parts.values())) > 1
    if not any(nested) and not several:
        return False  # a class that is named like a split
    classes = set().union(*(level.inside[top] for top in parts))
    shared = any(classes & level.inside[top] for top in others)
    if all(nested) and (several or shared):
        return True
    raise ValueError(
        f"the folders of {where!r} can be read in two ways: {few(list(parts))} as splits, or as classes beside "
        f"{few(others)}; name the folder of the pictures to train on as the source, or rename it"
    )


def _wrapper(level: _Level, files: Files, base: str, known: Collection[str]) -> str | None:
    """The one folder around everything, if there is one and its own folders are the classes."""
    tops = sorted(level.inside)
    around = [top for top in tops if level.nested(top) and top.lower() in CONTAINERS]
    if len(tops) > 1 and around:
        inside = sorted(level.inside[around[0]])
        raise ValueError(
            f"the folders of {files.where!r} can be read in two ways: the classes may be {few(tops)}, or in "
            f"{base + around[0]!r} {few(inside)}; name the folder that contains the class folders as the source"
        )
    if len(tops) != 1:
        _check_not_repeated(level, files.where)
        return None
    top = tops[0]
    if any(f"{base}{top}/{index}" in known for index in INDEXES):
        return top
    if level.inside[top] == {""}:
        return top if top.lower() in CONTAINERS else None
    if not level.nested(top):
        raise ValueError(
            f"{base + top!r} in {files.where!r} can be read in two ways: it contains pictures, and folders with "
            f"pictures ({few(sorted(level.inside[top] - {''}))}); move the pictures into class folders"
        )
    return top if around or not _empty_classes(files, base, top) else None


def _check_not_repeated(level: _Level, where: str) -> None:
    """Refuse folders that all have the same folders inside: either may be the classes."""
    inside = list(level.inside.values())
    if "" in inside[0] or len(inside[0]) < 2 or any(names != inside[0] for names in inside):
        return
    if all(name.lower() in SPLITS for name in inside[0]):
        return  # splits in the classes
    tops = sorted(level.inside)
    raise ValueError(
        f"the folders of {where!r} can be read in two ways: the classes may be {few(tops)}, or in each of them "
        f"{few(sorted(inside[0]))}; for these give one of the former as the split ({tops[0]!r}), or else move the "
        "pictures out of the inner folders"
    )


def _empty_classes(files: Files, base: str, top: str) -> bool:
    """Whether a folder has siblings that may be classes: empty ones, or with pictures of other kinds."""
    folders = (name.removeprefix(base) for name in files.folders if name.startswith(base))
    for other in {name for name in folders if name and "/" not in name and name != top}:
        held = [name for name in files.names if name.startswith(f"{base}{other}/")]
        if not held or any(map(may_be_picture, held)):
            return True
    return False


def _splits_in_classes(level: _Level, where: str, split: str) -> frozenset[str] | None:
    """The folders of the split where each class folder holds splits, as in `cat/train`; None if they do not."""
    inside = set().union(*level.inside.values())
    parts = {SPLITS.get(name.lower()) for name in inside}
    if level.loose or len(parts) < 2 or None in parts:
        return None
    wanted = SPLITS.get(split.lower(), split)
    found = frozenset(name for name in inside if SPLITS[name.lower()] == wanted)
    if not found:
        raise ValueError(
            f"no split {split!r} in the class folders of {where!r}; there are: {', '.join(sorted(inside))}"
        )
    return found

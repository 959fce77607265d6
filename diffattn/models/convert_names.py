"""Locates the weights of a model in a checkpoint, whatever prefixes programs add to their names.

Training programs nest tables of weights ("ema", "state_dict", ...), and wrappers lengthen every name ("module.",
"_orig_mod.", "model.", ...). Both are recognised by the names that a DiT's own weights have, whatever precedes them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

from torch import Tensor

from diffattn.models.convert import BLOCK_KEYS, MEDIATOR_KEYS, QK_NORM_KEYS, TOP_KEYS, listed

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Name parts inserted by torch.compile, data parallelism and similar wrappers."""

PREFERRED = ("", "model", "state_dict")
"""First parts of a path whose model is preferred over others, unless there are averaged weights."""

AVERAGED = re.compile(r"(^|[._])(ema|swa|shadow|averag)", re.IGNORECASE)
OWN_NAME = re.compile(
    r"(?:^|\.)({}|blocks\.\d+\.(?:{}))$".format(
        "|".join(map(re.escape, sorted(TOP_KEYS))),
        "|".join(map(re.escape, sorted(BLOCK_KEYS | MEDIATOR_KEYS | QK_NORM_KEYS))),
    )
)
TELLING = re.compile(r"(^|\.)([xty]_embedder|final_layer|adaLN_modulation)\.")
"""Names that a DiT has and other transformers do not."""

COUNTER = re.compile(r"(^|\.)(decay|num_updates|n_averaged|initted|(global_)?step|epoch)$")
"""Entries that averaging and training store among the weights."""

MAX_DEPTH = 4  # mappings within each other

Table = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """The weights of one model: a table of tensors, and what precedes the model's own names there."""

    table: str  # dotted path of the mapping, "" for the whole file
    prefix: str  # "" or ending in a dot
    num_own: int  # the number of names there that belong to a DiT

    @property
    def path(self) -> str:
        """Table and prefix, as `key` names them."""
        return ".".join(filter(None, (self.table, self.prefix.rstrip("."))))

    @property
    def rank(self) -> tuple[bool, int]:
        """Averaged weights come first, then the usual names."""
        first = self.path.split(".")[0]
        return not AVERAGED.search(self.path), PREFERRED.index(first) if first in PREFERRED else len(PREFERRED)

    def has(self, name: str) -> bool:
        """Whether a name in the table belongs to this model."""
        return name.startswith(self.prefix) if self.prefix else OWN_NAME.match(name) is not None


def find_weights(content: Mapping[Any, Any], key: str | None, source: str) -> dict[str, Tensor]:
    """The weights of one model under their own names, out of everything a checkpoint holds.

    Averaged weights are preferred. The names of wrappers are removed wherever they occur, and so is any prefix that all
    names of the model share. Everything else in the same table is left out, with a warning that names it.

    Args:
        content: what the file holds.
        key: dotted path of the table, or of table and prefix; None: chosen here.
        source: the file's name, for messages.

    Raises:
        ValueError: no weights by name, none under `key`, or several models none of which is preferred.
    """
    tables = {path: _unwrapped(table, source) for path, table in _tables(content)}
    places = [place for path, table in tables.items() for place in _places(path, table)]
    lists = {path: tensors for path, tensors in _averages(content) if _is_below(path, key)}
    if lists and not any(AVERAGED.search(place.path) for place in places if _is_below(place.path, key)):
        return _named(lists, tables, places, source)
    if key is not None:
        places, tables = _below(_bare(key), places, tables, source)
    if not places:
        return _other_weights(tables, source)
    place = _preferred(places, source)
    table = tables[place.table]
    others = [p for p in places if p.table == place.table and p != place]
    beside = [n for n in table if not place.has(n) and not any(p.has(n) for p in others) and not COUNTER.search(n)]
    if place.prefix and beside:
        warn(f"{source!r} contains more than the model; left out: {_groups(beside)}", stacklevel=2)
    names = [n for n in table if place.has(n) and not COUNTER.search(n)]
    names += [] if place.prefix else beside  # without a prefix they may be the model's
    return {n.removeprefix(place.prefix): table[n].detach() for n in names}


def _groups(names: Sequence[str]) -> str:
    """Prefixes of names, and how many names have each."""
    return listed(f"{first} ({n})" for first, n in Counter(name.split(".")[0] for name in names).items())


def _tables(content: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(dotted path, the tensors by name) of every mapping that has any."""
    if tensors := {str(name): x for name, x in content.items() if isinstance(x, Tensor)}:
        yield path, tensors
    for name, inner in content.items() if depth < MAX_DEPTH else ():
        if isinstance(inner, Mapping):
            yield from _tables(inner, f"{path}.{name}" if path else str(name), depth + 1)


def _averages(content: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, list[Tensor]]]:
    """(dotted path, tensors) of every list of averaged weights, which has no names."""
    for name, inner in content.items():
        below = f"{path}.{name}" if path else str(name)
        if isinstance(inner, Mapping) and depth < MAX_DEPTH:
            yield from _averages(inner, below, depth + 1)
        elif isinstance(inner, list | tuple) and AVERAGED.search(str(name)) and _are_tensors(inner):
            yield below, list(inner)


def _are_tensors(found: Sequence[Any]) -> bool:
    return bool(found) and all(isinstance(x, Tensor) for x in found)


def _bare(name: str) -> str:
    """A dotted name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unwrapped(table: Table, source: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in table.items():
        if (bare := _bare(name)) in found:
            raise ValueError(f"{source!r} has {bare!r} twice, once as {name!r}: two models in one table")
        found[bare] = weight
    return found


def _places(path: str, table: Table) -> list[Place]:
    """Every model whose weights are in a table, those that are no DiT excluded."""
    own, telling = Counter[str](), set[str]()
    for name in table:
        if match := OWN_NAME.search(name):
            prefix = name[: match.start(1)]
            own[prefix] += 1
            if TELLING.search(match[1]):
                telling.add(prefix)
    most = max((own[prefix] for prefix in telling), default=0)
    return [Place(path, prefix, own[prefix]) for prefix in own if prefix in telling and 2 * own[prefix] > most]


def _is_below(path: str, key: str | None) -> bool:
    return key is None or f"{path}.".startswith(f"{key}.")


def _below(
    key: str, places: Sequence[Place], tables: Mapping[str, Table], source: str
) -> tuple[list[Place], dict[str, Table]]:
    """The content under a key."""
    found = [place for place in places if _is_below(place.path, key)]
    inner = {path: table for path, table in tables.items() if _is_below(path, key)}
    if not found and not inner:
        there = [*(place.path for place in places), *tables]
        named = listed(filter(None, dict.fromkeys(there))) if any(there) else "none apart"
        raise ValueError(f"{source!r} has no weights under {key!r}; there are: {named}")
    return found, {place.table: tables[place.table] for place in found} | inner


def _preferred(places: Sequence[Place], source: str) -> Place:
    """The model to use; `ValueError` if two are equally good."""
    first = min(places, key=lambda place: place.rank)
    if equal := [place.path for place in places if place.rank == first.rank and place != first]:
        raise ValueError(f"{source!r} contains several models ({listed([first.path, *equal])}); name one with its key")
    return first


def _named(
    lists: Mapping[str, Sequence[Tensor]], tables: Mapping[str, Table], places: Sequence[Place], source: str
) -> dict[str, Tensor]:
    """Averaged weights without names, matched by order to the model stored beside them."""
    for place in sorted(places, key=lambda place: place.rank):
        model = {n.removeprefix(place.prefix): x for n, x in tables[place.table].items() if place.has(n)}
        for trained in (model, {n: x for n, x in model.items() if n != "pos_embed"}):  # which is fixed
            shapes = [weight.shape for weight in trained.values()]
            for average in lists.values():
                if [weight.shape for weight in average] == shapes:
                    return model | dict(zip(trained, (x.detach() for x in average), strict=True))
    beside = f"; its other weights: {listed(place.path or 'the file itself' for place in places)}" if places else ""
    raise ValueError(
        f"{source!r} has averaged weights without names ({listed(lists)}), and none beside them whose shapes are the "
        f"same{beside}"
    )


def _other_weights(tables: Mapping[str, Table], source: str) -> dict[str, Tensor]:
    """The largest table if none is a DiT's; the check of the names will report that."""
    if not tables:
        raise ValueError(f"{source!r} contains no weights by name")
    return dict(max(tables.values(), key=len))

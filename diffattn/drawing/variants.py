"""Variants of a saved pipeline's weights, such as "fp16": which exist, and which one to load.

A component's weights are `<name>.safetensors`, in shards `<name>-00001-of-00002.safetensors`; those of a variant are
`<name>.fp16.safetensors`, in shards `<name>.fp16-00001-of-00002.safetensors`, formerly
`<name>-00001-of-00002.fp16.safetensors`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

PLAIN = "plain"
"""The name of weights without a variant in messages."""

SHARD = r"-\d{5}-of-\d{5}"
WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model)"
    rf"(?:\.(?P<variant>[^./]+?))?(?:{SHARD})?(?:(?<=\d{{5}})\.(?P<former>[^./]+))?\.safetensors"
)
NAME = re.compile(r"\w[\w-]*", re.ASCII)

OnDisk = Mapping[str, Sequence[str | None]]
"""Component -> the variants of its weights, None for plain weights."""


def variants_in(files: Iterable[str], components: Iterable[str] | None = None) -> OnDisk:
    """The variants of every component that has weights in safetensors.

    Args:
        files: paths in the pipeline's folder, "unet/diffusion_pytorch_model.fp16.safetensors".
        components: the pipeline's components; None: all.
    """
    wanted = None if components is None else set(components)
    found: dict[str, set[str | None]] = {}
    for file in files:
        component, _, name = file.rpartition("/")
        match = WEIGHTS.fullmatch(name)
        if match and component and "/" not in component and (wanted is None or component in wanted):
            found.setdefault(component, set()).add(match["variant"] or match["former"])
    return {component: sorted(found[component], key=lambda v: (v is not None, v)) for component in sorted(found)}


def choose_variant(model: str, there: OnDisk, asked: str | None) -> str | None:
    """The variant to load a pipeline with: a component without it is loaded plain.

    Args:
        model: the pipeline's name, for messages.
        there: from `variants_in`.
        asked: None: plain weights, or the only variant if some component has no plain weights.

    Raises:
        ValueError: no such variant, a component that has neither it nor plain weights, or several to choose from; the
            message lists what exists.
    """
    if asked is not None and not NAME.fullmatch(asked):
        raise ValueError(f"variant must be a word such as fp16, got {asked!r}")
    without_plain = {component: found for component, found in there.items() if None not in found}
    if asked is None:
        if not without_plain:
            return None
        common = set.intersection(*(set(found) for found in without_plain.values()))
        if len(common) == 1:
            return common.pop()
        problem = "has no plain weights and several variants; choose one" if common else "has no variant for all of it"
    elif not any(asked in found for found in there.values()):
        problem = f"has no variant {asked!r}"
    elif lacking := [component for component, found in without_plain.items() if asked not in found]:
        problem = f"has neither variant {asked!r} nor plain weights for {', '.join(lacking)}"
    else:
        return asked
    raise ValueError(f"{model!r} {problem}; on disk: {listed_variants(there)}")


def listed_variants(there: OnDisk) -> str:
    """The variants of every component, for a message."""
    parts = (f"{component}: {', '.join(v or PLAIN for v in found)}" for component, found in there.items())
    return "; ".join(parts) or "no weights in safetensors"

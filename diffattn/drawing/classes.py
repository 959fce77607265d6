"""Pipelines that draw the classes their models were trained on: `SiTPipeline`, and diffusers' own `DiTPipeline`."""

from collections.abc import Sequence
from typing import Any

from diffusers import DiTPipeline

from diffattn.sampling.labels import ClassNames
from diffattn.sampling.pipeline import SiTPipeline

NULL_CLASS = 1000
"""The class that `DiTPipeline` uses as the null class, whatever its model."""


def draws_classes(pipe: Any) -> bool:
    """Whether a pipeline draws from classes rather than from text."""
    return isinstance(pipe, SiTPipeline | DiTPipeline)


def num_classes(pipe: Any) -> int:
    """The number of classes of a pipeline that draws classes."""
    config = pipe.transformer.config
    return int(config["num_classes"] if isinstance(pipe, SiTPipeline) else config["num_embeds_ada_norm"])


def class_ids(pipe: Any, words: Sequence[int | str]) -> list[int]:
    """The class ids of some labels; `ClassNames.ids` describes how names are resolved.

    Raises:
        ValueError: an unknown or ambiguous name, or an id out of range; the message says what is allowed.
    """
    return class_names(pipe).ids(list(words))


def class_names(pipe: Any) -> ClassNames:
    """The names of the classes of a pipeline that draws classes; those of ImageNet have several names each."""
    if isinstance(pipe, SiTPipeline):
        return pipe.class_names
    names: dict[int, list[str]] = {}
    for name, label in pipe.labels.items():
        names.setdefault(label, []).append(name)
    found = {label: ", ".join(synonyms) for label, synonyms in names.items()}
    return ClassNames(_saved_names(pipe) or found, num_classes(pipe))


def _saved_names(pipe: DiTPipeline) -> dict[int, str]:
    """Id -> names in the saved pipeline; empty if it is not available, or if `labels` were changed since.

    `labels` keeps only the last class of a name that several have: ImageNet has two cranes.
    """
    try:
        index: Any = DiTPipeline.load_config(str(pipe.config.get("_name_or_path") or ""), local_files_only=True)
        found = {int(key): str(names) for key, names in (index.get("id2label") or {}).items()}
    except (OSError, ValueError, AttributeError):
        return {}
    labels = {name.strip(): key for key, names in found.items() for name in names.split(",")}
    return found if labels == pipe.labels else {}


def why_unguided(pipe: Any) -> str | None:
    """Why a class-conditional pipeline cannot use guidance, or None if it can."""
    if isinstance(pipe, SiTPipeline) and not pipe.transformer.config["null_class"]:
        return "the model was trained without a null class (label dropout 0)"
    if isinstance(pipe, DiTPipeline) and (found := num_classes(pipe)) != NULL_CLASS:
        return (
            f"{type(pipe).__name__} guides away from class {NULL_CLASS}, which is not the null class of a "
            f"model with {found} classes"
        )
    return None


def unguided_note(pipe: Any, guidance: float | None) -> str | None:
    """The note for a user whose guidance (None: not given) has no effect; None otherwise."""
    if guidance is not None or not draws_classes(pipe) or (why := why_unguided(pipe)) is None:
        return None
    return f"drawn without guidance: {why}"


def check_null_class(pipe: Any, guidance: float) -> None:
    """Raise `ValueError` for guidance above 1 if the model has no trained null class."""
    if guidance > 1 and (why := why_unguided(pipe)) is not None:
        raise ValueError(f"{why}; guidance must be at most 1, got {guidance:g}")

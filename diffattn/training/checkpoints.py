"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-00001000` with safetensors and JSON, written under a temporary name, flushed to disk,
marked complete and renamed. Incomplete checkpoints are never read, and deleted when the next save begins. Old
checkpoints are removed only once a new one is in place, and are renamed first. The state holds a SHA-256 of every file
of tensors, so that later corruption on disk is detected.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffattn.files import writing

COMPLETE = "COMPLETE"
STATE = "state.json"
CHECKSUMS = "checksums"  # of the state: file of tensors -> SHA-256
TENSORS = ("model", "ema", "optimizer", "random")
"""Files of named tensors."""

Tensors = Mapping[str, Tensor]


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(root: Path, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove all but the last `keep`.

    Args:
        root: the folder of all checkpoints.
        step: steps completed.
        tensors: keyed by the names in `TENSORS`.
        state: everything else, as JSON types.
        keep: checkpoints to keep, this one included.

    Raises:
        CannotWrite: it could not be written (e.g. a full disk); existing checkpoints are untouched.
    """
    final = folder_of(root, step)
    with writing(final):
        replaced = _write_checkpoint(root, final, tensors, state)
    for old in (*replaced, *map(_put_aside, complete(root)[:-keep])):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_checkpoint(root: Path, final: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> list[Path]:
    """Write a checkpoint under a temporary name and put it in place. → one of the same step, put aside to be deleted"""
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".writing-{final.name.removeprefix('step-')}"
    _remove_leftovers(root)
    try:
        temporary.mkdir()
        for name in TENSORS:
            _write_tensors(temporary / _file(name), tensors.get(name, {}))
        sums = {_file(name): checksum(temporary / _file(name)) for name in TENSORS}
        _write(temporary / STATE, json.dumps({**state, CHECKSUMS: sums}, indent=1).encode())
        _write(temporary / COMPLETE, b"")
        _flush(temporary)
        replaced = [_put_aside(final)] if final.exists() else []
        temporary.rename(final)
        _flush(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return replaced


def complete(root: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return complete(root)[-1] if complete(root) else None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Raises:
        ValueError: it is not a complete checkpoint, cannot be read, or a file of tensors has changed since it was
            written.
    """
    if not (folder / COMPLETE).is_file():
        raise ValueError(f"{str(folder)!r} is not a complete checkpoint")
    try:
        state = json.loads((folder / STATE).read_text())
        sums = state.pop(CHECKSUMS, {})  # not in checkpoints of earlier versions
        damaged = [file for file, expected in sums.items() if checksum(folder / file) != expected]
        if damaged:
            raise ValueError(f"the bytes of {', '.join(damaged)} have changed since they were written")
        return {name: load_file(folder / _file(name)) for name in TENSORS}, state
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {str(folder)!r} is damaged and cannot be read: {error}") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(name: str) -> str:
    return f"{name}.safetensors"


def random_states() -> dict[str, Tensor]:
    """The state of every global random number generator.

    Training itself uses its own generators, seeded by step; these are for code that users add.
    """
    version, python, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *python], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(numpy.asarray(keys, dtype=numpy.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    assert kind == "MT19937"
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Tensors) -> None:
    """Restore the generators to the state from `random_states`."""
    torch.set_rng_state(states["torch"])
    version, *python = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(python), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _put_aside(folder: Path) -> Path:
    """Rename it before deletion, so that a kill during deletion leaves nothing that looks complete."""
    aside = folder.with_name(f".removing-{folder.name}")
    folder.rename(aside)
    _flush(folder.parent)
    return aside


def _remove_leftovers(root: Path) -> None:
    """Delete what a kill left behind while a checkpoint was written or removed."""
    for folder in root.iterdir():
        unmarked = re.fullmatch(r"step-\d+", folder.name) and not (folder / COMPLETE).is_file()
        if unmarked or re.fullmatch(r"\.(writing|removing-step)-\d+", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(path: Path, tensors: Tensors) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    _flush(path)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _flush(path)


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened on this platform
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

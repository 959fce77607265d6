"""A file of decisions by machine: for every kind of call, what was faster there."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffattn.architectures.decisions import MAX_KINDS, Decision, decision_from, entry_of
from diffattn.files import is_there, read_json, user_folder, write_json
from diffattn.machine import cpu_name, versions

SWITCH = "DIFFATTN_CALIBRATE"
"""Environment variable: "0" keeps `diffattn.patch` from timing, unless `calibrate` is given; a path names the cache."""

WORDS = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}
"""Values of the variable that are no paths, in lower or upper case; such a file has to be named as "./off"."""

MAX_MACHINES = 64
"""Machines in one file; the oldest are dropped."""


@dataclass(frozen=True)
class DecisionCache:
    """The decisions made on this machine, in a file that others may share."""

    path: Path

    def read(self, device: torch.device) -> dict[str, Decision]:
        """Kind of call -> decision, on this machine's device; empty without a file.

        Raises:
            ValueError: the file is damaged; the message names it and says what to do.
        """
        try:
            entries = _machines(self.path).get(machine_key(device), {})
            return {kind: decision_from(entry) for kind, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(self.path)!r} does not contain decisions of diffattn ({error}); delete it"
            ) from None

    def add(self, device: torch.device, decisions: Mapping[str, Decision]) -> None:
        """Add a device's decisions to those in the file, which other processes may have changed since.

        Raises:
            OSError: the file cannot be written.
            ValueError: it is damaged.
        """
        machines, machine = _machines(self.path), machine_key(device)
        mine = machines.pop(machine, {}) | {kind: entry_of(decision) for kind, decision in decisions.items()}
        machines[machine] = dict(list(mine.items())[-MAX_KINDS:])
        write_json(self.path, {"machines": dict(list(machines.items())[-MAX_MACHINES:])})


def cache_for(calibrate: bool | str | Path | None) -> DecisionCache | None:
    """The cache for the argument `calibrate` of `diffattn.patch`; None: nothing is timed.

    Raises:
        ValueError: not true, false or a path.
    """
    if calibrate is None:
        given = os.environ.get(SWITCH) or "1"
        calibrate = WORDS.get(given.lower(), Path(given))
    if calibrate is False:
        return None
    if calibrate is True:
        return DecisionCache(user_cache())
    if not isinstance(calibrate, str | Path):
        raise ValueError(f"calibrate must be True, False or the path of a file, got {calibrate!r}")
    return DecisionCache(Path(calibrate))


def user_cache() -> Path:
    """The file in the user's cache folder."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "diffattn" / "decisions.json"


def machine_key(device: torch.device) -> str:
    """Everything about machine, driver and libraries that may change which calls are faster."""
    found = versions()
    parts = [f"torch {found['torch']}", f"diffattn {found['diffattn']}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [properties.name, f"CUDA {torch.version.cuda or torch.version.hip}", f"driver {_driver()}"]
    elif device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        parts += [cpu_name(), capability, f"{torch.get_num_threads()} threads"]
    else:
        parts += [device.type, cpu_name(), platform.release()]
    return ", ".join(parts)


def _driver() -> str:
    """The version of NVIDIA's kernel driver, if the system reveals it."""
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text() if path.is_file() else ""
    return next((word for word in text.split() if word.count(".") and word[0].isdigit()), platform.release())


def _machines(path: Path) -> dict[str, Any]:
    if not is_there(path):
        return {}
    found = read_json(path).get("machines")
    if not isinstance(found, dict) or not all(isinstance(entries, dict) for entries in found.values()):
        raise ValueError("no machines in it")
    return found

"""The result file: whole after every figure, and the place to resume from."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffattn.files import read_json, write_json
from diffattn.machine import describe_machine

PACKAGES = ("tomesd", "DeepCache", "tgate")


class Results:
    """One JSON file.

    Attributes:
        data: machine, protocol, and `entries`: by what was compared on, everything that was found, and by which commits
            and commands.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], resume: bool) -> None:
        """With `resume`, the entries of an earlier run are kept.

        Raises:
            ValueError: they were made on another machine, with other versions or under another protocol.
        """
        self.path = path
        self.data: dict[str, Any] = {**conditions, "entries": {}}
        self._by = {"commits": self.data["machine"].pop("commit"), "commands": self.data.pop("command")}
        if resume and path.is_file():
            before = read_json(path)
            old, new = _comparable(before), _comparable(self.data)
            changed = [
                f"{key} ({old.get(key)!r}, now {value!r})" for key, value in new.items() if old.get(key) != value
            ]
            if changed:
                raise ValueError(
                    f"the results in {str(path)!r} were made with another {', '.join(changed)}: "
                    "choose another --out, or leave out --resume to replace them"
                )
            self.data["entries"] = before["entries"]

    def entry(self, name: str, **labels: Any) -> dict[str, Any]:
        """What is known so far of one subject; change it in place, then `save`."""
        blank = {"rounds": [], "left_out": {}, "layers": {}, "peak_mib": {}, "pictures": {}, "scores": {}}
        found = self.data["entries"].setdefault(name, blank | {key: [] for key in self._by})
        found.update(labels)
        for key, value in self._by.items():
            if value not in found[key]:
                found[key].append(value)
        return found

    def save(self) -> None:
        write_json(self.path, self.data)


def conditions(device: torch.device, protocol: Mapping[str, Any], command: list[str]) -> dict[str, Any]:
    """Machine with all versions, command and protocol, as JSON types."""
    machine = describe_machine(device)
    machine["versions"] |= {name: _version(name) for name in PACKAGES}
    return {"machine": machine, "command": " ".join(["python", *command]), "protocol": dict(protocol)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _comparable(data: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for figures to stand in one table."""
    machine = data.get("machine", {})
    versions = machine.get("versions", {})
    found = {key: machine.get(key) for key in ("cpu", "gpu", "threads")}
    names = ("diffattn", "torch", "diffusers", *PACKAGES)
    return found | {f"{name} version": versions.get(name) for name in names} | data.get("protocol", {})

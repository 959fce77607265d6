"""The benchmark's result file: complete after every round, and the basis for resuming."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffattn.files import read_json, write_json


class ResultFile:
    """The results so far, saved to disk after every change."""

    def __init__(self, path: Path, conditions: Mapping[str, Any], resume: bool) -> None:
        """Raise `ValueError` if the results to resume were made under other conditions."""
        self.path = path
        self.data: dict[str, Any] = {**conditions, "results": []}
        if resume and path.is_file():
            before = read_json(path)
            changed = [k for k, v in _comparable(conditions).items() if _comparable(before).get(k) != v]
            if changed:
                raise ValueError(
                    f"the results in {str(path)!r} were made with another {', '.join(changed)}: "
                    "choose another --out, or leave out --resume to replace them"
                )
            self.data["results"] = before.get("results", [])

    def find(self, model: str, size: int, mode: str) -> dict[str, Any] | None:
        """One result."""
        key = (model, size, mode)
        return next((e for e in self.data["results"] if (e["model"], e["size"], e["mode"]) == key), None)

    def is_done(self, model: str, size: int, mode: str, rounds: int, variants: Collection[str]) -> bool:
        """Whether all these variants have this many rounds."""
        entry = self.find(model, size, mode)
        if entry is None or entry["rounds"] < rounds:
            return False
        return set(variants) <= {*entry["variants"], *entry["left_out"]}

    def rounds_of(self, model: str, size: int, mode: str, names: Collection[str]) -> list[dict[str, float]]:
        """Rounds measured before, if they had exactly these variants."""
        entry = self.find(model, size, mode)
        if entry is None or set(entry["variants"]) != set(names):
            return []
        seconds = {name: entry["variants"][name]["seconds_per_round"] for name in names}
        return [{name: seconds[name][i] for name in names} for i in range(entry["rounds"])]

    def values_of(self, model: str, size: int, mode: str, key: str) -> dict[str, Any]:
        """Variant -> what it has under `key`, where it has that."""
        entry = self.find(model, size, mode)
        variants = {} if entry is None else entry["variants"]
        return {name: variant[key] for name, variant in variants.items() if key in variant}

    def put(self, entry: Mapping[str, Any]) -> None:
        """Add or replace one result, and save."""
        old = self.find(entry["model"], entry["size"], entry["mode"])
        self.data["results"] = [e for e in self.data["results"] if e is not old] + [dict(entry)]
        write_json(self.path, self.data)


def _comparable(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that must be equal for rounds to belong together."""
    machine, settings = conditions.get("machine", {}), conditions.get("settings", {})
    return {
        **{key: machine.get(key) for key in ("cpu", "gpu", "threads")},
        "torch": machine.get("versions", {}).get("torch"),
        **{key: settings.get(key) for key in ("device", "dtype", "batch", "min_tokens", "max_head_error")},
        "levels": list(settings["levels"]) if settings.get("levels") else None,
        "all_layers": bool(settings.get("all_layers")),
    }

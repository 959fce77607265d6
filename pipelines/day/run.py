"""Goes through the items of the day: each once, each result in a file of its own, from where the last call stopped."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffattn.files import read_json, write_json
from diffattn.machine import where
from diffattn.tables import text_table

from . import report
from .item import Item, Setting

CONDITIONS, TABLE = "day.json", "README.md"

DONE, UNFINISHED, OUT_OF_MEMORY, FAILED, BEGUN = "done", "unfinished", "out of memory", "failed", "begun"
"""The status of an item that was begun; `BEGUN` remains where the process ended in the middle of it."""

TO_DO = "to do"
LEAST_PACE = 0.5  # items are too different for others to reveal more than this
GIVEN_UP = (OUT_OF_MEMORY, FAILED, BEGUN)
ENDED = "the process ended in the middle of it"


class Day:
    """The items of one folder."""

    def __init__(self, setting: Setting, items: Sequence[Item]) -> None:
        """Resume from the results in the setting's folder, if there are any.

        Raises:
            ValueError: they were made on another device, with other versions or in another precision.
        """
        self.setting = setting
        self.items = list(items)
        self.conditions = setting.conditions()
        path = setting.out / CONDITIONS
        if path.is_file():
            before, now = _comparable(read_json(path)), _comparable(self.conditions)
            changed = [f"{key} ({before.get(key)!r}, now {value!r})" for key, value in now.items()
                       if before.get(key) != value]  # fmt: skip
            if changed:
                raise ValueError(f"{str(path)!r} was made with another {', '.join(changed)}: choose another --out")
        self.records = {item.name: read_json(self._file(item)) for item in self.items if self._file(item).is_file()}

    def plan(self) -> str:
        """Every item with its share of the estimated time and its status, as a text table."""
        total = sum(item.minutes for item in self.items)
        rows = [
            (str(i), item.name, f"{item.minutes / total:.1%}", f"{item.minutes:.1f}", self.status(item), item.title)
            for i, item in enumerate(self.items, 1)
        ]
        left = sum(item.minutes for item in self.items if self.status(item) in (TO_DO, UNFINISHED))
        last = f"{total:.0f} minutes on one large GPU, by estimate; {left:.0f} of them to do"
        head = ("", "item", "share", "minutes", "status", "what")
        return "\n".join([where(self.conditions["machine"]), text_table(head, rows), last])

    def status(self, item: Item) -> str:
        """`TO_DO`, or the outcome of the item."""
        return self.records[item.name]["status"] if item.name in self.records else TO_DO

    def run(self, minutes: float, *, retry: bool = False, say: Callable[[str], None] = print) -> bool:
        """Measure what is missing and fits in the time; one item is measured in any case.

        Args:
            minutes: of this call. An item whose estimate does not fit in what is left is not begun.
            retry: whether to try again what failed or ran out of memory.
            say: called with lines about the progress.

        Returns:
            Whether nothing is left to do.
        """
        deadline, begun = time.monotonic() + 60 * minutes, False
        write_json(self.setting.out / CONDITIONS, self.conditions)
        for item in self._open(retry):
            if begun and time.monotonic() + 60 * item.minutes * self._pace() > deadline:
                continue
            begun = True
            say(f"{item.title} ...")
            record = self._measured(item, deadline)
            self._keep(item, record)
            say(f"  {_summary(record)}")
            if "CUDA error" in record.get("error", ""):
                say("after this error nothing else can be measured in this process")
                break
            _release(self.setting.device)
        left = self._open(False)
        if left:
            say(f"{len(left)} items to do: run the same command again")
        return not left

    def _open(self, retry: bool) -> list[Item]:
        wanted = (TO_DO, UNFINISHED, *(GIVEN_UP if retry else ()))
        return [item for item in self.items if self.status(item) in wanted]

    def _measured(self, item: Item, deadline: float) -> dict[str, Any]:
        """The record of one item, whatever its outcome."""
        began = time.monotonic()
        record: dict[str, Any] = {"name": item.name, "kind": item.kind, "title": item.title, "minutes": item.minutes}
        before = self.records.get(item.name)
        write_json(self._file(item), record | {"status": BEGUN, "error": ENDED, "seconds": 0.0})
        try:
            result = item.measure(deadline)
            record |= {"status": DONE if result["complete"] else UNFINISHED, "result": result}
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip()}"
            record |= {"status": OUT_OF_MEMORY if _is_memory(error) else FAILED, "error": text[:2000]}
        except BaseException:  # stopped by the user: as if it had not been begun
            if before is None:
                self._file(item).unlink()
            else:
                write_json(self._file(item), before)
            raise
        return record | {"seconds": time.monotonic() - began}

    def _keep(self, item: Item, record: Mapping[str, Any]) -> None:
        self.records[item.name] = dict(record)
        write_json(self._file(item), record)
        found = [self.records[item.name] for item in self.items if item.name in self.records]
        (self.setting.out / TABLE).write_text(report.markdown(self.conditions, found), encoding="utf-8")

    def _pace(self) -> float:
        """How much longer than estimated the finished items took, all together, `LEAST_PACE` or more; 1 before the
        first."""
        done = [record for record in self.records.values() if record["status"] == DONE]
        estimated = 60 * sum(record["minutes"] for record in done)
        return max(sum(record["seconds"] for record in done) / estimated, LEAST_PACE) if done else 1.0

    def _file(self, item: Item) -> Path:
        return self.setting.out / "items" / f"{item.name}.json"


def _comparable(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """What must match for results to be in one table."""
    machine = conditions["machine"]
    versions = {f"{name} version": machine["versions"][name] for name in ("torch", "diffusers")}
    return {key: machine.get(key) for key in ("cpu", "gpu", "cuda")} | versions | {
        key: conditions[key] for key in ("dtype", "tiny")
    }  # fmt: skip


def _is_memory(error: Exception) -> bool:
    """Whether a device ran out of memory; the CPU's allocator has no class for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _release(device: torch.device) -> None:
    """Let go of the memory of a measurement."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(record: Mapping[str, Any]) -> str:
    error = f" ({record['error'].splitlines()[0]})" if "error" in record else ""
    return f"{record['status']} after {record['seconds']:.0f} s{error}"

"""What a measurement ran on: every published figure states it."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffattn.devices import choose_device, choose_dtype, cpu_name, describe_device, versions


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, accelerator, versions and commit, as JSON types."""
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_cpu": describe_device(torch.device("cpu"))["bfloat16"],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions() | _version("tomesd"),
        "commit": git_commit(),
    }
    if device.type == "cuda":
        machine |= {"gpu": describe_device(device)["name"], "cuda": torch.version.cuda}
    return machine


def where(machine: dict[str, Any]) -> str:
    """The part of `describe_machine` that names what did the work."""
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it; emulated it is far slower than float32. float16 on other GPUs."""
    if device.type == "cpu":
        return torch.float32 if describe_device(device)["bfloat16"] == "emulated" else torch.bfloat16
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def resolve(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype by name; "auto" is the first device of cuda, mps, cpu, and its `fastest_dtype`.

    Raises:
        ValueError: an unknown dtype, or a device that is not here.
    """
    found = choose_device(device)
    return found, fastest_dtype(found) if dtype == "auto" else choose_dtype(dtype, found)


def git_commit() -> str | None:
    """Commit of the working tree this package runs from ("-dirty" with changes), None if it is installed."""
    this = Path(__file__).resolve()
    try:
        _git(this.parent, "ls-files", "--error-unmatch", this.name)  # not merely inside some repository
        return _git(this.parent, "describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _version(package: str) -> dict[str, str]:
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within, torch uses so many CPU threads; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

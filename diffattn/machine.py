"""Chooses a model's device and precision, and describes this machine and installation for every reported figure."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; "auto" is the first available of cuda, mps, cpu.

    Raises:
        ValueError: not a device, or not available on this machine.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available or (device.index or 0) >= _count(device.type):
        raise ValueError(f"device {name!r} is not available here; allowed: auto, {', '.join(available)}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """A precision by name; "auto" is float16 on cuda and float32 elsewhere.

    Raises:
        ValueError: not a key of `DTYPES`.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def available_devices() -> list[str]:
    """Device types of this machine, fastest first."""
    found = ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    return [*found, "cpu"]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and size of a device, as JSON types."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {
            "name": found.name,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "compute_capability": f"{found.major}.{found.minor}",
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return {
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "bfloat16": _cpu_bfloat16(),
    }


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes. Between its calls, its weights may lie elsewhere: `enable_model_cpu_offload`,
    `enable_sequential_cpu_offload` and group offloading put hooks around it or its parts, which know."""
    for part in model.modules():
        hook, hooks = getattr(part, "_hf_hook", None), getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        places = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,))]
        places += [getattr(getattr(each, "group", None), "onload_device", None) for each in hooks.values()]
        for place in places:
            if place is not None:
                return torch.device(place)
    return next(model.parameters()).device


def describe_devices() -> dict[str, dict[str, Any]]:
    """Every device of this machine, by its torch name."""
    names = [f"{kind}:{i}" if kind == "cuda" else kind for kind in available_devices() for i in range(_count(kind))]
    return {name: describe_device(torch.device(name)) for name in names}


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that pictures and times depend on."""
    found = {name: metadata.version(name) for name in ("diffattn", "torch", "diffusers", "transformers")}
    return {**found, "python": platform.python_version()}


def cpu_name() -> str:
    """The processor's model name, or its architecture if unknown."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return platform.processor() or platform.machine()


def _cpu_bfloat16() -> str:
    """The CPU's bfloat16 instructions, or "emulated"."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().partition("flags")[2].partition("\n")[0].split()) if info.is_file() else set()
    found = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return ", ".join(found) or "emulated"


def _count(kind: str) -> int:
    return torch.cuda.device_count() if kind == "cuda" else 1


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
    """The entry of `describe_machine` that names the device."""
    count = machine["threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {count} {'thread' if count == 1 else 'threads'}"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the hardware supports it; otherwise float32 on CPUs (emulation is far slower), float16 on GPUs."""
    if device.type == "cpu":
        return torch.float32 if describe_device(device)["bfloat16"] == "emulated" else torch.bfloat16
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def resolve(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype by name; "auto" is the first device of cuda, mps, cpu, and its `fastest_dtype`.

    Raises:
        ValueError: an unknown dtype, or a device that is not available.
    """
    found = choose_device(device)
    return found, fastest_dtype(found) if dtype == "auto" else choose_dtype(dtype, found)


def git_commit() -> str | None:
    """Commit of the working tree this package runs from ("-dirty" with changes), None if it is installed."""
    this = Path(__file__).resolve()
    try:
        _git(this.parent, "ls-files", "--error-unmatch", this.name)  # not just located inside some other repository
        return _git(this.parent, "describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _version(package: str) -> dict[str, str]:
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Limit torch to this many CPU threads within the block; None leaves the number unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

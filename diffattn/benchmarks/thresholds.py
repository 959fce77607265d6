"""Measures the number of tokens from which agents beat exact attention on a device: the table of `methods.thresholds`.

Both are timed as operations on q, k, v: attention through landmarks, sampling included, against one SDPA call,
interleaved. Pooled queries cost less than landmarks, which therefore decide for both.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffattn.files import read_json, write_json
from diffattn.functional import landmark_attention, sample_tokens
from diffattn.machine import describe_machine, dtype_name
from diffattn.measure.interleave import interleave
from diffattn.methods.agent import AgentAttention
from diffattn.methods.base import LayerCall, LayerSpec
from diffattn.methods.thresholds import MERGE, Thresholds, min_tokens_for, read_thresholds, shipped_file

NUM_AGENTS = (16, 64, 256, 1024)
NAMES = (*map(str, NUM_AGENTS), MERGE)
"""The entries of a row of the table."""

SIDES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)  # of square grids: 64 to 16,384 tokens
HEAD_DIMS = (40, 64)  # Stable Diffusion 1.x at the highest resolution; 2.x and XL
HEADS, BATCH = 8, 2
MARGIN = 0.9  # agents count as faster when their median time ratio is below


@dataclass(frozen=True)
class SizeResult:
    """One number of tokens: agents -> median time ratio to exact attention, the worst of all head dimensions."""

    tokens: int
    rounds: int
    ratios: Mapping[str, float]


def measure_thresholds(
    device: torch.device,
    dtype: torch.dtype,
    *,
    sides: tuple[int, ...] = SIDES,
    time_budget: float = 100.0,
    say: Callable[[str], None] = print,
) -> list[SizeResult]:
    """Time every number of agents on every grid, smallest first.

    Args:
        device, dtype: where and in what precision.
        sides: rows, and columns, of the grids.
        time_budget: seconds. Grids that would exceed the remaining time are not measured.
        say: called with lines about the progress.
    """
    end = time.monotonic() + time_budget
    results: list[SizeResult] = []
    estimate = 0.0
    for side, before in zip(sides, (0, *sides), strict=False):
        estimate *= (side / before) ** 4 if before else 0.0  # exact attention is quadratic in the tokens
        if time.monotonic() + estimate > end:
            say(f"{side * side} tokens and more: beyond the time budget")
            break
        began = time.monotonic()
        results.append(_measure_size(side, device, dtype, end - began))
        estimate = _FEWEST_ROUNDS / max(results[-1].rounds, 1) * (time.monotonic() - began)
        ratios = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in results[-1].ratios.items())
        say(f"{side * side} tokens, time ratio by number of agents: {ratios}")
    return results


_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 25
_QUEUED_TOKENS = 2**14
"""Of all calls together that make one timing on an accelerator: of a single short call, only the launches would be
timed, which in a run pass while the device works on what came before."""


def _measure_size(side: int, device: torch.device, dtype: torch.dtype, seconds_left: float) -> SizeResult:
    """Time one number of tokens, in as many rounds as fit in about a tenth of the remaining time."""
    worst: dict[str, float] = {}
    rounds = _MOST_ROUNDS
    for head_dim in HEAD_DIMS:
        repeats = 1 if device.type == "cpu" else max(1, _QUEUED_TOKENS // side**2)
        found = _variants(side, head_dim, device, dtype)
        variants = {name: partial(_repeat, call, repeats) for name, call in found}
        with torch.no_grad():
            interleave(variants, 1, 1, device)  # warm-up
            once = interleave(variants, 1, 0, device).rounds[0]
            fitting = int(0.1 * seconds_left / len(HEAD_DIMS) / sum(once.values()))
            rounds = min(max(fitting, _FEWEST_ROUNDS), rounds)
            timings = interleave(variants, rounds, 0, device)
        for name in once:
            if name != "exact":
                worst[name] = max(worst.get(name, 0.0), timings.time_ratio(name).median)
    return SizeResult(side * side, rounds, worst)


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _variants(
    side: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Exact attention, and every number of agents that could pay (fewer than half the tokens)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (BATCH, HEADS, side * side, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    yield "exact", partial(scaled_dot_product_attention, q, k, v)
    for n in NUM_AGENTS:
        if 2 * n < side * side:
            yield str(n), lambda n=n: landmark_attention(q, k, v, *(sample_tokens(x, (side, side), n) for x in (q, k)))
    # The costlier of the two phases of the published recipe: attention between merged tokens.
    layer = LayerSpec("layer", 0, HEADS, head_dim)
    merged = AgentAttention.from_options(dict(AgentAttention.presets["paper"].options) | {"agent_ratio": 0.5})
    x = torch.randn(BATCH, side * side, HEADS * head_dim, generator=generator, device=device, dtype=dtype)
    yield MERGE, partial(merged.build(layer), q, k, v, LayerCall(x, (side, side)))


def thresholds_from(results: list[SizeResult], margin: float = MARGIN) -> dict[str, int]:
    """Agents -> the smallest number of tokens from which they are faster up to the largest measured one.

    Agents that are not faster at the largest number of tokens, or were not measured there, are left out.
    """
    row: dict[str, int] = {}
    for name in NAMES:
        for result in sorted(results, key=lambda result: result.tokens, reverse=True):
            if result.ratios.get(name, margin) >= margin:
                break
            row[name] = result.tokens
    return row


def row_from(results: list[SizeResult], device: str, before: Thresholds) -> dict[str, int | None]:
    """The row of a device: as measured, and for agents that were not faster what can be said nevertheless.

    These keep the number of tokens that they have in the table `before` if it lies beyond what was measured;
    otherwise the measurement contradicts it, and there is none.
    """
    found, row = thresholds_from(results), {}
    for name in NAMES:
        assumed = min_tokens_for(before, device, None if name == MERGE else int(name))
        beyond = assumed is not None and assumed > _measured_up_to(results, name)
        row[name] = found.get(name, assumed if beyond else None)
    return row


def lines_from(results: list[SizeResult], row: Mapping[str, int | None]) -> list[str]:
    """One line per number of agents: what was measured, and what is assumed beyond.

    Args:
        results: measured.
        row: from `row_from`.
    """
    found, lines = thresholds_from(results), []
    for name, tokens in row.items():
        who = "merged agents" if name == MERGE else f"{name} agents"
        up_to = _measured_up_to(results, name)
        if name in found:
            lines.append(f"{who} are faster from {tokens} tokens up")
            continue
        measured = f"are not faster up to {up_to} tokens" if up_to else "were not measured"
        then = f"assumed faster from {tokens} up, as in the package"
        lines.append(f"{who} {measured}; {'exact attention until a call is timed' if tokens is None else then}")
    return lines


def _measured_up_to(results: list[SizeResult], name: str) -> int:
    """The largest number of tokens at which these agents were measured; 0 if they were not."""
    return max((result.tokens for result in results if name in result.ratios), default=0)


def save_thresholds(path: Path, device: torch.device, dtype: torch.dtype, results: list[SizeResult]) -> dict[str, int]:
    """Put a device's row into a table, new or existing, and leave the other devices' rows alone.

    Args:
        path: the table.
        device, dtype: what was measured.
        results: at least one.

    Returns:
        What was measured of the row, see `thresholds_from`; `row_from` fills in the rest from the package's table.

    Raises:
        ValueError: the file exists but is not a table.
    """
    data = read_json(path) if path.is_file() else {}
    row = row_from(results, device.type, read_thresholds(shipped_file()))
    measured = {
        "machine": describe_machine(device),
        "dtype": dtype_name(dtype),
        "batch": BATCH,
        "heads": HEADS,
        "head_dims": list(HEAD_DIMS),
        "margin": MARGIN,
        "time_ratios": {str(r.tokens): {str(n): round(x, 4) for n, x in r.ratios.items()} for r in results},
        "rounds": {str(r.tokens): r.rounds for r in results},
    }
    for key, value in (("devices", row), ("status", "measured"), ("measured", measured)):
        section = data.setdefault(key, {})
        if not isinstance(section, dict):
            raise ValueError(f"{str(path)!r} is not a table of thresholds: {key!r} is not an object")
        section[device.type] = value
    write_json(path, data)
    return thresholds_from(results)

"""Time of the cores alone: what happens between the projections, without these.

Shapes: B batch, H heads, N = h·w tokens on a grid (h, w), D channels per head, C = H·D channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import exp, isqrt, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffattn.files import read_json, write_json
from diffattn.functional import (
    circulant_attention,
    focused_linear_attention,
    inline_attention,
    mamba_like_linear_attention,
    mediator_attention,
    pool_mediators,
)
from diffattn.machine import describe_machine
from diffattn.measure.interleave import Timings, interleave

EXACT = "softmax"
BARS = {"inline": 8.0, "focused_linear": 4.0, "circulant": 4.0}
"""How many times faster than exact attention a core should be at `BAR_TOKENS` tokens on two CPU cores."""
BAR_TOKENS = 4096


@dataclass(frozen=True)
class CoreConfig:
    """What is timed.

    Raises:
        ValueError: a number of tokens that is no square, or fewer tokens than mediators.
    """

    tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    mediators: tuple[int, ...] = (16, 64)
    batch: int = 2
    width: int = 384
    heads: int = 6
    rounds: int = 9
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            if isqrt(tokens) ** 2 != tokens or tokens < max(self.mediators):
                raise ValueError(f"tokens must be squares of at least {max(self.mediators)}, got {tokens}")


def cores(config: CoreConfig, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Every core on the same random inputs, as a layer hands them over: q, k and v of one projection."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch, tokens, 3, config.width)
    qkv = torch.randn(shape, generator=generator).to(config.device, getattr(torch, config.dtype))
    q, k, v = qkv.unbind(2)  # [B, N, C]
    qh, kh, vh = (x.unflatten(-1, (config.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    grid, scale = (isqrt(tokens), isqrt(tokens)), torch.full((config.width,), 0.7, device=config.device)

    def mediated(n: int) -> Callable[[], Tensor]:
        return lambda: mediator_attention(qh, kh, vh, pool_mediators(qh, grid, n))

    return {
        EXACT: lambda: scaled_dot_product_attention(qh, kh, vh),
        **{f"{n} mediators": mediated(n) for n in config.mediators},
        "inline": lambda: inline_attention(qh, kh, vh),
        "focused_linear": lambda: focused_linear_attention(q, k, v, scale=scale, num_heads=config.heads),
        "mlla": lambda: mamba_like_linear_attention(q, k, v, grid=grid, num_heads=config.heads),
        "circulant": lambda: circulant_attention(q, k, v, grid=grid),
    }


def measure(config: CoreConfig, file: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Time all sizes, resuming from the results in the file, which is complete after every round.

    Raises:
        ValueError: the file holds times of other settings, or of another machine.
    """
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    settings = {k: v for k, v in settings.items() if k not in ("rounds", "tokens")}
    results = {"machine": describe_machine(torch.device(config.device)), "settings": settings, "results": {}}
    if file.is_file():
        results["results"] = _to_resume(read_json(file), results, file)
    for tokens in config.tokens:
        before = results["results"].get(str(tokens), {"rounds": []})["rounds"]

        def keep(timings: Timings, tokens: int = tokens) -> None:
            rounds = [dict(r) for r in timings.rounds]
            results["results"][str(tokens)] = {"rounds": rounds, **timings.to_dict()["variants"]}
            write_json(file, results)

        with torch.inference_mode():
            interleave(cores(config, tokens), max(config.rounds, len(before)), device=config.device,
                       finished=before, on_round=keep)  # fmt: skip
        say(f"{tokens} tokens: {max(config.rounds, len(before))} rounds")
    return results


def _to_resume(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The results of a file, if they belong to these settings and this machine."""
    changed = [key for key, value in now["settings"].items() if before.get("settings", {}).get(key) != value]
    changed += [key for key in ("cpu", "gpu", "threads") if before["machine"].get(key) != now["machine"].get(key)]
    if changed:
        raise ValueError(f"{str(file)!r} holds times with another {', '.join(changed)}: choose another --out")
    return before["results"]


def crossover(results: Mapping[str, Any], name: str) -> float | None:
    """The number of tokens from which a core is faster than exact attention; None if at no measured size.

    Between two sizes the time ratio is taken as a power of the number of tokens. The smallest size measured if it is
    faster there already.
    """
    ratios = [(int(n), entry[name]["time_ratio"]["median"]) for n, entry in sorted(results.items(), key=_size)]
    if ratios[0][1] < 1:
        return float(ratios[0][0])
    for (few, slow), (many, fast) in pairwise(ratios):
        if fast < 1:
            share = log(slow) / (log(slow) - log(fast))
            return exp(log(few) + share * (log(many) - log(few)))
    return None


def _size(item: tuple[str, Any]) -> int:
    return int(item[0])


def table(found: Mapping[str, Any]) -> str:
    """Markdown: speed-up over exact attention by size with the middle half of the rounds, and the crossover."""
    results = dict(sorted(found["results"].items(), key=_size))
    names = [name for name in next(iter(results.values())) if name != "rounds"]
    lines = ["| core | " + " | ".join(f"{n} tokens" for n in results) + " | faster from |",
             "|---|" + "---|" * (len(results) + 1)]  # fmt: skip
    for name in names:
        cells = [_cell(entry[name], name) for entry in results.values()]
        first = None if name == EXACT else crossover(results, name)
        lines.append(f"| {name} | {' | '.join(cells)} | {'-' if first is None else f'{first:.0f} tokens'} |")
    return "\n".join([*lines, "", *bars(results)]) + "\n"


def _cell(entry: Mapping[str, Any], name: str) -> str:
    if name == EXACT:
        return f"{1e3 * entry['seconds']['median']:.3g} ms"
    low, high = entry["time_ratio"]["iqr"]
    return f"**{entry['speedup']:.2f}×** ({1 / high:.2f}–{1 / low:.2f})"


def bars(results: Mapping[str, Any]) -> list[str]:
    """The required speed-ups, and whether they are reached; nothing if that size was not measured."""
    entry = results.get(str(BAR_TOKENS))
    if entry is None:
        return []
    met = {name: entry[name]["speedup"] for name in BARS}
    return [f"At {BAR_TOKENS} tokens: " + ", ".join(
        f"{name} {speedup:.1f}× (bar {BARS[name]:g}×: {'met' if speedup >= BARS[name] else 'missed'})"
        for name, speedup in met.items()
    )]  # fmt: skip


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Milliseconds by number of tokens, both logarithmic; error bars for the middle half of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results: Sequence[tuple[str, Any]] = sorted(found["results"].items(), key=_size)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, name in enumerate(n for n in results[0][1] if n != "rounds"):
        seconds = [entry[name]["seconds"] for _, entry in results]
        middle = [1e3 * s["median"] for s in seconds]
        spread = [[m - 1e3 * s["iqr"][0] for m, s in zip(middle, seconds, strict=True)],
                  [1e3 * s["iqr"][1] - m for m, s in zip(middle, seconds, strict=True)]]  # fmt: skip
        axis.errorbar([int(n) for n, _ in results], middle, spread, marker="os^Dv<>p"[i % 8], label=name,
                      linewidth=2.5 if name == EXACT else 1.3, capsize=2)  # fmt: skip
    s = found["settings"]
    title = f"batch {s['batch']}, width {s['width']}, {s['heads']} heads, {s['dtype']}, {s['device']}"
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward", title=title)
    axis.legend()
    figure.savefig(path, dpi=90)

"""How far training-free approximations of self-attention are from exact attention, layer by layer.

    python pipelines/attention_error.py --model emoji-sd --out samples/attention-error

Draws a few pictures without any patch, records what every self-attention layer with the most tokens saw at a few noise
levels, and computes each approximation on it. The relative error is |ô - o| / |o| over a head's outputs, averaged over
heads, pictures and layers. Cost is counted in multiply-adds of the attention itself, as a share of exact attention.
Results go to errors.json, errors.md and errors.png.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from attention_candidates import Layer, candidates, exact
from rich.progress import track
from torch import Tensor

from diffattn.architectures.denoisers import self_attention_layers
from diffattn.drawing.loading import load_pipeline
from diffattn.files import write_json
from diffattn.machine import describe_machine
from diffattn.noise_level import NoiseLevels

PROMPTS = "footprints,T-Rex,green heart,tent"
LEVELS = (0.95, 0.6, 0.2)  # noise levels of the panels


class Recorder:
    """An attention processor that computes exact attention and records its inputs in chosen steps."""

    def __init__(self, run: "Run", name: str) -> None:
        self.run, self.name = run, name

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        q, k, v = (p(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for p in (attn.to_q, attn.to_k, attn.to_v))  # fmt: skip
        self.run.saw(self.name, Layer(hidden_states, q, k, v))
        out = exact(Layer(hidden_states, q, k, v)).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class Run:
    """One drawing of all prompts, and the records of it."""

    def __init__(self, keep: Iterable[int], min_tokens: int) -> None:
        self.step, self.keep, self.min_tokens = 0, frozenset(keep), min_tokens
        self.last: dict[str, Layer] = {}
        self.records: list[tuple[str, int, Layer]] = []

    def saw(self, name: str, layer: Layer) -> None:
        x, q, k, v = (x.chunk(2)[-1].clone() for x in (layer.x, *layer.qkv))  # the conditional half of guidance
        half = Layer(x, q, k, v)
        if half.q.shape[2] < self.min_tokens:
            return
        if self.step in self.keep:
            self.records.append((name, self.step, Layer(half.x, *half.qkv, before=self.last.get(name))))
        self.last[name] = half

    def after_step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.step = index + 1
        return tensors


def record(pipe: Any, prompts: Sequence[str], steps: int, guidance: float, size: int | None, tokens: int) -> Run:
    """Draws the prompts with seeds 0, 1, ... and records six steps, from the second to the last."""
    run = Run({1 + round(i * (steps - 2) / 5) for i in range(6)}, tokens)
    originals = pipe.unet.attn_processors
    try:
        for spec, module in self_attention_layers(pipe.unet):
            module.set_processor(Recorder(run, spec.name))
        seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        pipe(list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="latent",
             height=size, width=size, callback_on_step_end=run.after_step)  # fmt: skip
    finally:
        pipe.unet.set_attn_processor(originals)
    return run


def relative_error(found: Tensor, true: Tensor) -> float:
    """Mean over pictures and heads."""
    return ((found - true).norm(dim=(2, 3)) / true.norm(dim=(2, 3))).mean().item()


def measure(run: Run, noise: Sequence[float]) -> list[dict[str, Any]]:
    """One row per layer, step, family and size."""
    rows = []
    for name, step, layer in track(run.records, "approximating"):
        true, (tokens, dim) = exact(layer), layer.q.shape[2:]
        logits = (layer.q @ layer.k.mT * dim**-0.5).std(-1).mean().item()
        for candidate in candidates():
            rows.append({
                "layer": name, "step": step, "noise_level": noise[step], "tokens": tokens, "logit_std": logits,
                "family": candidate.family,
                "cost": candidate.cost(tokens, dim) / (2 * tokens**2) + candidate.exact_heads(layer),
                "error": relative_error(candidate.run(layer), true),
            })  # fmt: skip
    return _with_mean_cost(rows, [c.family for c in candidates() if c.family.startswith("InLine where")])


def _with_mean_cost(rows: list[dict[str, Any]], families: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with the mean cost of families whose cost depends on the input, and each row's own cost as "own_cost"."""
    means = {family: fmean(row["cost"] for row in rows if row["family"] == family) for family in families}
    return [row | {"cost": means[row["family"]], "own_cost": row["cost"]} if row["family"] in means else row
            for row in rows]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: families and sizes by mean error over layers and noise levels, best first."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["family"], round(row["cost"], 4)].append(row)
    lines = ["| approximation | cost, % of exact | error | noise > 0.7 | 0.4 to 0.7 | < 0.4 | worst layer |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for (family, cost), found in sorted(groups.items(), key=lambda item: fmean(r["error"] for r in item[1])):
        bands = [[r["error"] for r in found if low <= r["noise_level"] < high]
                 for low, high in ((0.7, 2), (0.4, 0.7), (-1, 0.4))]  # fmt: skip
        means = " | ".join(f"{fmean(band):.3f}" if band else "-" for band in bands)
        errors = [r["error"] for r in found]
        lines.append(f"| {family} | {100 * cost:.1f} | **{fmean(errors):.3f}** | {means} | {max(errors):.2f} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Above: error against cost at three noise levels. Below: error against noise level for every layer, at 1/16."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    steps = sorted({row["step"]: row["noise_level"] for row in rows}.items())
    style = {f: {"color": f"C{i % 10}", "marker": "os^Dv<>pP*X"[i % 11], "markersize": 5,
                 "linewidth": 2.5 if "ours" in f else 1.1} for i, f in enumerate(families)}  # fmt: skip
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, squeeze=False)
    for axis, level in zip(axes[0], LEVELS, strict=True):
        step, shown = min(steps, key=lambda item: abs(item[1] - level))
        for family in families:
            points: dict[float, list[float]] = defaultdict(list)
            for row in rows:
                if (row["family"], row["step"]) == (family, step):
                    points[row["cost"]].append(row["error"])
            axis.plot(*zip(*sorted((100 * c, fmean(e)) for c, e in points.items()), strict=True), label=family,
                      **style[family])  # fmt: skip
        axis.set(xscale="log", yscale="log", title=f"noise level {shown:.2f}, mean over layers",
                 xlabel="multiply-adds, % of exact attention", ylabel="relative error")  # fmt: skip
    for axis, layer in zip(axes[1], layers, strict=False):
        for family in families:
            near = min((r["cost"] for r in rows if r["family"] == family), key=lambda c: abs(c - 0.15))
            curve = sorted((r["noise_level"], r["error"]) for r in rows
                           if (r["family"], r["layer"], r["cost"]) == (family, layer, near))  # fmt: skip
            axis.plot(*zip(*curve, strict=True), **style[family])
        axis.set(yscale="log", title=layer.replace(".transformer_blocks.0.attn1", ""), xlabel="noise level",
                 ylabel="relative error, at the size nearest 15 % of the cost")  # fmt: skip
        axis.invert_xaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=90)


def main(
    model: Annotated[str, typer.Option(help="Embedded model, folder or hub id of a Stable Diffusion.")] = "emoji-sd",
    prompts: Annotated[str, typer.Option(help="Comma-separated; picture i has seed i.")] = PROMPTS,
    steps: Annotated[int, typer.Option(min=3)] = 20,
    guidance: Annotated[float, typer.Option(help="Above 1: the conditional half is measured.")] = 2.5,
    size: Annotated[int | None, typer.Option(help="Pixels, width and height; the model's own if not given.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Layers with fewer tokens are left out.")] = 1024,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/attention-error"),
) -> None:
    """Compare approximations of self-attention on the inputs of a model's layers."""
    if guidance <= 1:
        raise typer.BadParameter(f"guidance must be above 1, got {guidance}")
    pipe = load_pipeline(model)
    names = [name.strip() for name in prompts.split(",") if name.strip()]
    with torch.no_grad():
        run = record(pipe, names, steps, guidance, size, min_tokens)
        if not run.records:
            raise typer.BadParameter(f"no self-attention layer has {min_tokens} tokens or more at this size")
        levels = NoiseLevels(pipe.scheduler)
        noise = [levels.read(float(t)).levels[0] for t in pipe.scheduler.timesteps]
        rows = measure(run, noise)
    settings = {"model": model, "prompts": names, "steps": steps, "guidance": guidance, "size": size, "seed": 0}
    write_json(
        out / "errors.json", {"settings": settings, "machine": describe_machine(torch.device("cpu")), "rows": rows}
    )
    (out / "errors.md").write_text(table(rows))
    plot(rows, out / "errors.png")
    typer.echo(table(rows))


if __name__ == "__main__":
    typer.run(main)

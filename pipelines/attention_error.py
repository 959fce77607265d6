"""How far training-free approximations of self-attention are from exact attention, layer by layer.

    python pipelines/attention_error.py --model emoji-sd --out samples/attention-error

Draws a few pictures without any patch, records what every self-attention layer with the most tokens saw at a few noise
levels, and computes each approximation on it. The relative error is |ô - o| / |o| over a head's outputs, averaged over
heads, pictures and layers. Cost is counted in multiply-adds of the attention itself, as a share of exact attention.
Where tokens of a text attend beside the picture's (Stable Diffusion 3), the methods of `diffattn.patch` are compared,
and the error of the text's outputs stands beside that of the picture's.
Results go to errors.json, errors.md and errors.png.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from attention_candidates import Layer, candidates, exact, joint_candidates
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from diffattn.architectures.denoisers import denoiser_of, self_attention_layers
from diffattn.drawing.loading import load_pipeline
from diffattn.files import write_json
from diffattn.machine import describe_machine
from diffattn.methods.base import LayerSpec
from diffattn.noise_level import NoiseLevels

PROMPTS = "footprints,T-Rex,green heart,tent"
LEVELS = (0.95, 0.6, 0.2)  # noise levels of the panels


class Recorder(TorchFunctionMode):
    """Records the input of attention where the pipeline's own code computes it, layer by layer."""

    def __init__(self, run: "Run", layers: Sequence[tuple[LayerSpec, Any]]) -> None:
        super().__init__()
        self.run, self.current = run, None
        self.hooks = [
            module.register_forward_pre_hook(partial(self._enter, spec), with_kwargs=True) for spec, module in layers
        ]

    def _enter(self, spec: LayerSpec, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = (spec.name, args[0] if args else kwargs["hidden_states"])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and self.current is not None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            (name, x), self.current = self.current, None
            q, k, v = (given[part] for part in ("query", "key", "value"))
            self.run.saw(name, Layer(x, q, k, v, text=q.shape[2] - x.shape[1]))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()


class Run:
    """One drawing of all prompts, and the records of it."""

    def __init__(self, keep: Iterable[int], min_tokens: int | None) -> None:
        """`min_tokens`: of the layers to record; None: those that have the most tokens of all."""
        self.step, self.keep, self.min_tokens = 0, frozenset(keep), min_tokens
        self.last: dict[str, Layer] = {}
        self.records: list[tuple[str, int, Layer]] = []

    def saw(self, name: str, layer: Layer) -> None:
        x, q, k, v = (x.chunk(2)[-1].clone() for x in (layer.x, *layer.qkv))  # the conditional half of guidance
        half = Layer(x, q, k, v, text=layer.text)
        most = max((kept.x.shape[1] for kept in self.last.values()), default=0)
        if x.shape[1] < (most if self.min_tokens is None else self.min_tokens):
            return
        if self.min_tokens is None and x.shape[1] > most:
            self.records.clear()
        if self.step in self.keep:
            self.records.append((name, self.step, replace(half, before=self.last.get(name))))
        self.last[name] = half

    def after_step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.step = index + 1
        return tensors


def record(pipe: Any, prompts: Sequence[str], steps: int, guidance: float, size: int | None, tokens: int | None) -> Run:
    """Draws the prompts with seeds 0, 1, ... and records six steps, from the second to the last."""
    run = Run({1 + round(i * (steps - 2) / 5) for i in range(6)}, tokens)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with Recorder(run, self_attention_layers(denoiser_of(pipe))):
        pipe(list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="latent",
             height=size, width=size, callback_on_step_end=run.after_step)  # fmt: skip
    return run


def relative_error(found: Tensor, true: Tensor) -> float:
    """Mean over pictures and heads."""
    return ((found - true).norm(dim=(2, 3)) / true.norm(dim=(2, 3))).mean().item()


def measure(run: Run, noise: Sequence[float]) -> list[dict[str, Any]]:
    """One row per layer, step, family and size."""
    rows = []
    for name, step, layer in track(run.records, "approximating"):
        true, (total, dim), tokens = exact(layer), layer.q.shape[2:], layer.x.shape[1]
        families = joint_candidates(layer.text) if layer.text else candidates()
        logits = (layer.q @ layer.k.mT * dim**-0.5).std(-1).mean().item()
        for candidate in families:
            found, fallen_back = candidate.run(layer), candidate.exact_heads(layer)
            picture, text = ([part(x) for x in (found, true)] for part in (layer.layout.on_grid, layer.layout.context))
            rows.append({
                "layer": name, "step": step, "noise_level": noise[step], "tokens": tokens, "logit_std": logits,
                "family": candidate.family, "exact_heads": fallen_back,
                "cost": candidate.cost(tokens, dim) / (2 * total**2) + fallen_back,
                "error": relative_error(*picture),
            } | ({"text_error": relative_error(*text)} if layer.text else {}))  # fmt: skip
    return _with_mean_cost(rows, list(dict.fromkeys(row["family"] for row in rows if row["exact_heads"])))


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
    has_text = any("text_error" in row for row in rows)
    more = " of the text | heads run exact |" if has_text else ""
    lines = [f"| approximation | cost, % of exact | error | noise > 0.7 | 0.4 to 0.7 | < 0.4 | worst layer |{more}"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for (family, cost), found in sorted(groups.items(), key=lambda item: fmean(r["error"] for r in item[1])):
        bands = [[r["error"] for r in found if low <= r["noise_level"] < high]
                 for low, high in ((0.7, 2), (0.4, 0.7), (-1, 0.4))]  # fmt: skip
        means = " | ".join(f"{fmean(band):.3f}" if band else "-" for band in bands)
        errors = [r["error"] for r in found]
        row = f"| {family} | {100 * cost:.1f} | **{fmean(errors):.3f}** | {means} | {max(errors):.2f} |"
        if has_text:
            row += f" {fmean(r['text_error'] for r in found):.3f} | {_percent(r['exact_heads'] for r in found)} |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def _percent(shares: Iterable[float]) -> str:
    return f"{100 * fmean(shares):.0f} %"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Above: error against cost at three noise levels. Below: error against noise level for three layers, at 1/16."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    layers = layers if len(layers) <= 3 else [layers[0], layers[len(layers) // 2], layers[-1]]
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
    model: Annotated[str, typer.Option(help="Embedded model, folder or hub id; draws from text.")] = "emoji-sd",
    prompts: Annotated[str, typer.Option(help="Comma-separated; picture i has seed i.")] = PROMPTS,
    steps: Annotated[int, typer.Option(min=3)] = 20,
    guidance: Annotated[float, typer.Option(help="Above 1: the conditional half is measured.")] = 2.5,
    size: Annotated[int | None, typer.Option(help="Pixels, width and height; the model's own if not given.")] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(help="Layers with fewer tokens are left out. [default: the most that a layer has]"),
    ] = None,
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

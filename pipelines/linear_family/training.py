"""One table of trained models: equal parameters, equal steps, equal data, one attention each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from diffattn.data import open_dataset
from diffattn.evaluation.sit_quality import Drawing, sit_quality
from diffattn.files import read_json, write_json
from diffattn.machine import choose_dtype, describe_machine
from diffattn.measure.flops import forward_gflops
from diffattn.measure.interleave import interleave
from diffattn.measure.memory import peak_mib
from diffattn.metrics.extractors import load_extractor, weights_hash
from diffattn.metrics.reference import Reference
from diffattn.models import DiT
from diffattn.sampling import SiTPipeline
from diffattn.training.config import TrainConfig
from diffattn.training.run import train
from diffattn.training.setup import set_up

SOFTMAX = "softmax"
SUBJECTS: Mapping[str, Sequence[str]] = {
    SOFTMAX: ["model.attention=softmax"],
    "mediator": ["model.attention=mediator"],
    "inline": ["model.attention=inline"],
    "focused_linear": ["model.attention=focused_linear"],
    "mlla": ["model.attention=mlla"],
    "circulant": ["model.attention=circulant"],
    "steps": ["model.attention=softmax", "model.steps={steps}"],
}
"""What is compared -> its settings; {steps} is filled in by `steps_for`."""

TOLERANCE = 0.02
"""Largest difference in parameters from the softmax model, as a share."""


@dataclass(frozen=True)
class Comparison:
    """What is trained, and how it is scored."""

    data: str
    reference: str
    out: Path
    preset: str = "cifar-linear-cpu"
    settings: tuple[str, ...] = ()  # of every run, on top of the preset
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    second_seeds: int = 2  # the best so many get a second seed, and softmax with them
    drawing: Drawing = field(default_factory=lambda: Drawing(2000))
    extractor: str = "cifar-classifier"
    rounds: int = 5
    device: str = "cpu"
    dtype: str = "float32"  # in which pictures are drawn


def parameters(arguments: Mapping[str, Any]) -> int:
    """The parameters of a model, counted without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(**arguments).parameters())


def matched(config: TrainConfig, wanted: int, sample: Mapping[str, Any]) -> float:
    """The width of the MLPs, as a multiple of the model's, at which a model has as many parameters as wanted.

    Args:
        config: of the model.
        wanted: parameters.
        sample: arguments of `DiT` that the data decide.

    Raises:
        ValueError: they cannot be brought within `TOLERANCE`.
    """
    arguments = config.model_arguments() | dict(sample)
    width = arguments["hidden_size"]

    def off(hidden: int) -> int:
        return parameters(arguments | {"mlp_ratio": hidden / width}) - wanted

    low, high = 1, 16 * width
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if off(middle) >= 0 else (middle + 1, high)
    hidden = min((h for h in (low - 1, low) if h > 0), key=lambda h: abs(off(h)))
    if abs(off(hidden)) > TOLERANCE * wanted:
        raise ValueError(f"{config.model.attention}: no MLP width comes within {TOLERANCE:.0%} of {wanted} parameters")
    return hidden / width


def steps_for(config: TrainConfig) -> str:
    """Two steps: a third of the layers at half the width, or what of it divides into heads, then all of it."""
    model = TrainConfig.model_arguments(config)
    layers, width, heads = model["num_layers"], model["hidden_size"], model["num_heads"]
    narrow = width // heads * max(heads // 2, 1)
    first = max(layers // 3, 1)
    return f"[[{narrow},{first}],[{width},{layers - first}]]"


def run_config(c: Comparison, subject: str, seed: int, sample: Mapping[str, Any]) -> TrainConfig:
    """The training run of a subject, with as many parameters as the softmax model has."""
    options = {"data.source": c.data, "run.out": str(c.out / "runs" / f"{subject}-{seed}"), "run.seed": seed}
    plain = TrainConfig.read(c.preset, None, [*c.settings, *SUBJECTS[SOFTMAX]], options)
    own = [setting.replace("{steps}", steps_for(plain)) for setting in SUBJECTS[subject]]
    config = TrainConfig.read(c.preset, None, [*c.settings, *own], options)
    if subject == SOFTMAX:
        return config
    ratio = matched(config, parameters(plain.model_arguments() | dict(sample)), sample)
    return TrainConfig.read(c.preset, None, [*c.settings, *own, f"model.mlp_ratio={ratio}"], options)


def compare(c: Comparison, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, score and time everything that has not been done yet.

    Raises:
        ValueError: results of other settings are in the folder.
    """
    file = c.out / "trained.json"
    settings = {"preset": c.preset, "settings": list(c.settings), "drawing": asdict(c.drawing), "device": c.device,
                "extractor": c.extractor, "dtype": c.dtype}  # fmt: skip
    machine = describe_machine(torch.device(c.device))
    found: dict[str, Any] = {"machine": machine, "settings": settings, "runs": {}, "time_ratio": {}}
    take_over(found, file)
    eye = load_extractor(c.extractor, device=c.device)
    for subject in c.subjects:
        _one(c, subject, 0, found, eye, file, say)
    for subject in again(found["runs"], c.second_seeds):
        _one(c, subject, 1, found, eye, file, say)
    take_over(found, file)
    if set(found["time_ratio"]) != {run["subject"] for run in found["runs"].values()}:
        found["time_ratio"] = timed(c, found["runs"])
    write_json(file, found)
    return found


def take_over(found: dict[str, Any], file: Path) -> None:
    """Add the runs of a file of results, where other processes may write theirs, and what it timed.

    Raises:
        ValueError: its runs have other settings.
    """
    if not file.is_file():
        return
    before = read_json(file)
    if before["settings"] != found["settings"]:
        raise ValueError(
            f"{str(file)!r} holds runs of {before['settings']}, now {found['settings']}: choose another --out"
        )
    found["runs"] = before["runs"] | found["runs"]
    found["time_ratio"] = found["time_ratio"] or before.get("time_ratio", {})


def again(runs: Mapping[str, Any], best: int) -> list[str]:
    """Softmax and the best others by FID, which get a second seed."""
    fids = {run["subject"]: run["scores"]["fid"] for run in runs.values() if run["seed"] == 0}
    others = sorted((name for name in fids if name != SOFTMAX), key=fids.__getitem__)
    return [name for name in (SOFTMAX, *others[:best]) if name in fids] if best else []


def _one(
    c: Comparison, subject: str, seed: int, found: dict[str, Any], eye: Any, file: Path, say: Callable[[str], None]
) -> None:
    """Train and score one run, if that is not done."""
    name = f"{subject}-{seed}"
    take_over(found, file)
    if name in found["runs"]:
        return
    sample = _sample(c)
    config = run_config(c, subject, seed, sample)
    say(f"{name}: training")
    folder = train(set_up(config, "cpu" if c.device == "cpu" else "auto", say))
    drawn = _pipeline(folder, c.device).to(choose_dtype(c.dtype, torch.device(c.device)))
    model = _pipeline(folder, c.device).transformer
    real = open_dataset(c.reference, config.data.size)
    truth = Reference.of(Path(c.reference).name, (real[i][0][None] for i in range(len(real))), eye)
    result = sit_quality(drawn, c.drawing, truth, eye, name).to_dict()
    size = model.config["sample_size"]
    noise = torch.randn(c.drawing.batch, model.in_channels, size, size, device=c.device)

    def call() -> None:
        with torch.inference_mode():
            model(noise, torch.full((len(noise),), 0.5), torch.zeros(len(noise), dtype=torch.long))

    found["runs"][name] = {
        **result, "subject": subject, "seed": seed, "pipeline": str(Path(folder).relative_to(c.out)),
        "weights": weights_hash(model),
        "parameters": sum(p.numel() for p in model.parameters()), "gflops": forward_gflops(model),
        "peak_mib": peak_mib(call, torch.device(c.device)), "mlp_ratio": config.model.mlp_ratio,
    }  # fmt: skip
    take_over(found, file)
    write_json(file, found)
    say(f"{name}: {result['scores']}")


def _sample(c: Comparison) -> dict[str, Any]:
    """Arguments of `DiT` that the data decide."""
    size = TrainConfig.read(c.preset, None, c.settings).data.size
    dataset = open_dataset(c.data, size)
    return {"in_channels": 3, "sample_size": size, "num_classes": len(dataset.class_names)}


def _pipeline(folder: str | Path, device: str) -> SiTPipeline:
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def timed(c: Comparison, runs: Mapping[str, Any]) -> dict[str, Any]:
    """Time of one evaluation of a batch over that of the softmax model, interleaved."""
    firsts = sorted((run for run in runs.values() if run["seed"] == 0), key=lambda run: run["subject"] != SOFTMAX)
    models: dict[str, nn.Module] = {
        run["subject"]: _pipeline(c.out / run["pipeline"], c.device).transformer for run in firsts
    }
    first = next(iter(models.values()))
    assert isinstance(first, DiT)
    h, w = (side * first.patch_size for side in first.grid)
    x = torch.randn(c.drawing.batch, first.in_channels, h, w, device=c.device)
    t, y = torch.full((len(x),), 0.5, device=c.device), torch.zeros(len(x), dtype=torch.long, device=c.device)
    calls = {name: (lambda model=model: model(x, t, y)) for name, model in models.items()}
    with torch.inference_mode():
        timings = interleave(calls, c.rounds, device=c.device)
    return {name: timings.time_ratio(name).to_dict() for name in calls}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a line per subject, both seeds of those that have two, by the first seed's FID."""
    samples = found["settings"]["drawing"]["samples"]
    lines = [f"| attention | parameters | FID-{samples} | KID × 10³ ± std | GFLOPs per evaluation | time ratio (IQR) "
             "| peak MiB |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    by_subject: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(found["runs"].values(), key=lambda run: run["seed"]):
        by_subject.setdefault(run["subject"], []).append(run)
    for subject, runs in sorted(by_subject.items(), key=lambda item: fmean(r["scores"]["fid"] for r in item[1])):
        fids = ", ".join(f"{run['scores']['fid']:.2f}" for run in runs)
        kids = ", ".join(f"{1e3 * r['scores']['kid']:.2f} ± {1e3 * r['scores']['kid_std']:.2f}" for r in runs)
        time, run = found["time_ratio"][subject], runs[0]
        memory = "-" if run["peak_mib"] is None else f"{run['peak_mib']:.0f}"
        lines.append(
            f"| {subject} | {run['parameters'] / 1e6:.2f} M | {fids} | {kids} | {run['gflops']:.3g} "
            f"| {time['median']:.2f} ({time['iqr'][0]:.2f}–{time['iqr'][1]:.2f}) | {memory} |"
        )
    return "\n".join(lines) + "\n"

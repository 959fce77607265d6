"""All settings of a training run: defaults, presets, files and command-line settings.

Later ones override earlier ones: defaults, preset, file, `section.field=value` settings.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin

import yaml

from diffattn.files import decode_text
from diffattn.models.config import PATHS, check_one_of
from diffattn.models.config import PRESETS as MODEL_PRESETS
from diffattn.training.presets import PRESETS
from diffattn.training.ranges import FREE_TO_CHANGE, PATH_FIELDS, check_ranges


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    source: str = ""  # class folders, a zip or folder with dataset.json or metadata.jsonl, or a Hugging Face name
    size: int = 32  # side of the square pictures, in pixels
    label: str | None = None  # column of metadata.jsonl that holds the class
    split: str = "train"  # of a Hugging Face dataset
    vae: str | None = None  # folder or hub id of an AutoencoderKL; None trains on pixels
    cache: str | None = None  # folder of the cached VAE moments; None: inside the run's folder
    flip: bool = True  # mirror each picture with probability 1/2
    in_memory: bool = True  # decode all pictures once and keep them; for latents memory-mapped shards are used
    num_workers: int = 0  # loader processes, when pictures are not in memory
    skip_bad: bool = False  # skip unreadable pictures, named and counted, instead of stopping


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, see `diffattn.models.DiT`."""

    size: str | None = None  # "S/2" to "XL/8": the next four fields, unless they are given as well
    patch_size: int = 2
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    attention: str | tuple[str, ...] = "mediator"  # for all layers, or one name per layer; `diffattn info` lists them
    attention_options: dict[str, Any] | None = None  # per attention, e.g. {focused_linear: {power: 4}}
    steps: tuple[tuple[int, ...], ...] | None = None  # progressive width: [[width, depth], …], see `models.steps`
    mediators: tuple[int, ...] = (4, 16, 64)  # numbers trained together; each step draws one of them
    qk_norm: bool = False
    learn_sigma: bool = False
    norm_eps: float = 1e-6  # of the norm before each MLP
    frequency_shift: float = 0.0  # of the time frequencies: 0 official, 1 diffusers
    position_scale: float = 1.0  # positions count tokens times this; halve it when the start has half the size
    start: str | None = None  # initial weights: a diffattn folder, or an official .safetensors
    freeze_backbone: bool = False  # train only the weights that a softmax layer does not have


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned: the velocity of an interpolant (Ma et al., "SiT", ECCV 2024)."""

    path: str = "linear"  # or "gvp"
    time: str = "uniform"  # how t is drawn: "uniform" or "logit_normal" (Esser et al., 2024)
    logit_mean: float = 0.0
    logit_std: float = 1.0
    label_dropout: float = 0.1  # share of samples trained without class; guidance needs it
    min_snr: float | None = None  # γ of min-SNR weighting (Hang et al., ICCV 2023); None weights all times alike
    distill: str | None = None  # softmax teacher: a diffattn folder or an official .safetensors
    distill_weight: float = 1.0  # weight of the relative error of each layer that learns another attention
    bins: int = 10  # of t, for the loss per bin

    def warnings(self) -> list[str]:
        """Warnings for the user about this objective."""
        if self.label_dropout == 0:
            return [
                "objective.label_dropout=0 trains no null class: the model will draw without guidance "
                "(guidance_scale=1) only"
            ]
        if self.label_dropout == 1:
            return ["objective.label_dropout=1 trains no class but the null class: the model will not know its labels"]
        return []


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate; batch sizes count samples."""

    name: str = "adamw"  # or "muon": for inner weight matrices, AdamW for the rest (see `training.muon`)
    batch: int = 256  # of one optimizer step, over all processes
    accumulation: int = 1  # passes into which a process splits its share
    lr: float = 1e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    schedule: str = "constant"  # after the warm-up: "constant", "cosine" or "linear"
    final_lr: float = 0.0  # towards which it falls, as a share of the peak: reached after the last step; not "constant"
    warmup: int = 0  # steps of linear warm-up
    clip: float = 1.0  # maximum gradient norm; 0 disables clipping
    ema: float = 0.9999  # decay of the averaged weights, ramped up as (1 + step)/(10 + step)


@dataclass(frozen=True)
class RunConfig:
    """Where, how long, how often."""

    out: str = "outputs/train"  # checkpoints, samples, logs, and at the end the pipeline
    steps: int = 400_000
    seed: int = 0
    precision: str = "auto"  # "fp32", "bf16", or "auto": bf16 where the hardware has it
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 100  # steps
    save_every: int = 5_000
    keep: int = 2  # checkpoints
    sample_every: int = 10_000  # 0 for never
    sample_steps: int = 50
    guidance: float = 4.0  # of the sample grids, and the default of the exported pipeline; 1 without a null class
    eval_every: int = 0  # steps; quality for every number of mediators, 0 for never
    eval_samples: int = 1_000
    extractor: str = "cifar-classifier"  # feature extractor of the evaluation
    max_bad_steps: int = 10  # consecutive non-finite steps after which training stops
    trackers: tuple[str, ...] = ("tensorboard",)  # of accelerate; those not installed are skipped
    timeout_minutes: float = 30.0  # that a process waits for the others before the run is aborted


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Raises:
        ValueError: a value out of range; the message names the field, the value and what is allowed.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_one_of("objective.path", self.objective.path, PATHS)
        check_one_of("objective.time", self.objective.time, ("uniform", "logit_normal"))
        check_one_of("optim.name", self.optim.name, ("adamw", "muon"))
        check_one_of("optim.schedule", self.optim.schedule, ("constant", "cosine", "linear"))
        check_one_of("run.precision", self.run.precision, ("auto", "fp32", "bf16"))
        if self.model.size is not None:
            check_one_of("model.size", self.model.size, tuple(MODEL_PRESETS))
            sizes = MODEL_PRESETS[self.model.size]
            if all(getattr(self.model, name) == getattr(ModelConfig, name) for name in sizes):  # none is given
                object.__setattr__(self, "model", replace(self.model, **sizes))
        check_ranges(asdict(self))

    @classmethod
    def read(
        cls,
        preset: str | None = None,
        file: str | Path | None = None,
        settings: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """A configuration from a preset, a JSON or YAML file, settings ("optim.lr=1e-3"), and named options.

        `options` are {"section.field": value}; None means not given.

        Raises:
            ValueError: an unknown preset, section or field, a value of the wrong kind, or an unreadable file.
        """
        values: dict[str, dict[str, Any]] = {section.name: {} for section in fields(cls)}
        if preset is not None:
            check_one_of("preset", preset, tuple(PRESETS))
            _merge(values, PRESETS[preset])
        if file is not None:
            _merge(values, _read_file(file))
        given: dict[str, dict[str, Any]] = {}
        for setting in settings:
            for section, entries in _parsed(setting).items():
                given.setdefault(section, {}).update(entries)
        _merge(values, given)
        for name, value in (options or {}).items():
            if value is not None:
                section, _, item = name.partition(".")
                _merge(values, {section: {item: value}})
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """The inverse of `to_dict`; missing fields get their defaults, and those that `model.size` sets its values."""
        _known("section", values, [f.name for f in fields(cls)])
        values = {name: _with_sizes(name, entries) for name, entries in values.items()}
        sections = {}
        for section in fields(cls):
            kind = section.default_factory
            assert is_dataclass(kind)
            given = values.get(section.name, {})
            types = {f.name: f.type for f in fields(kind)}
            _known(f"field of {section.name}", given, list(types))
            sections[section.name] = kind(**{k: _cast(f"{section.name}.{k}", v, types[k]) for k, v in given.items()})  # type: ignore[operator]
        return cls(**sections)

    @classmethod
    def of_earlier(cls, values: Mapping[str, Mapping[str, Any]], now: Self, free: Collection[str]) -> Self:
        """What an earlier version wrote as `to_dict`: there `model.size` won over the fields that it sets.

        Args:
            values: written.
            now: gives the fields that are free to change, whose ranges may have changed too.
            free: "section.field" of these.
        """
        found = {section: dict(entries) for section, entries in values.items()}
        found["model"] |= MODEL_PRESETS.get(str(found["model"].get("size")), {})
        for name in free:
            section, _, item = name.partition(".")
            found[section][item] = getattr(getattr(now, section), item)
        return cls.from_dict(found)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All sections as JSON types."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """A short hash of everything that must be equal on all processes of a run; paths may differ."""
        values = self.to_dict()
        shared = {
            f"{s}.{name}": v
            for s, fields in values.items()
            for name, v in fields.items()
            if f"{s}.{name}" not in PATH_FIELDS
        }
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def own_guidance(self) -> float:
        """The guidance scale of the sample grids and of the exported pipeline; 1 without a null class."""
        return self.run.guidance if self.objective.label_dropout else 1.0

    def model_arguments(self) -> dict[str, Any]:
        """The arguments of `DiT` that this configuration sets, without those that depend on the data."""
        names = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_ratio", "attention", "mediators",
                 "attention_options", "steps", "qk_norm", "learn_sigma", "norm_eps", "frequency_shift",
                 "position_scale")  # fmt: skip
        return {name: getattr(self.model, name) for name in names} | {"path": self.objective.path}


def differing_fields(old: TrainConfig, new: TrainConfig, free: Collection[str] = FREE_TO_CHANGE) -> list[str]:
    """ "section.field: old value -> new value" for every difference that prevents resuming; `free`: fields that may
    differ."""
    differing = []
    for section, values in old.to_dict().items():
        for name, value in values.items():
            other = new.to_dict()[section][name]
            if value != other and f"{section}.{name}" not in free:
                differing.append(f"{section}.{name}: {value!r} -> {other!r}")
    return differing


def _known(what: str, given: Iterable[str], allowed: list[str]) -> None:
    if unknown := [name for name in given if name not in allowed]:
        raise ValueError(f"unknown {what}: {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}")


def _merge(values: dict[str, dict[str, Any]], more: Mapping[str, Mapping[str, Any]]) -> None:
    for section, entries in more.items():
        if not isinstance(entries, Mapping):
            raise ValueError(f"{section!r} must be a section with fields, got {entries!r}")
        before = values.setdefault(section, {})
        if section == "model" and entries.get("size", "") is None:  # what the size had set goes with it
            sizes = MODEL_PRESETS.get(str(before.get("size")), {})
            before = {name: value for name, value in before.items() if name not in sizes or value != sizes[name]}
        values[section] = before | dict(_with_sizes(section, entries))


def _with_sizes(section: str, entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a section, with those that `model.size` sets where it is among them and they are not."""
    size = entries.get("size") if section == "model" else None
    return {**MODEL_PRESETS[size], **entries} if isinstance(size, str) and size in MODEL_PRESETS else entries


def _read_file(file: str | Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(decode_text(Path(file).read_bytes()))  # JSON is YAML too
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{str(file)!r} is not a readable JSON or YAML file: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(file)!r} must contain sections such as data and model, got {content!r}")
    return content


def _parsed(setting: str) -> dict[str, dict[str, Any]]:
    """ "section.field=value" -> {section: {field: value}}"""
    name, equals, text = setting.partition("=")
    section, dot, item = name.partition(".")
    if not (equals and dot):
        raise ValueError(f"a setting must be section.field=value, such as optim.lr=1e-4; got {setting!r}")
    try:
        return {section: {item: yaml.safe_load(text)}}
    except yaml.YAMLError:
        raise ValueError(f"{name}: {text!r} is not a value") from None


def _cast(name: str, value: Any, kind: Any) -> Any:
    """The value converted to the field's type; raises `ValueError` naming what is allowed."""
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for option in options:
        try:
            return _as(value, option)
        except (TypeError, ValueError):
            continue
    allowed = " or ".join("none" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _as(value: Any, kind: Any) -> Any:
    if kind is type(None):
        if value is None:
            return None
    elif get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else None
        inner = get_args(kind)
        if items is not None and (inner[-1] is Ellipsis or len(items) == len(inner)):
            return tuple(_as(item, inner[0]) for item in items)
    elif get_origin(kind) is dict:
        if isinstance(value, Mapping):
            return {str(name): item for name, item in value.items()}
    elif kind is float and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-4 as text
    elif type(value) is kind:
        return value
    raise TypeError

"""The protocol of an evaluation's figures, and what must match for a run to be resumed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from diffattn.architectures.denoisers import denoiser_of
from diffattn.evaluation.draw_set import DrawConfig, patch_of, subjects
from diffattn.evaluation.picture_set import PictureSet
from diffattn.evaluation.quality import Protocol
from diffattn.evaluation.references import Source
from diffattn.evaluation.scores import CHUNK
from diffattn.machine import describe_device, dtype_name, versions
from diffattn.methods.thresholds import load_thresholds
from diffattn.metrics.extractors import FeatureExtractor, weights_hash

NOTHING = "none"  # instead of a reference or an extractor
DRAWN = ("num_pictures", "steps", "guidance", "width", "height", "seed", "batch")


@dataclass(frozen=True)
class Evaluated:
    """The parts of one evaluation before any work is done."""

    pipe: Any  # None for pictures from files
    draw: DrawConfig
    acceleration: Mapping[str, Any] | None
    files: PictureSet | None
    prompts: Sequence[str] | None  # of the CLIP score and PickScore
    exact: str | bool | None  # hash of the pictures to pair with; True: those of the same pipeline
    source: Source | None
    extractor: FeatureExtractor | None
    networks: Mapping[str, str]  # score -> hash of the network
    side: int | None
    device: str
    patch: Mapping[str, Any] | None = None  # of the pipeline as it draws, see `describe_patch`


def protocol_of(setup: Evaluated, pictures: PictureSet, options: Mapping[str, Any]) -> Protocol:
    """The protocol of the pictures' figures, with further options."""
    source, extractor, pipe, draw = setup.source, setup.extractor, setup.pipe, setup.draw
    drawn: dict[str, Any] = {"sampler": "pictures from files", "steps": None, "guidance": None, "seeds": None}
    if pipe is not None:
        seeds = f"{draw.seed}..{draw.seed + draw.num_pictures - 1}"
        scheduler = type(pipe.scheduler).__name__
        drawn = {"sampler": scheduler, "steps": draw.steps, "guidance": draw.guidance, "seeds": seeds}
    return Protocol(
        num_pictures=len(pictures),
        reference=source.name if source else NOTHING,
        reference_hash=source.hash if source else "",
        reference_pictures=source.count if source else None,
        extractor=extractor.name if extractor else NOTHING,
        extractor_hash=extractor.hash if extractor else "",
        resize=extractor.resize if extractor else "",
        dtype=dtype_name(pipe.dtype) if pipe is not None else "float32",
        device=setup.device,
        versions=all_versions(),
        options={**options, **_options(setup), **({} if pipe is None else {"scheduler": _scheduler_of(pipe)})},
        **drawn,
    )


def identity(setup: Evaluated, seed: int) -> dict[str, Any]:
    """Everything that must match for a run to be resumed, as JSON types.

    Args:
        setup: the evaluation.
        seed: of the metrics' draws.
    """
    source, extractor = setup.source, setup.extractor
    found: dict[str, Any] = {"versions": all_versions(), "device": setup.device, "chunk": CHUNK, "seed": seed}
    found |= {"reference": source and source.hash, "extractor": extractor and extractor.hash} | _options(setup)
    if setup.files is not None:
        return found | {"pictures": setup.files.hash}
    pipe = setup.pipe
    denoiser = denoiser_of(pipe)
    return found | {
        "left_out": "blanked and not finite",  # before, such pictures were scored
        "draw": {name: getattr(setup.draw, name) for name in DRAWN},
        "acceleration": setup.patch,
        "num_mediators": getattr(denoiser, "num_mediators", None),
        "pipeline": type(pipe).__name__,
        "weights": {name: weights_hash(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)},
        "scheduler": f"{type(pipe.scheduler).__name__} {_scheduler_of(pipe)}",
        "dtype": dtype_name(pipe.dtype),
    }


def device_label(device: torch.device) -> str:
    """ "cpu", or the kind of an accelerator and its name, since figures may differ from one to another."""
    return device.type if device.type == "cpu" else f"{device.type}: {describe_device(device)['name']}"


def subject_name(setup: Evaluated) -> str:
    """The name of a pipeline with its acceleration."""
    how = _patch_of(setup.pipe) or "unaccelerated"
    return f"{type(setup.pipe).__name__}, {how if setup.acceleration is None else _as_json(setup.acceleration)}"


def describe_patch(pipe: Any) -> dict[str, Any] | None:
    """Everything in a pipeline's patch that pictures depend on, as JSON types; None without a patch or a pipeline.

    The options are those in effect, defaults included: the same options match whether they come from a preset, from a
    recipe or one by one. The thresholds decide which layers then run.
    """
    found = patch_of(pipe)
    if found is None:
        return None
    plan = found.plan
    of_layers = {plan.method: plan.methods} if plan.by_layer is None else plan.by_layer.methods
    methods: Any = {name: [m and asdict(cast(Any, m)) for m in phases] for name, phases in of_layers.items()}
    schedule: Any = plan.schedule
    described = schedule.to_dict() if hasattr(schedule, "to_dict") else _public(schedule)
    layers = [layer.name for layer in found.report().layers if layer.left_alone is None]
    thresholds = load_thresholds()
    return json.loads(_as_json({"methods": methods, "schedule": described, "layers": layers, "thresholds": thresholds}))


def all_versions() -> dict[str, str]:
    """Versions of everything that scores depend on."""
    return versions() | {"torchmetrics": version("torchmetrics")}


def _options(setup: Evaluated) -> dict[str, Any]:
    """Everything the figures depend on that is not a field of `Protocol`."""
    found: dict[str, Any] = {}
    if setup.side is not None:
        found["fit"] = f"centre square, bicubic to {setup.side}"
    if setup.pipe is not None:
        found["subjects"] = _digest(json.dumps(subjects(setup.pipe, setup.draw)))
        found |= {f"call.{key}": _value(value) for key, value in setup.draw.call.items()}
    elif setup.prompts is not None:
        found["subjects"] = _digest(json.dumps(list(setup.prompts)))
    found |= {score: digest for score, digest in setup.networks.items() if score != "lpips"}
    if setup.exact:
        found["paired"] = "unaccelerated, same seeds" if setup.exact is True else setup.exact
        found["lpips"] = setup.networks.get("lpips")
    return found


def _patch_of(pipe: Any) -> str | None:
    """A pipeline's patch as text."""
    found = patch_of(pipe)
    return found and f"{found.plan.method} {found.plan.preset or ''} {dict(found.plan.options) or ''}".strip()


def _public(schedule: Any) -> dict[str, Any]:
    """A user-defined schedule, without its state."""
    return {"kind": type(schedule).__name__} | {k: v for k, v in vars(schedule).items() if not k.startswith("_")}


def _scheduler_of(pipe: Any) -> str:
    """A digest of how the scheduler is configured: spacing, Karras sigmas, shift, ..."""
    return _digest(_as_json({key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}))


def _as_json(options: Mapping[str, Any]) -> str:
    return json.dumps(dict(options), sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """A value that JSON cannot represent, without its address in memory."""
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "__name__", str(value))


def _value(value: Any) -> str:
    """Another argument of the pipeline, identified by its content."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"tensor {value.dtype} {list(value.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Image.Image):
        return f"picture {value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_value(value[key])}' for key in sorted(value, key=str))}}}"
    plain = value is None or isinstance(value, str | int | float | torch.dtype)
    return repr(value) if plain else type(value).__qualname__  # no address in memory


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Ranges of the settings of a training run, and which of them may differ between machines or when a run is resumed."""

import math
from collections.abc import Mapping
from typing import Any

AT_LEAST: Mapping[str, float] = {
    "data.size": 1, "data.num_workers": 0,
    "model.patch_size": 1, "model.hidden_size": 1, "model.num_layers": 1, "model.num_heads": 1, "model.norm_eps": 0,
    "objective.bins": 1, "objective.distill_weight": 0,
    "optim.batch": 1, "optim.accumulation": 1, "optim.lr": 0, "optim.weight_decay": 0,
    "optim.warmup": 0, "optim.clip": 0,
    "run.steps": 1, "run.seed": 0, "run.log_every": 1, "run.save_every": 1, "run.keep": 1, "run.sample_every": 0,
    "run.sample_steps": 1, "run.guidance": 1, "run.eval_every": 0, "run.eval_samples": 4, "run.max_bad_steps": 1,
}  # fmt: skip
"""Field -> its minimum. Precision and recall of the evaluation need 4 pictures."""

AT_MOST: Mapping[str, int] = {
    "data.size": 2**14, "data.num_workers": 256, "model.hidden_size": 2**16, "model.num_layers": 1000,
    "objective.bins": 1000, "optim.batch": 2**20, "run.sample_steps": 10**4, "run.eval_samples": 10**7,
}  # fmt: skip
"""Field -> its maximum: beyond any run, but within what would exhaust a machine before the first step. The same on
every machine, since a configuration is also read where it was not written."""

POSITIVE = (
    "model.mlp_ratio",
    "model.position_scale",
    "objective.logit_std",
    "objective.min_snr",
    "optim.eps",
    "run.timeout_minutes",
)
SHARES = ("objective.label_dropout", "optim.ema", "optim.final_lr")
"""Fields from 0 to 1."""

PATH_FIELDS = frozenset(
    {
        "data.source", "data.vae", "data.cache", "data.num_workers", "data.in_memory", "model.start",
        "objective.distill", "run.out",
    }
)  # fmt: skip
"""Fields in which the machines of one run may differ: paths, and how data are read."""

WEIGHTS = ("data.vae", "model.start", "objective.distill")
"""Fields that name weights, which are compared instead of their paths."""

FREE_TO_CHANGE = frozenset(
    {
        "data.source", "data.cache", "data.in_memory", "data.num_workers", "run.out", "run.steps", "run.log_every",
        "run.save_every", "run.keep", "run.sample_every", "run.sample_steps", "run.guidance", "run.eval_every",
        "run.eval_samples", "run.extractor", "run.trackers", "run.max_bad_steps", "run.compile",
        "run.timeout_minutes", "run.gradient_checkpointing", "optim.accumulation", "objective.bins", *WEIGHTS,
    }
)  # fmt: skip
"""Fields in which a resumed run may differ from the run it continues."""


def check_ranges(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` naming the first field out of range, its value and what is allowed.

    Args:
        sections: section -> field -> value, as `TrainConfig.to_dict` gives them; None is in every range.
    """
    fields = {f"{section}.{name}": x for section, values in sections.items() for name, x in values.items()}
    for name, least in AT_LEAST.items():
        _check(fields[name] >= least, name, f"at least {least}", fields[name])
    for name, most in AT_MOST.items():
        _check(fields[name] <= most, name, f"at most {most}", fields[name])
    most = 2**63 - 1 - fields["run.eval_samples"]  # the evaluation draws with the seeds that follow
    _check(fields["run.seed"] <= most, "run.seed", f"at most {most}", fields["run.seed"])
    for name in POSITIVE:
        _check(fields[name] is None or fields[name] > 0, name, "more than 0", fields[name])
    for name in SHARES:
        _check(0 <= fields[name] <= 1, name, "from 0 to 1", fields[name])
    betas = fields["optim.betas"]
    _check(all(0 <= beta < 1 for beta in betas), "optim.betas", "two numbers from 0 to below 1", betas)
    for name, value in fields.items():
        _check(not isinstance(value, float) or math.isfinite(value), name, "finite", value)


def _check(holds: bool, name: str, allowed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")

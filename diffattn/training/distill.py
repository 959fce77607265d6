"""Distillation: mediators and linear attention learn from a softmax teacher, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.models import DiT


def freeze_backbone(model: DiT) -> None:
    """Freeze everything except the weights that a softmax model does not have.

    Raises:
        ValueError: there are no such weights.
    """
    own = own_parameters(model)
    if not own:
        raise ValueError(
            "model.freeze_backbone: this model has no mediator layers or others with weights of their own, "
            "so nothing would be trained"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)


def own_parameters(model: DiT) -> set[str]:
    """Names of the weights that a softmax model does not have."""
    own = set()
    for i, block in enumerate(model.blocks):
        attention: Any = block.attn
        own |= {f"blocks.{i}.attn.{name}" for name in attention.own_names()}
        own |= {f"blocks.{i}.{name}" for name in block.state_dict() if name.startswith("cpe")}
    return own


def check_frozen(model: DiT, new: Sequence[str]) -> None:
    """Raise `ValueError` if weights frozen by `freeze_backbone` did not come from a trained model.

    Args:
        model: before or after `freeze_backbone`.
        new: the parameters not taken from `model.start`.
    """
    own = own_parameters(model)
    untrained = [name for name in new if name not in own]
    if untrained == ["y_embedder.embedding_table.weight"]:
        raise ValueError(
            "model.freeze_backbone: model.start has no null class, and a frozen one would never be trained; "
            "set objective.label_dropout=0"
        )
    if untrained:
        raise ValueError(
            f"model.freeze_backbone: {len(untrained)} parameters of the backbone, such as {untrained[0]}, would keep "
            "their random values; give a trained model as model.start"
        )


class Distillation:
    """Relative output error of each layer that learns another attention, compared with the teacher's softmax layer on
    the same input.

    The teacher's attention layer i gets the student's input, so every layer learns on its own and errors do not
    accumulate: ‖o - o*‖² / ‖o*‖², mean over layers. The cost is one more pass through the teacher's attention layers;
    its MLPs are never run.

    Raises:
        ValueError: the teacher has another number of layers, layers of another width, or attention other than softmax.
    """

    def __init__(self, student: DiT, teacher: DiT) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        ours, theirs = student.config, teacher.config
        for name in ("num_layers", "hidden_size", "num_heads"):
            if ours[name] != theirs[name]:
                raise ValueError(f"objective.distill: the teacher's {name} is {theirs[name]}, the model's {ours[name]}")
        self._pairs: list[tuple[Tensor, Tensor]] = []  # output and target of every layer
        if student.steps != teacher.steps:
            raise ValueError("objective.distill: the teacher's layers must be as wide as the model's: the same steps")
        self._taught = [i for i, b in enumerate(student.blocks) if b.attn.learns]  # type: ignore[union-attr]
        if not self._taught:
            raise ValueError("objective.distill: this model has no mediator layers or others to teach")
        if set(teacher.attention) != {"softmax"}:
            label = teacher.attention_label
            raise ValueError(f"objective.distill: the teacher's attention must be softmax in every layer, got {label}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Compare every call of the student within the block; `loss` then gives the error of the latest call."""
        self._pairs.clear()
        handles = [
            self.student.blocks[i].attn.register_forward_hook(self._hook(self.teacher.blocks[i].attn))  # type: ignore[union-attr,arg-type]
            for i in self._taught
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, teacher: nn.Module) -> Callable[[nn.Module, Sequence[Tensor], Tensor], None]:
        def compare(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            x, grid, _ = inputs
            with torch.no_grad():
                target = teacher(x, grid, 0).float()
            # compared in `loss`: what is computed here would be missing when gradient checkpointing repeats the layer
            self._pairs.append((output, target))

        return compare

    def loss(self) -> Tensor:
        """Mean over layers of the relative squared errors of the latest call."""
        errors = [(o.float() - t).square().mean() / t.square().mean().clamp_min(1e-12) for o, t in self._pairs]
        return torch.stack(errors).mean()

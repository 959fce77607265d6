"""Mediators learn from a softmax teacher, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffattn.models import DiT
from diffattn.models.attention import MediatorAttention

MEDIATOR_PARTS = (".biases.", ".dwc.")
"""What a mediator layer has and a softmax layer has not, in the names of its parameters."""


def freeze_backbone(model: DiT) -> None:
    """Train nothing but the position biases and convolutions of the mediator layers.

    Raises:
        ValueError: there are none.
    """
    if not model.mediators:
        raise ValueError("model.freeze_backbone: this model has no mediator layers, so nothing would be trained")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in MEDIATOR_PARTS))


def check_frozen(new: Sequence[str]) -> None:
    """Raise `ValueError` if weights that `freeze_backbone` does not train did not come from a trained model.

    Args:
        new: the parameters that `model.start` did not decide.
    """
    untrained = [name for name in new if not any(part in name for part in MEDIATOR_PARTS)]
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
    """Relative error of each mediator layer's output against the teacher's softmax on the same input.

    The teacher's attention layer i sees what the student's sees, so every layer learns from its own place and errors
    do not add up: ‖o - o*‖² / ‖o*‖², mean over layers. One more pass through the teacher's attention layers is all it
    costs; its MLPs are never run.

    Raises:
        ValueError: the teacher's layers are fewer or of another width.
    """

    def __init__(self, student: DiT, teacher: DiT) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        ours, theirs = student.config, teacher.config
        for name in ("num_layers", "hidden_size", "num_heads"):
            if ours[name] != theirs[name]:
                raise ValueError(f"objective.distill: the teacher's {name} is {theirs[name]}, the model's {ours[name]}")
        self._errors: list[Tensor] = []
        self._taught = [i for i, b in enumerate(student.blocks) if isinstance(b.attn, MediatorAttention)]
        if not self._taught:
            raise ValueError("objective.distill: this model has no mediator layers to teach")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, every call of the student is compared; `loss` then gives the error of the latest."""
        self._errors.clear()
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
            error = (output.float() - target).square().mean()
            self._errors.append(error / target.square().mean().clamp_min(1e-12))

        return compare

    def loss(self) -> Tensor:
        """Mean over layers of the relative squared errors of the call just watched."""
        return torch.stack(self._errors).mean()

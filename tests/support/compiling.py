"""The ways to compile a denoiser before it is patched."""

from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter


def outer(model: nn.Module, counter: CompileCounter) -> nn.Module:
    return torch.compile(model, backend=counter)  # type: ignore[return-value]


def in_place(model: nn.Module, counter: CompileCounter) -> nn.Module:
    model.compile(backend=counter)
    return model


def regional(model: Any, counter: CompileCounter) -> nn.Module:
    model.compile_repeated_blocks(backend=counter)
    return model


WAYS = [outer, in_place, regional]

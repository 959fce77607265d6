"""Muon beside AdamW: what each updates, and that a run resumes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from diffattn.models import DiT
from diffattn.training.accelerator import make_accelerator
from diffattn.training.config import TrainConfig
from diffattn.training.muon import MuonWithAdamW, as_matrix, is_inner_matrix


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flatten(1)[:, :5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_muon_moves_kernels_and_matrices_and_resumes() -> None:
    model = small_network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonWithAdamW(model, 1e-2)
    losses = descend(model, optimizer, 60)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert losses[-1] < 0.7 * losses[0]
    again = small_network()
    again.load_state_dict(model.state_dict())
    resumed = MuonWithAdamW(again, 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert descend(again, resumed, 3, first=60) == descend(model, optimizer, 3, first=60)


def test_the_update_of_a_kernel_is_nearly_orthogonal() -> None:
    model = small_network()
    kernel: Any = model[0].weight  # type: ignore[index]
    before = kernel.detach().clone()
    descend(model, MuonWithAdamW(model, 1e-2, weight_decay=0), 1)
    change = as_matrix((kernel.detach() - before), like=kernel)
    singular = torch.linalg.svdvals(change)
    assert change.shape == (3, 18)
    assert singular.max() < 2 * singular.min()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_matrix_shares_the_memory_of_its_kernel(layout: torch.memory_format) -> None:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=layout)
    assert as_matrix(kernel, like=kernel).data_ptr() == kernel.data_ptr()


def test_muon_has_the_inner_matrices_of_a_dit() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_classes": 3,
        "in_channels": 4,
        "sample_size": 8,
    }
    model = DiT(**sizes, attention="mediator", mediators=(4,))
    inner = {name for name, parameter in model.named_parameters() if is_inner_matrix(name, parameter)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert inner == {f"blocks.0.{layer}.weight" for layer in layers}


def test_a_model_without_inner_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trained weight matrix"):
        MuonWithAdamW(nn.LayerNorm(3), 1e-2)


def test_a_sharded_model_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"optim\.name=muon needs whole weight matrices"):
        make_accelerator(TrainConfig.read(settings=["optim.name=muon", "run.precision=fp32"]), "cpu")

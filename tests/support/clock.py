"""A clock for decisions about what is faster, so that tests do not depend on the real one."""

from collections.abc import Callable

import pytest
import torch

from diffattn.architectures import decisions


class Clock:
    """Says how long calls take: those by the method, and exact ones."""

    def __init__(self) -> None:
        self.method, self.exact = 1.0, 2.0
        self.calls = 0

    def __call__(self, call: Callable[[], torch.Tensor], device: torch.device) -> float:
        assert call().isfinite().all()
        self.calls += 1
        return self.exact if self.calls % 2 else self.method


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(decisions, "_clock", found)
    return found

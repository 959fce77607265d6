"""The fixtures of the linear family: whole layers of the published implementations, forward and gradient."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.reference import FOLDER, Case


class FamilyCase(Case):
    """One fixture; its tensors are also named `mid.`, `probe.` and `grad.`."""

    @property
    def grid(self) -> tuple[int, int]:
        h, w = self.params["grid"]
        return h, w

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Those whose names start so, without it and without `w.`."""
        start = f"w.{prefix}"
        return {name.removeprefix(start): x for name, x in self.tensors.items() if name.startswith(start)}

    def assert_matches(self, x: Tensor, y: Tensor) -> None:
        """The output, and the gradient that it gives the input `x`."""
        self.assert_close(y, "out.y")
        (grad,) = torch.autograd.grad((y * self["probe.w"]).sum(), x)
        torch.testing.assert_close(grad, self["grad.x"], atol=1e-4, rtol=1e-3)

    def input(self) -> Tensor:
        return self["in.x"].clone().requires_grad_()


def family_cases(*prefixes: str, without: str = "none") -> pytest.MarkDecorator:
    """Parametrises a test's `case` over the fixtures whose names start so, but for one."""
    index = json.loads((FOLDER / "linear-family.json").read_text())
    bound = {name: index["conventions"]["tolerance"]["fp32"][name] for name in ("atol", "rtol")}
    found = [
        FamilyCase(entry["name"], entry, load_file(FOLDER / entry["file"]), bound)
        for entry in index["cases"]
        if entry["name"].startswith(prefixes) and entry["name"] != without
    ]
    assert found, prefixes
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)

"""The subjects of the mediator benchmark: a block or a whole DiT, with softmax and with mediators on the same weights.

Shapes: B batch, N = side² tokens, C hidden channels, n mediators.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffattn.measure.flops import count_gflops
from diffattn.models import DiT
from diffattn.models.attention_layer import AttentionOptions
from diffattn.models.config import SIZES
from diffattn.models.layers import NORM_EPS, DiTBlock, position_embedding

BLOCK, MODEL = "block", "model"
WHAT = (BLOCK, MODEL)
SOFTMAX = "softmax"
PATCH, CHANNELS, CLASSES = 2, 4, 1000

WIDTHS = {**SIZES, "tiny": {"hidden_size": 32, "num_layers": 2, "num_heads": 2}}
"""Width, depth and heads by name: the published sizes, and one for tests."""


@dataclass(frozen=True)
class Subject:
    """One block or model with softmax, one with mediators, and inputs for both.

    The weights are random but reproducible, and shared by the two: only one set of weights, and one of gradients, is
    ever in memory.

    Attributes:
        what: "block" or "model".
        width: a name in `WIDTHS`.
        tokens: N, the square of the grid's side.
        mediators: every n.
        batch: B.
        device, dtype: of weights and inputs. On the meta device nothing is computed.
        num_layers: of a model; None: the published depth of the width.
    """

    what: str
    width: str
    tokens: int
    mediators: tuple[int, ...]
    batch: int
    device: torch.device
    dtype: torch.dtype
    num_layers: int | None = None

    @property
    def depth(self) -> int:
        """Layers of a model, 1 of a block."""
        return 1 if self.what == BLOCK else self.num_layers or WIDTHS[self.width]["num_layers"]

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants; softmax first."""
        return (SOFTMAX, *map(str, self.mediators))

    @property
    def side(self) -> int:
        return round(self.tokens**0.5)

    @cached_property
    def mediating(self) -> nn.Module:
        """The module with mediators."""
        module = self._empty("mediator")
        module.to_empty(device=self.device)
        generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():  # no zeros, so that no gate is closed
                parameter.normal_(std=0.02, generator=generator)
            for name, buffer in module.named_buffers():
                assert name == "pos_embed", name
                buffer.copy_(position_embedding((self.side, self.side), buffer.shape[-1]))
        return module

    @cached_property
    def exact(self) -> nn.Module:
        """The module with softmax attention, sharing the weights of the other."""
        module, weights = self._empty("softmax"), dict(self.mediating.named_parameters())
        module.load_state_dict({name: weights[name] for name, _ in module.named_parameters()}, assign=True)
        if isinstance(module, DiT):
            module.pos_embed = self.mediating.get_buffer("pos_embed")
        return module

    def _empty(self, attention: str) -> nn.Module:
        """The subject on the meta device."""
        size, grid = WIDTHS[self.width], (self.side, self.side)
        with torch.device("meta"):
            if self.what == MODEL:
                own: dict[str, Any] = {**size, "num_layers": self.depth, "sample_size": self.side * PATCH}
                own |= {"patch_size": PATCH, "in_channels": CHANNELS, "num_classes": CLASSES}
                module = DiT(**own, attention=attention, mediators=self.mediators)
            else:
                options = AttentionOptions(size["num_heads"], grid, mediators=self.mediators)
                module = DiTBlock(size["hidden_size"], 4 * size["hidden_size"], attention, options, NORM_EPS)
        return nn.Module.to(module, self.dtype).eval()

    def step(self, variant: str, training: bool) -> Callable[[], None]:
        """One forward pass or, for training, the gradients of all weights (of a block: of its inputs too).

        The loss is the mean square of the output. There is no optimizer: its time does not depend on attention.
        """
        mediating = variant != SOFTMAX
        module = self.mediating if mediating else self.exact
        forward, inputs = self._forward(module, int(variant) if mediating else 0, training)
        leaves = [*self.mediating.parameters(), *inputs]

        def step() -> None:
            with torch.set_grad_enabled(training):
                out = forward()
                if training:
                    out.square().mean().backward()
            for leaf in leaves:
                leaf.grad = None

        return step

    def _forward(self, module: nn.Module, n: int, training: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """A forward pass, and the inputs that get gradients."""
        if isinstance(module, DiT):
            pixels = self.side * PATCH
            x, t = self._random(self.batch, CHANNELS, pixels, pixels), torch.full((self.batch,), 0.5).to(self.device)
            y = (torch.arange(self.batch) % CLASSES).to(self.device)

            def forward() -> Tensor:
                if n:
                    module.set_num_mediators(n)
                return module(x, t, y).sample

            return forward, []
        dim = WIDTHS[self.width]["hidden_size"]
        x, condition = self._random(self.batch, self.tokens, dim), self._random(self.batch, dim)
        inputs = [x.requires_grad_(training), condition.requires_grad_(training)]
        return lambda: module(x, condition, (self.side, self.side), n), inputs

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(self.device, self.dtype)


def memory_needed(subject: Subject, training: bool) -> float:
    """Approximate bytes of a step with the most mediators: weights, gradients, and what is kept for backward."""
    return _over_depth([_held(twin, training) for twin in _on_meta(subject)], subject.depth)


def gflops(subject: Subject, training: bool) -> dict[str, float]:
    """Variant -> counted GFLOPs of a step."""
    twins = _on_meta(subject)
    return {
        name: _over_depth([count_gflops(twin.step(name, training)) for twin in twins], subject.depth)
        for name in subject.variants
    }


def _on_meta(subject: Subject) -> list[Subject]:
    """A block; or models of one and of two layers, which suffice for any depth since all layers are the same."""
    twin = replace(subject, device=torch.device("meta"))
    return [twin] if subject.what == BLOCK else [replace(twin, num_layers=layers) for layers in (1, 2)]


def _over_depth(figures: Sequence[float], depth: int) -> float:
    """The figure of a whole subject from those of its `_on_meta`."""
    return figures[0] + (depth - 1) * (figures[-1] - figures[0])


def _held(subject: Subject, training: bool) -> int:
    """Bytes of weights and, in training, of gradients and of what is kept for backward."""
    weights = {p.untyped_storage()._cdata: p.untyped_storage() for p in subject.mediating.parameters()}
    weight_bytes = sum(storage.nbytes() for storage in weights.values())
    if not training:
        return weight_bytes
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        subject.step(subject.variants[-1], training)()
    return 2 * weight_bytes + sum(storage.nbytes() for storage in kept.values())

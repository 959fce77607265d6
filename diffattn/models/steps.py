"""Progressive width (StepsNet): early blocks are narrow, and each step adds channels held back until then.

    x = [x₁ … x_n],  C_i = d_1 + … + d_i
    y₁ = F₁(x₁),  y_i = F_i([y_{i-1}, x_i])        F_i: blocks of width C_i

Patch embedding, conditioning and final layer keep the full width C. For a narrower step the conditioning is projected
to its width. A single step is the plain backbone.

Shapes: B batch, N tokens, C channels, C_i channels of a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """Consecutive blocks of one width."""

    width: int  # C_i
    blocks: range
    num_heads: int  # as wide as those of the full width


def steps_of(
    steps: Sequence[Sequence[int]] | None, hidden_size: int, num_layers: int, num_heads: int
) -> tuple[Step, ...]:
    """The steps of a model, from [[width, depth], …].

    Raises:
        ValueError: not such pairs; widths that do not rise to the full one, or do not divide into its heads; depths
            that do not add up to the number of layers.
    """
    if steps is None:
        return (Step(hidden_size, range(num_layers), num_heads),)
    given = [list(step) if isinstance(step, Sequence) and not isinstance(step, str) else step for step in steps]
    if not given or not all(isinstance(s, list) and len(s) == 2 and all(type(x) is int for x in s) for s in given):
        raise ValueError(f"steps must be pairs of a width and a depth, such as [[64, 2], [128, 4]], got {given!r}")
    widths, depths = [width for width, _ in given], [depth for _, depth in given]
    head_dim = hidden_size // num_heads
    rising = all(a < b for a, b in pairwise(widths)) and widths[-1] == hidden_size
    if not rising or any(width < 1 or width % head_dim or width % 4 for width in widths):
        raise ValueError(
            f"the widths of steps must rise to hidden_size={hidden_size}, each a multiple of {head_dim} channels per "
            f"head and of 4, got {widths}"
        )
    if min(depths) < 1 or sum(depths) != num_layers:
        raise ValueError(f"the depths of steps must be at least 1 and add up to num_layers={num_layers}, got {depths}")
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return tuple(
        Step(width, range(end - depth, end), width // head_dim)
        for width, depth, end in zip(widths, depths, ends, strict=True)
    )


def projections(steps: Sequence[Step], hidden_size: int) -> nn.ModuleDict:
    """Projections of the conditioning to the width of each narrow step, by the number of the step.

    Not a `ModuleList`: block caches (cache-dit) mistake every list of modules for a list of blocks.
    """
    narrow = {str(i): step.width for i, step in enumerate(steps) if step.width < hidden_size}
    return nn.ModuleDict({number: nn.Linear(hidden_size, width) for number, width in narrow.items()})


def run_steps(
    steps: Sequence[Step],
    blocks: Sequence[nn.Module],
    conditions: nn.ModuleDict,
    run_block: Callable[[nn.Module, Tensor, Tensor], Tensor],
    x: Tensor,
    condition: Tensor,
) -> Tensor:
    """All blocks, step by step.

    Args:
        steps: of the model.
        blocks: of the model, or the replacement installed by a block cache.
        conditions: from `projections`.
        run_block: (block, tokens [B, N, C_i], condition [B, C_i]) -> tokens.
        x: tokens [B, N, C].
        condition: [B, C].

    Returns:
        [B, N, C].
    """
    for i, step in enumerate(steps):
        narrow = step.width < x.shape[-1]
        own = conditions[str(i)](condition) if narrow else condition
        y = x[..., : step.width] if narrow else x
        for block in blocks[step.blocks.start : step.blocks.stop]:
            y = run_block(block, y, own)
        x = torch.cat((y, x[..., step.width :]), dim=-1) if narrow else y
    return x

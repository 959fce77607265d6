"""Argument checks that raise one-sentence errors with the value and what is allowed.

Shapes: B batch, N query tokens, M key tokens, C channels.
"""

from math import prod

from torch import Tensor


def check_grid(grid: tuple[int, ...], tokens: int) -> None:
    """Raise `ValueError` unless rows times columns of the grid, times frames if there are any, equal the number of
    tokens."""
    if min(grid) < 1:
        raise ValueError(f"a grid must have at least one row and one column, got {'x'.join(map(str, grid))}")
    if prod(grid) != tokens:
        text = "x".join(map(str, grid))
        raise ValueError(f"a grid of {text} has {prod(grid)} tokens, the tensor has {tokens}")


def check_heads(channels: int, num_heads: int) -> None:
    """Raise `ValueError` unless `num_heads` divides the channels."""
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")


def check_same_shape(dims: str, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors have one shape with as many dimensions as `dims` ("B, N, C") names."""
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    if len({tuple(x) for x in shapes.values()}) > 1 or any(len(x) != dims.count(",") + 1 for x in shapes.values()):
        raise ValueError(f"{', '.join(shapes)} must all be [{dims}], got {_listed(shapes)}")


def check_keys(dims: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` unless keys and values have one shape, which differs from the queries' only in dimension -2.

    Args:
        dims: of the queries, such as "B, N, C".
        q, k, v: queries, keys and values; there must be at least one key.
    """
    apart = [*k.shape[:-2], *k.shape[-1:]] != [*q.shape[:-2], *q.shape[-1:]]
    if q.ndim != dims.count(",") + 1 or k.shape != v.shape or k.ndim != q.ndim or apart or not k.shape[-2]:
        given = _listed({name: list(x.shape) for name, x in zip("qkv", (q, k, v), strict=True)})
        raise ValueError(f"q must be [{dims}], k and v [{dims.replace('N', 'M')}] with M of at least 1, got {given}")


def _listed(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())

"""The published sizes, and the checks of a configuration.

Shapes: N = h·w tokens on a grid (h, w), n mediators.
"""

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from diffattn.functional import mediator_side
from diffattn.models.attention import ATTENTION

SIZES = {
    "S": {"hidden_size": 384, "num_layers": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "num_layers": 28, "num_heads": 16},
}
PRESETS: Mapping[str, dict[str, Any]] = {
    f"{name}/{patch}": {**size, "patch_size": patch} for name, size in SIZES.items() for patch in (2, 4, 8)
}
"""The published sizes, "S/2" to "XL/8": `DiT(**PRESETS["S/2"])`."""


PATHS = ("linear", "gvp")
"""The interpolants between noise and data that a velocity model is trained on; `diffattn.sampling.paths` has them."""


def check_one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """Raise `ValueError` naming the option, its value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def check_widths(**sizes: int) -> None:
    """Raises `ValueError` naming a size below 1, or a hidden size that does not divide into heads or the embedding.

    Args:
        **sizes: of a model by name, `hidden_size` and `num_heads` among them.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size must be a multiple of num_heads={num_heads} and of 4, got {hidden_size}")


def token_grid(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens in an image of this height and width; `ValueError` if it does not divide."""
    h, w = (size, size) if isinstance(size, int) else size
    if h % patch_size or w % patch_size or min(h, w) < patch_size:
        raise ValueError(f"height and width must be multiples of the patch size {patch_size}, got {h}x{w}")
    return h // patch_size, w // patch_size


def attention_per_layer(attention: str | Sequence[str], num_layers: int) -> tuple[str, ...]:
    """One name for each layer; `ValueError` for another number of names, or one that `ATTENTION` does not have."""
    names = (attention,) * num_layers if isinstance(attention, str) else tuple(attention)
    for name in names:
        check_one_of("attention", name, tuple(ATTENTION))
    if len(names) != num_layers:
        raise ValueError(f"attention must be one name or one for each of {num_layers} layers, got {len(names)}")
    return names


def options_by_attention(
    options: Mapping[str, Mapping[str, Any]] | None, attention: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Options of single kinds of attention: named arguments of their layers.

    Raises:
        ValueError: an attention that no layer has, or an option that it does not have. Layers check the values.
    """
    checked = {}
    for name, given in (options or {}).items():
        check_one_of("attention_options: a layer's attention", name, tuple(dict.fromkeys(attention)))
        parameters = signature(ATTENTION[name].__init__).parameters.values()
        allowed = tuple(x.name for x in parameters if x.kind is Parameter.KEYWORD_ONLY)
        if not isinstance(given, Mapping):
            raise ValueError(f"attention_options: {name} must have options by name, got {given!r}")
        if unknown := sorted(set(given) - set(allowed)):
            has = ", ".join(allowed) or "none"
            raise ValueError(f"attention_options: {name} has no option {', '.join(unknown)}; allowed: {has}")
        checked[name] = dict(given)
    return checked


def mediator_set(numbers: Sequence[int], grid: tuple[int, int]) -> tuple[int, ...]:
    """The numbers n with biases of their own, ascending; `ValueError` for none, no square, or more than the grid."""
    if not numbers:
        raise ValueError("mediators must name at least one number, such as (4, 16, 64)")
    return tuple(sorted({mediator_side(n, grid) ** 2 for n in numbers}))


def check_num_mediators(num_mediators: int, mediators: Sequence[int]) -> None:
    """Raises `ValueError` if a model with position biases for these numbers of mediators cannot run with n."""
    if not mediators:
        raise ValueError(f"num_mediators={num_mediators}: this model has no mediator layers, see `attention`")
    mediator_side(num_mediators)
    smallest, largest = min(mediators), max(mediators)
    if not smallest <= num_mediators <= largest:
        raise ValueError(
            f"num_mediators must be a perfect square from {smallest} to {largest}, got {num_mediators}; "
            f"this model has position biases for {', '.join(map(str, mediators))}"
        )

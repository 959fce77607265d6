"""What the methods for softmax attention share: from how many tokens on they are used, and at which levels."""

from typing import ClassVar

from diffattn.methods.base import AttentionMethod, LayerSpec
from diffattn.methods.options import check, is_int
from diffattn.methods.thresholds import below_smallest


class LimitedMethod(AttentionMethod):
    """Base of the methods with the options `min_tokens` and `max_level`, which each of them declares as fields."""

    min_tokens: int | None
    max_level: int | None

    timed: ClassVar[bool] = True
    least_tokens: ClassVar[int] = 1024
    """Tokens from which the method is presumably faster, unless `min_tokens` is given."""

    def check_limits(self) -> None:
        """Raise `ValueError` unless `min_tokens` and `max_level` are None or whole numbers of at least 0."""
        for name, value in (("min_tokens", self.min_tokens), ("max_level", self.max_level)):
            check(value is None or is_int(value, 0), name, value, "a whole number, 0 or more, or None")

    def supports(self, layer: LayerSpec) -> bool:
        return not layer.is_cross_attention and (self.max_level is None or layer.level <= self.max_level)

    def reason_call(self, layer: LayerSpec, num_tokens: int, device: str, mask_rows: int) -> str | None:
        return "masked: the mask differs between queries" if mask_rows > 1 else None

    def reason_slower(self, num_tokens: int, device: str) -> str | None:
        smallest = self.least_tokens if self.min_tokens is None else self.min_tokens
        return below_smallest(smallest, num_tokens)

"""Results that are kept while the weights they come from stay the same."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from diffattn.models import DiT
from diffattn.models.kept import MOST_BYTES, MOST_RESULTS, Kept


class Counted:
    """Doubles a weight, and counts how often."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self) -> tuple[Tensor, ...]:
        self.calls += 1
        return (2 * self.weight,)


def test_a_result_is_computed_once_until_a_weight_changes_in_whatever_way() -> None:
    kept, weight = Kept(), torch.nn.Parameter(torch.ones(3))
    compute = Counted(weight)
    with torch.no_grad():
        found = [kept.get("a", [weight], compute)[0].tolist() for _ in range(3)]
        assert (compute.calls, found) == (1, [[2.0] * 3] * 3)
        weight.data.copy_(torch.full((3,), 5.0))  # which torch does not count as a new version
        assert kept.get("a", [weight], compute)[0].tolist() == [10.0] * 3
        weight.data = torch.full((3,), 6.0)
        assert kept.get("a", [weight], compute)[0].tolist() == [12.0] * 3
        kept.get("b", [weight], compute)
    assert compute.calls == 4


def test_nothing_is_kept_where_a_gradient_is_needed_or_the_result_is_large() -> None:
    kept, weight = Kept(), torch.nn.Parameter(torch.ones(3))
    compute = Counted(weight)
    assert all(kept.get("a", [weight], compute)[0].requires_grad for _ in range(2))
    assert compute.calls == 2
    large = Counted(torch.ones(MOST_BYTES // 4 + 1))
    for _ in range(2):
        kept.get("a", [large.weight], large)
    assert large.calls == 2


def test_few_results_are_kept_and_none_in_copies() -> None:
    kept, compute = Kept(), Counted(torch.ones(1))
    for key in range(MOST_RESULTS + 1):
        kept.get(key, [compute.weight], compute)
    kept.get(0, [compute.weight], compute)
    assert compute.calls == MOST_RESULTS + 2
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        other.get(0, [compute.weight], compute)
    assert compute.calls == MOST_RESULTS + 4


@pytest.mark.parametrize("n", [4, 9, 16])
def test_mediators_draw_the_same_with_kept_biases_and_follow_new_weights(n: int) -> None:
    torch.manual_seed(0)
    model = DiT(hidden_size=32, num_layers=2, num_heads=2, num_classes=3, in_channels=4, sample_size=16,
                attention="mediator", mediators=(4, 16)).eval()  # fmt: skip
    for weight in model.parameters():  # the gates of a new model are zero
        torch.nn.init.normal_(weight, std=0.2)
    model.set_num_mediators(n)
    x, t, y = torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([1])
    with_gradient = model(x, t, y).sample.detach()
    with torch.no_grad():
        first, again = model(x, t, y).sample, model(x, t, y).sample
        assert torch.equal(first, again)
        torch.testing.assert_close(first, with_gradient)
        for name, weight in model.named_parameters():
            if "biases" in name:
                weight.data.add_(1 + torch.rand_like(weight))
        changed = model(x, t, y).sample
    assert not torch.equal(changed, first)
    torch.testing.assert_close(changed, model(x, t, y).sample.detach())

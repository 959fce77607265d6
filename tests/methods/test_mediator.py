"""Options of mediator attention: numbers, names of numbers, and what they mean for a model."""

from typing import Any

import pytest
import torch

import diffattn
from diffattn import LayerSpec
from diffattn.methods.base import LayerCall
from diffattn.methods.mediator import MediatorAttention


def layer(*learned: int) -> LayerSpec:
    return LayerSpec("blocks.0.attn", level=0, num_heads=3, head_dim=8, kind="mediator", mediators=learned)


SOFTMAX = LayerSpec("blocks.1.attn", level=0, num_heads=3, head_dim=8)


@pytest.mark.parametrize(
    ("learned", "expected"),
    [((4, 16, 64), (4, 16, 64)), ((4, 64), (4, 64, 64)), ((16,), (16, 16, 16)), ((1, 4, 9, 16, 25), (1, 9, 25))],
)
def test_names_stand_for_numbers_that_the_model_learned(learned: tuple[int, ...], expected: tuple[int, ...]) -> None:
    methods = [MediatorAttention(name).fit([SOFTMAX, layer(*learned)]) for name in ("min", "mid", "max")]
    assert tuple(m.num_mediators for m in methods) == expected


def test_numbers_stay_as_they_are() -> None:
    assert MediatorAttention(25).fit([layer(4, 16, 64)]) == MediatorAttention(25)
    assert MediatorAttention().fit([layer(4, 16, 64)]) == MediatorAttention()
    assert MediatorAttention("max").fit([SOFTMAX]) == MediatorAttention("max")


def test_layers_that_learned_other_numbers_keep_the_name() -> None:
    method = MediatorAttention("max").fit([layer(4, 16), layer(4, 64)])
    assert method.num_mediators == "max"
    assert [run(method, x) for x in (layer(4, 16), layer(4, 64))] == [16, 64]


def run(method: MediatorAttention, spec: LayerSpec) -> int:
    """The number of mediators that the layer is asked for."""
    asked = []
    x = torch.zeros(1, 3, 64, 8)

    def mediate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_mediators: int) -> torch.Tensor:
        asked.append(num_mediators)
        return v

    method.build(spec)(x, x, x, LayerCall(x=x, grid=(8, 8), mediate=mediate))
    return asked[0]


@pytest.mark.parametrize("n", [1, 100, 144])
def test_a_number_out_of_range_is_refused_with_what_is_allowed(n: int) -> None:
    message = f"num_mediators must be a perfect square from 4 to 64, got {n}; the model learned 4, 16, 64"
    with pytest.raises(ValueError, match=message):
        MediatorAttention(n).fit([layer(4, 16, 64)])


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (5, "num_mediators must be a perfect square, got 5; the nearest are 4 and 9"),
        (0, "num_mediators must be a perfect square .*got 0"),
        (-4, "num_mediators must be a perfect square .*got -4"),
        (4.0, "num_mediators must be a perfect square .*got 4.0"),
        (True, "num_mediators must be a perfect square .*got True"),
        ("most", "num_mediators must be a perfect square, or one of min, mid, max, got 'most'"),
    ],
)
def test_what_is_no_number_of_mediators_is_refused(n: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediatorAttention(n)


def test_only_layers_with_mediators_are_covered() -> None:
    method = MediatorAttention(4)
    assert method.reason_layer(layer(4, 16)) is None
    assert method.reason_layer(SOFTMAX) == "softmax attention, which method 'mediator' does not replace"
    agents = diffattn.METHODS["agent"].from_options({})
    assert agents.reason_layer(SOFTMAX) is None
    assert agents.reason_layer(layer(4, 16)) == "mediator attention, which method 'agent' does not replace"


def test_without_a_number_the_layer_runs_as_the_model_is_set() -> None:
    reason = MediatorAttention().reason_call(layer(4, 16), 64, "cpu", 0)
    assert reason == "num_mediators is not given: the model's own setting runs"
    assert MediatorAttention(4).reason_call(layer(4, 16), 64, "cpu", 0) is None


@pytest.mark.parametrize("preset", MediatorAttention.presets.values(), ids=MediatorAttention.presets)
def test_presets_fit_every_model_and_grow_as_the_noise_falls(preset: Any) -> None:
    phases = diffattn.NoiseSchedule(preset.schedule).phases
    for learned in ((4, 16, 64), (16,), (1, 256)):
        methods = [MediatorAttention(**(options or {})).fit([layer(*learned)]) for options in phases]
        numbers: list[Any] = [m.num_mediators for m in methods]
        assert set(numbers) <= set(learned)
        assert numbers == sorted(numbers)

"""Locating weights in a checkpoint: every prefix that programs add, in any order and nesting."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_dit import tiny_dit
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diffattn.models import DiT
from diffattn.models.convert_names import find_weights

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def ours() -> Weights:
    return tiny_dit(mediators=[4]).to_official()


@pytest.fixture(scope="module")
def other(ours: Weights) -> Weights:
    return {name: weight + 1 for name, weight in ours.items()}


def put(weights: Weights, *prefixes: str) -> Weights:
    return {"".join(prefixes) + name: weight for name, weight in weights.items()}


def same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


PREFIXES = [
    ("module.",), ("_orig_mod.",), ("module.", "_orig_mod."), ("_orig_mod.", "module."), ("model.",), ("denoiser.",),
    ("net.",), ("model.", "module."), ("module.", "model.", "_orig_mod."), ("model.diffusion_model.",),
    ("_forward_module.", "model.", "net."), ("ema_model.",), ("ema.", "module."), ("network.transformer.",),
]  # fmt: skip


@pytest.mark.parametrize("prefixes", PREFIXES, ids="".join)
def test_what_precedes_all_names_is_removed(prefixes: tuple[str, ...], ours: Weights) -> None:
    same(find_weights(put(ours, *prefixes), None, "x"), ours)


def test_wrappers_of_single_blocks_are_removed(ours: Weights) -> None:
    wrapped = {name.replace("blocks.1.", "blocks.1._orig_mod."): weight for name, weight in ours.items()}
    wrapped = {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): x for name, x in wrapped.items()}
    same(find_weights(put(wrapped, "module."), None, "x"), ours)


Content = Callable[[Weights, Weights], Any]
NESTED: dict[str, Content] = {
    "averages first": lambda ours, other: {"model": other, "ema": ours, "opt": {"state": {0: {"step": torch.ones(1)}}}},
    "averages under another name": lambda ours, other: {"state_dict": other, "model_ema": ours},
    "averages with a prefix": lambda ours, other: {"model": put(other, "module."), "ema": put(ours, "module.")},
    "model before state_dict": lambda ours, other: {"state_dict": other, "model": ours},
    "Lightning": lambda ours, other: {"state_dict": put(ours, "model."), "hyper_parameters": {"lr": 1e-4}},
    "Lightning, averages beside": lambda ours, other: {
        "state_dict": put(other, "model.") | put(ours, "ema_model.") | {"ema_model.decay": torch.tensor(0.9)}
    },
    "ema_pytorch": lambda ours, other: put(other, "online_model.") | put(ours, "ema_model.")
    | {"initted": torch.tensor(True), "step": torch.tensor(7)},
    "two levels": lambda ours, other: {"checkpoint": {"model": {"state_dict": put(ours, "net.")}}, "epoch": 3},
    "another name": lambda ours, other: {"weights_of_the_best_epoch": ours, "epoch": 3},
    "plain values among the weights": lambda ours, other: {**ours, "epoch": 3, "name": "best"},
    "an optimizer with names": lambda ours, other: {"model": ours, "opt": {"state": put(other, "exp_avg.")}},
    "list of averages": lambda ours, other: {"model": other, "ema": {"shadow_params": [*ours.values()], "decay": 0.9}},
    "list without the fixed embedding": lambda ours, other: {
        "model": put(other | {"pos_embed": ours["pos_embed"]}, "module."),
        "ema": [weight for name, weight in ours.items() if name != "pos_embed"],
    },
    "raw weights collected beside the averages": lambda ours, other: {
        "model": other, "ema": {"shadow_params": [*ours.values()], "collected_params": [*other.values()]}
    },
    "parameters, ordered": lambda ours, other: OrderedDict((k, nn.Parameter(x)) for k, x in ours.items()),
}  # fmt: skip


@pytest.mark.parametrize("case", NESTED)
def test_where_the_weights_lie_is_found(case: str, ours: Weights, other: Weights) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(find_weights(NESTED[case](ours, other), None, "x"), ours)


def test_torchs_own_average(ours: Weights) -> None:
    model = DiT.from_official(ours, num_heads=3)
    averaged = AveragedModel(model).state_dict()
    found = find_weights(averaged | {"module.pos_embed": ours["pos_embed"]}, None, "x")
    assert {"n_averaged"}.isdisjoint(found)
    assert all(torch.equal(found[name], ours[name]) for name in ours if "bias" not in name.split("_")[-1])


@pytest.mark.parametrize("key", ["model", "state_dict.model", "state_dict", "state_dict.model.module"])
def test_a_key_names_table_or_prefix(key: str, ours: Weights, other: Weights) -> None:
    content = {"ema": other, "model": ours} if key == "model" else {"ema": other, "state_dict": put(ours, "model.")}
    same(find_weights(content, key, "x"), ours)


def test_a_key_names_one_of_several_in_one_table(ours: Weights, other: Weights) -> None:
    content = put(ours, "student.") | put(other, "teacher.")
    with pytest.raises(ValueError, match=r"'x' contains several models \(student, teacher\); name one with its key"):
        find_weights(content, None, "x")
    same(find_weights(content, "student", "x"), ours)


def test_a_key_names_a_list(ours: Weights, other: Weights) -> None:
    content = {"model": other, "ema": {"shadow_params": [*ours.values()]}}
    same(find_weights(content, "ema", "x"), ours)
    same(find_weights(content, "model", "x"), other)


def test_an_unknown_key_is_refused_with_those_there_are(ours: Weights) -> None:
    with pytest.raises(ValueError, match=r"'x' has no weights under 'best'; there are: state_dict, state_dict.model"):
        find_weights({"state_dict": put(ours, "model.")}, "best", "x")


def test_what_lies_beside_the_model_is_left_out_and_named(ours: Weights) -> None:
    vision = {name: x for name, x in put(ours, "encoder.").items() if "embedder" not in name and "ada" not in name}
    vision = {name: x for name, x in vision.items() if "final" not in name}  # as a vision transformer calls its own
    content = {"state_dict": put(ours, "model.") | vision | {"loss.logvar": torch.zeros(3)}}
    with pytest.warns(UserWarning, match=r"'x' contains more than the model; left out: encoder \(\d+\), loss \(1\)$"):
        same(find_weights(content, None, "x"), ours)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_extra_heads_of_the_model_are_named_as_such(prefix: str, ours: Weights) -> None:
    heads = {"projectors.0.0.weight": torch.zeros(8, 24), "projectors.0.2.bias": torch.zeros(8)}
    found = find_weights({"ema": put(ours | heads, prefix)}, None, "x")
    message = "all weights of the model, and others that it does not use: projectors.0.0.weight, projectors.0.2.bias"
    with pytest.raises(ValueError, match=message):
        DiT.from_official(found, num_heads=3)


def test_averages_that_fit_no_names_are_refused(ours: Weights) -> None:
    content = {"model": ours, "ema": {"shadow_params": [*ours.values()][1:]}}
    with pytest.raises(ValueError, match=r"averaged weights without names \(ema.shadow_params\).*other weights: model"):
        find_weights(content, None, "x")


def test_two_models_under_one_name_are_refused(ours: Weights) -> None:
    with pytest.raises(ValueError, match=r"'x' has 'pos_embed' twice"):
        find_weights({"pos_embed": ours["pos_embed"], "module.pos_embed": ours["pos_embed"]}, None, "x")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"a": {"b": [1]}}])
def test_no_weights_at_all(content: Any) -> None:
    with pytest.raises(ValueError, match="'x' contains no weights by name"):
        find_weights(content, None, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, dtype: torch.dtype, ours: Weights) -> None:
    broken = {name: weight.clone().to(dtype) for name, weight in ours.items()}
    broken["blocks.1.mlp.fc2.weight"][3, 5:7] = value
    with pytest.raises(ValueError, match=r"NaN or infinite: blocks.1.mlp.fc2.weight \(2 of 2304 values\)"):
        DiT.from_official(broken, num_heads=3)

"""Starting points and distillation: what a model takes over from another one."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference import Case
from support.tiny_dit import dit_cases

from diffattn.models import DiT
from diffattn.training.config import TrainConfig
from diffattn.training.distill import Distillation, check_frozen, freeze_backbone
from diffattn.training.start import load_backbone, make_model, start_from

SMALL: Any = dict(sample_size=8, patch_size=2, in_channels=2, hidden_size=16, num_layers=2, num_heads=2, num_classes=3)


def lively(model: DiT, seed: int = 0) -> DiT:
    """Weights of which none is zero, so that everything shows in the output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def inputs(size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 2, size, size), torch.tensor([0.3, 0.8]), torch.tensor([0, 3])


def test_a_softmax_checkpoint_gives_its_backbone_and_convolutions_begin_at_zero() -> None:
    source = lively(DiT(**SMALL))
    model = DiT(**SMALL, attention="mediator", mediators=(1, 4))
    new = start_from(model, source)
    assert all(".biases." in name or ".dwc." in name for name in new)
    assert len(new) == 2 * (2 * 6 + 2)
    own = model.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in source.state_dict().items())
    assert not own["blocks.0.attn.dwc.weight"].any()


def test_some_layers_with_mediators_only() -> None:
    source = lively(DiT(**SMALL))
    model = DiT(**SMALL, attention=("mediator", "softmax"), mediators=(4,))
    assert {name.split(".")[1] for name in start_from(model, source)} == {"0"}


def test_a_mediator_checkpoint_starts_a_softmax_model() -> None:
    source = lively(DiT(**SMALL, attention="mediator", mediators=(4,)))
    model = DiT(**SMALL)
    assert start_from(model, source) == []
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], source.state_dict()["blocks.1.attn.qkv.weight"])


def test_a_lower_resolution_starts_a_higher_one_with_resized_biases() -> None:
    source = lively(DiT(**SMALL, attention="mediator", mediators=(4,)))
    model = DiT(**{**SMALL, "sample_size": 16}, attention="mediator", mediators=(4,)).eval()
    assert start_from(model, source) == []
    assert torch.allclose(model(*inputs(16)).sample, source(*inputs(16)).sample, atol=1e-5)  # as the source resizes


def test_other_numbers_of_mediators_are_blended_or_taken_from_the_nearest() -> None:
    source = lively(DiT(**SMALL, attention="mediator", mediators=(1, 9)))
    model = DiT(**SMALL, attention="mediator", mediators=(4, 16)).eval()
    start_from(model, source)
    source.set_num_mediators(4)
    model.set_num_mediators(4)
    assert torch.allclose(model(*inputs()).sample, source(*inputs()).sample, atol=1e-5)


@dit_cases("mediator_interp_")
def test_position_biases_of_a_lower_resolution_become_the_published_ones(case: Case) -> None:
    p = case.params
    shape = dict(patch_size=p["patch_size"], hidden_size=p["hidden_size"], num_layers=p["depth"],
                 num_heads=p["num_heads"], attention="mediator", mediators=(p["mediator_num"],))  # fmt: skip
    source = lively(DiT(sample_size=p["grid_in"] * p["patch_size"], **shape))
    model = DiT(sample_size=p["grid_out"] * p["patch_size"], **shape)
    names = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
    weights = source.state_dict()
    for name in names:
        weights[f"blocks.0.attn.biases.{p['mediator_num']}.{name}"].copy_(case[f"in.blocks.0.attn.{name}"])
    start_from(model, source)
    own = model.to_official()
    for name in names:
        case.assert_close(own[f"blocks.0.attn.{name}"], f"out.blocks.0.attn.{name}")
    case.assert_close(own["pos_embed"], "out.pos_embed")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"num_heads": 4}, r"num_heads is 4 there and 2 here; set model\.num_heads=4"),
        ({"frequency_shift": 1.0}, r"frequency_shift is 1\.0 there and 0\.0 here; set model\.frequency_shift=1\.0"),
        ({"norm_eps": 1e-5}, r"norm_eps is 1e-05 there and 1e-06 here; set model\.norm_eps=1e-05"),
        (
            {"prediction": "epsilon", "time_direction": "data_to_noise"},
            r"prediction is 'epsilon' there and 'velocity' here; time_direction is .*; training learns velocities",
        ),
    ],
)
def test_settings_that_weights_do_not_show_must_be_the_same(setting, told, tmp_path) -> None:
    lively(DiT(**SMALL | setting)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        make_model(SMALL, str(tmp_path))


def test_the_setting_that_the_message_names_makes_the_start_work(tmp_path) -> None:
    source = lively(DiT(**SMALL, frequency_shift=1.0, norm_eps=1e-5))
    source.save_pretrained(tmp_path)
    settings = ["model.attention=softmax", "model.frequency_shift=1.0", "model.norm_eps=1e-05"]
    model, _ = make_model(TrainConfig.read(settings=settings).model_arguments() | SMALL, str(tmp_path))
    assert torch.equal(model.eval()(*inputs()).sample, source(*inputs()).sample)


def test_missing_and_unexpected_weights_of_a_start_are_named(tmp_path) -> None:
    lively(DiT(**SMALL)).save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = load_file(file)
    kept["head.weight"] = kept.pop("blocks.1.mlp.fc2.bias")
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.mlp\.fc2\.bias; unexpected: head\.weight"):
        make_model(SMALL, str(tmp_path))


def test_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"does not use: blocks\.2\."):
        start_from(DiT(**SMALL), lively(DiT(**{**SMALL, "num_layers": 3})))
    with pytest.raises(ValueError, match=r"wrong shape: .*\[16, 16\]|wrong shape"):
        start_from(DiT(**{**SMALL, "hidden_size": 32}), lively(DiT(**SMALL)))


def test_sources_are_folders_pipelines_or_official_files(tmp_path) -> None:
    source = lively(DiT(**SMALL))
    source.save_pretrained(tmp_path / "folder")
    source.save_pretrained(tmp_path / "pipeline" / "transformer")
    save_file(source.to_official(), tmp_path / "official.safetensors")
    for name in ("folder", "pipeline", "official.safetensors"):
        found = load_backbone(tmp_path / name, num_heads=2).eval()
        assert torch.equal(found(*inputs()).sample, source(*inputs()).sample)
        assert make_model({**SMALL, "attention": "softmax"}, str(tmp_path / name))[1] == []


def test_unreadable_sources(tmp_path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"weights\.pt.*diffattn convert"):
        load_backbone(tmp_path / "weights.pt", 2)
    for name in ("bad.safetensors", "empty"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_backbone(tmp_path / name, 2)


@pytest.mark.slow
def test_distillation_teaches_the_mediators_and_nothing_else() -> None:
    teacher = lively(DiT(**SMALL))
    student: Any = DiT(**SMALL, attention="mediator", mediators=(4,))
    start_from(student, teacher)
    freeze_backbone(student)
    distillation = Distillation(student, teacher)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.003)
    losses = []
    for _ in range(60):
        with distillation.watching():
            student(*inputs())
        loss = distillation.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert student.blocks[0].attn.qkv.weight.grad is None
    student(*inputs())  # no hook is left behind
    assert not student.blocks[0].attn._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["inline", "focused_linear", "mlla", "circulant"])
def test_linear_layers_start_from_a_softmax_checkpoint_and_learn_from_it(attention: str) -> None:
    teacher = lively(DiT(**SMALL))
    student = DiT(**SMALL, attention=(attention, "softmax"))
    new = start_from(student, teacher)
    assert new
    assert all(".0." in name for name in new)
    own, given = student.state_dict(), teacher.state_dict()
    for name, weight in given.items():
        assert name not in own or torch.equal(own[name], weight), name
    distillation = Distillation(student, teacher)
    freeze_backbone(student)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        with distillation.watching():
            student(*inputs())
        loss = distillation.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for name, p in student.named_parameters() if ".1." in name and "blocks" in name)


def test_inline_layers_begin_as_the_expansion_of_the_softmax_layer_they_start_from() -> None:
    teacher = lively(DiT(**SMALL))
    with torch.no_grad():
        block: Any
        for block in teacher.blocks:
            block.attn.qkv.weight[:16] *= 0.05  # flat logits
            block.attn.qkv.bias[:16] *= 0.05
    student = DiT(**SMALL, attention="inline").eval()
    assert all(".residual." in name for name in start_from(student, teacher))
    torch.testing.assert_close(student(*inputs()).sample, teacher(*inputs()).sample, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("attention", ["inline", "focused_linear", "mlla", "circulant"])
def test_linear_layers_start_at_a_higher_resolution(attention: str) -> None:
    source = lively(DiT(**SMALL, attention=attention))
    model = DiT(**{**SMALL, "sample_size": 16}, attention=attention).eval()
    assert start_from(model, source) == []
    if attention != "circulant":  # whose logits are scaled for the grid that a model is made for
        assert torch.allclose(model(*inputs(16)).sample, source(*inputs(16)).sample, atol=1e-5)


def test_softmax_layers_start_from_linear_ones_that_have_their_weights() -> None:
    source, model = lively(DiT(**SMALL, attention="inline")), DiT(**SMALL)
    assert start_from(model, source) == []
    with pytest.raises(ValueError, match=r"missing weights: blocks\.0\.attn\.qkv\.bias"):
        start_from(DiT(**SMALL), lively(DiT(**SMALL, attention="circulant")))
    with pytest.raises(ValueError, match=r"missing weights: blocks\.0\.attn\.proj\.bias"):
        start_from(DiT(**SMALL), lively(DiT(**SMALL, attention="mlla")))


def test_distillation_needs_matching_layers_and_mediators() -> None:
    teacher = DiT(**SMALL)
    with pytest.raises(ValueError, match="teacher's num_layers is 2, the model's 3"):
        Distillation(DiT(**{**SMALL, "num_layers": 3}, attention="mediator", mediators=(4,)), teacher)
    with pytest.raises(ValueError, match="no mediator layers"):
        Distillation(DiT(**SMALL), teacher)
    student = DiT(**SMALL, attention="mediator", mediators=(4,))
    for attention in ("mediator", "agent", ("softmax", "inline")):
        other = DiT(**SMALL, attention=attention, mediators=(4,))
        with pytest.raises(ValueError, match=r"must be softmax in every layer, got .*(mediator|agent|softmax\+inline)"):
            Distillation(student, other)
    with pytest.raises(ValueError, match="no mediator layers"):
        freeze_backbone(DiT(**SMALL))


def test_a_start_with_a_null_class_loses_its_row_and_one_without_gets_a_new_one() -> None:
    table = "y_embedder.embedding_table.weight"
    guided, unguided = lively(DiT(**SMALL)), lively(DiT(**SMALL, null_class=False), seed=1)
    model = DiT(**SMALL, null_class=False)
    assert start_from(model, guided) == []
    assert torch.equal(model.state_dict()[table], guided.state_dict()[table][:3])
    model = DiT(**SMALL)
    assert start_from(model, unguided) == [table]
    assert torch.equal(model.state_dict()[table][:3], unguided.state_dict()[table])
    with pytest.raises(ValueError, match="the start has 3 classes, the data 4"):
        start_from(DiT(**SMALL | {"num_classes": 4}, null_class=False), guided)  # as many rows, other meanings


def test_a_frozen_backbone_needs_a_start_that_has_all_of_it() -> None:
    model = DiT(**SMALL, attention="mediator", mediators=(4,))
    check_frozen(model, start_from(model, lively(DiT(**SMALL))))
    new = [name for name in start_from(model, lively(DiT(**SMALL, null_class=False))) if name.startswith("y_embedder")]
    with pytest.raises(ValueError, match=r"frozen one would never be trained; set objective\.label_dropout=0"):
        check_frozen(model, new)
    with pytest.raises(ValueError, match=r"would keep their random values; give a trained model as model\.start"):
        check_frozen(model, [name for name, _ in model.named_parameters()])


def test_a_start_with_weights_that_are_not_finite_is_refused(tmp_path) -> None:
    model = lively(DiT(**SMALL))
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights that are NaN or infinite: blocks\.1\.attn\.qkv\.weight"):
        load_backbone(tmp_path, num_heads=2)

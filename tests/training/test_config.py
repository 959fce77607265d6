"""Training configuration: precedence, and what is refused."""

import json
import re

import pytest

from diffattn.training.config import PRESETS, ModelConfig, TrainConfig, differing_fields
from diffattn.training.ranges import FREE_TO_CHANGE


def test_defaults_presets_files_settings_and_options_win_in_this_order(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  lr: 3e-4\n  batch: 32\nmodel:\n  attention: [softmax, mediator]\n")
    config = TrainConfig.read("cifar-sit-cpu", file, ["optim.batch=16", "run.out=here"], {"run.out": "there"})
    assert config.model.patch_size == 4  # preset
    assert config.optim.lr == 3e-4  # file over preset; YAML reads 3e-4 as text
    assert config.optim.batch == 16  # setting over file
    assert config.run.out == "there"  # option over setting
    assert config.model.attention == ("softmax", "mediator")
    assert config.optim.eps == TrainConfig().optim.eps  # default


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_json(preset) -> None:
    config = TrainConfig.read(preset)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_json_file_is_read_too(tmp_path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(TrainConfig.read("cifar-sit").to_dict()))
    assert TrainConfig.read(file=file) == TrainConfig.read("cifar-sit")


def test_the_size_preset_sets_the_backbone() -> None:
    arguments = TrainConfig.read(settings=["model.size=XL/2"]).model_arguments()
    assert (arguments["hidden_size"], arguments["num_layers"], arguments["patch_size"]) == (1152, 28, 2)


def test_options_of_an_attention_and_steps_reach_the_model() -> None:
    settings = ["model.attention=[softmax, focused_linear]", "model.attention_options={focused_linear: {power: 4}}",
                "model.steps=[[64, 1], [128, 1]]"]  # fmt: skip
    arguments = TrainConfig.read(settings=settings).model_arguments()
    assert arguments["attention"] == ("softmax", "focused_linear")
    assert arguments["attention_options"] == {"focused_linear": {"power": 4}}
    assert arguments["steps"] == ((64, 1), (128, 1))
    with pytest.raises(ValueError, match=r"model\.steps must be tuple.* or none, got 64"):
        TrainConfig.read(settings=["model.steps=64"])
    with pytest.raises(ValueError, match=r"model\.attention_options must be dict.* or none, got 3"):
        TrainConfig.read(settings=["model.attention_options=3"])


def test_the_path_of_the_objective_is_written_into_the_model() -> None:
    assert TrainConfig.read().model_arguments()["path"] == "linear"
    assert TrainConfig.read(settings=["objective.path=gvp"]).model_arguments()["path"] == "gvp"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.learning_rate=1", "unknown field of optim: 'learning_rate'; allowed: name, batch"),
        ("optimizer.lr=1", "unknown section: 'optimizer'"),
        ("lr=1", "section.field=value"),
        ("optim.lr", "section.field=value"),
        ("optim.batch=many", "optim.batch must be int, got 'many'"),
        ("optim.batch=1.5", "optim.batch must be int, got 1.5"),
        ("optim.batch=true", "optim.batch must be int, got True"),
        ("optim.batch=0", "optim.batch must be at least 1, got 0"),
        ("optim.lr=-1", "optim.lr must be at least 0, got -1"),
        ("optim.lr=.nan", "optim.lr must be at least 0, got nan"),
        ("optim.betas=[0.9]", "optim.betas must be"),
        ("optim.betas=[2, 0.9]", "optim.betas must be two numbers from 0 to below 1, got (2.0, 0.9)"),
        ("optim.betas=[0.9, 1]", "optim.betas must be two numbers from 0 to below 1, got (0.9, 1.0)"),
        ("optim.eps=0", "optim.eps must be more than 0, got 0.0"),
        ("optim.lr=.inf", "optim.lr must be finite, got inf"),
        ("objective.min_snr=-1", "objective.min_snr must be more than 0, got -1.0"),
        ("objective.logit_std=-1", "objective.logit_std must be more than 0, got -1.0"),
        ("objective.logit_mean=.nan", "objective.logit_mean must be finite, got nan"),
        ("objective.distill_weight=-1", "objective.distill_weight must be at least 0, got -1.0"),
        ("model.num_heads=0", "model.num_heads must be at least 1, got 0"),
        ("model.num_layers=0", "model.num_layers must be at least 1, got 0"),
        ("model.patch_size=0", "model.patch_size must be at least 1, got 0"),
        ("model.hidden_size=-4", "model.hidden_size must be at least 1, got -4"),
        ("model.mlp_ratio=0", "model.mlp_ratio must be more than 0, got 0.0"),
        ("model.norm_eps=-1", "model.norm_eps must be at least 0, got -1.0"),
        ("run.sample_steps=0", "run.sample_steps must be at least 1, got 0"),
        ("run.eval_every=-3", "run.eval_every must be at least 0, got -3"),
        ("run.eval_samples=1", "run.eval_samples must be at least 4, got 1"),
        ("run.guidance=0.5", "run.guidance must be at least 1, got 0.5"),
        ("run.seed=-1", "run.seed must be at least 0, got -1"),
        ("run.seed=99999999999999999999", "run.seed must be at most 9223372036854774807, got 99999999999999999999"),
        ("data.num_workers=100000", "data.num_workers must be at most 256, got 100000"),
        ("data.size=100000", "data.size must be at most 16384, got 100000"),
        ("model.num_layers=100000", "model.num_layers must be at most 1000, got 100000"),
        ("objective.bins=100000", "objective.bins must be at most 1000, got 100000"),
        ("optim.batch=100000000", "optim.batch must be at most 1048576, got 100000000"),
        ("data.num_workers=-1", "data.num_workers must be at least 0, got -1"),
        ("objective.path=cosine", "objective.path must be one of linear, gvp, got 'cosine'"),
        ("objective.label_dropout=2", "objective.label_dropout must be from 0 to 1, got 2"),
        ("model.size=XXL/2", "model.size must be one of"),
        ("run.precision=fp8", "run.precision must be one of"),
        ("optim.lr=[1", "optim.lr"),
    ],
)
def test_bad_settings_name_the_value_and_what_is_allowed(setting, says) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        TrainConfig.read(settings=[setting])


def test_unreadable_and_senseless_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="not a readable JSON or YAML file"):
        TrainConfig.read(file=tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must contain sections"):
        TrainConfig.read(file=tmp_path / "list.yaml")
    (tmp_path / "flat.yaml").write_text("optim: 3\n")
    with pytest.raises(ValueError, match="'optim' must be a section"):
        TrainConfig.read(file=tmp_path / "flat.yaml")
    with pytest.raises(ValueError, match="preset must be one of cifar-sit"):
        TrainConfig.read("cifar")


def test_differences_that_matter_are_named_and_others_are_not() -> None:
    old = TrainConfig.read("cifar-sit")
    new = TrainConfig.read("cifar-sit", settings=["run.steps=7", "run.keep=9", "optim.lr=1e-2", "model.num_layers=3"])
    assert differing_fields(old, new) == ["model.num_layers: 9 -> 3", "optim.lr: 0.001 -> 0.01"]
    assert differing_fields(old, old) == []


SIZES = ("patch_size", "hidden_size", "num_layers", "num_heads")


def sizes_of(config: TrainConfig) -> list[int]:
    arguments = config.model_arguments()
    assert [getattr(config.model, name) for name in SIZES] == [arguments[name] for name in SIZES]
    return [arguments[name] for name in SIZES]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (["model.size=B/4"], [4, 768, 12, 12]),
        (["model.size=B/4", "model.num_layers=3"], [4, 768, 3, 12]),
        (["model.num_layers=3", "model.size=B/4"], [4, 768, 3, 12]),
        (["model.size=B/4", "model.patch_size=2"], [2, 768, 12, 12]),  # which is also the default
    ],
)
def test_what_is_given_beside_a_size_counts(settings: list[str], sizes: list[int], tmp_path) -> None:
    config = TrainConfig.read(settings=settings)
    assert sizes_of(config) == sizes
    assert sizes_of(TrainConfig.from_dict(config.to_dict())) == sizes
    values = {name.removeprefix("model."): value for name, _, value in (setting.partition("=") for setting in settings)}
    (tmp_path / "run.yaml").write_text("model: {" + ", ".join(f"{k}: {v}" for k, v in values.items()) + "}")
    assert sizes_of(TrainConfig.read(file=tmp_path / "run.yaml")) == sizes
    later = TrainConfig.read(file=tmp_path / "run.yaml", settings=["model.hidden_size=48"])
    assert sizes_of(later) == [sizes[0], 48, *sizes[2:]]


def test_a_size_replaces_those_of_the_preset() -> None:
    preset, model = PRESETS["cifar-sit"]["model"], TrainConfig.read("cifar-sit", settings=["model.size=S/8"]).model
    assert preset["patch_size"] != model.patch_size == 8
    assert sizes_of(TrainConfig(model=ModelConfig(size="S/8"))) == [getattr(model, name) for name in SIZES]


def test_without_a_size_what_it_had_set_goes(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("model: {size: B/4, num_layers: 3}")
    config = TrainConfig.read(file=tmp_path / "run.yaml", settings=["model.size=null"])
    assert sizes_of(config) == [2, 384, 3, 6]


def test_a_configuration_of_an_earlier_version_has_the_size_that_it_names() -> None:
    now = TrainConfig.read("cifar-sit", settings=["model.size=B/4"])
    before = now.to_dict()
    before["model"] |= {"hidden_size": 64, "num_layers": 9}  # of the preset, over which the size had won
    before["run"]["guidance"] = 0.0  # may change, and was in range
    found = TrainConfig.of_earlier(before, now, FREE_TO_CHANGE)
    assert sizes_of(found) == [4, 768, 12, 12]
    assert differing_fields(found, now) == []

"""Variants of a saved pipeline's weights: which exist, which is loaded, and what a refusal lists."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from support import tiny
from support.tiny_dit import tiny_dit
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.drawing.loading import load_pipeline
from diffattn.drawing.variants import choose_variant, variants_in
from diffattn.sampling import SiTPipeline

UNET, TEXT, VAE = "unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"


# Names of files.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([f"{UNET}.safetensors", f"{TEXT}.safetensors"], {"unet": [None], "text_encoder": [None]}),
        ([f"{UNET}.fp16.safetensors", f"{TEXT}.safetensors"], {"unet": ["fp16"], "text_encoder": [None]}),
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], {"unet": [None, "fp16"]}),
        ([f"{UNET}-00001-of-00002.safetensors", f"{UNET}.safetensors.index.json"], {"unet": [None]}),
        ([f"{UNET}.fp16-00001-of-00002.safetensors", f"{UNET}.fp16-00002-of-00002.safetensors"], {"unet": ["fp16"]}),
        ([f"{UNET}-00001-of-00002.fp16.safetensors", f"{UNET}.safetensors.fp16.index.json"], {"unet": ["fp16"]}),
        ([f"{UNET}.non_ema.safetensors", f"{TEXT}.bf16.safetensors"], {"unet": ["non_ema"], "text_encoder": ["bf16"]}),
        ([f"{UNET}.fp16.bin", f"{UNET}.bin", "v.safetensors", "unet/lora.safetensors", "a/b/model.safetensors"], {}),
        (["unet/config.json", "tokenizer/vocab.json"], {}),
    ],
)  # fmt: skip
def test_variants_are_read_off_the_names(files: Sequence[str], expected: dict[str, list[str | None]]) -> None:
    assert variants_in(files) == expected


def test_only_components_of_the_pipeline_count() -> None:
    files = [f"{UNET}.safetensors", "old_unet/diffusion_pytorch_model.fp16.safetensors"]
    assert variants_in(files, ["unet", "vae"]) == {"unet": [None]}


PLAIN, FP16, BOTH = [None], ["fp16"], [None, "fp16"]


@pytest.mark.parametrize(
    ("there", "asked", "expected"),
    [
        ({"unet": PLAIN, "vae": PLAIN}, None, None),
        ({"unet": FP16, "vae": FP16}, None, "fp16"),
        ({"unet": FP16, "vae": PLAIN}, None, "fp16"),
        ({"unet": FP16, "vae": BOTH}, None, "fp16"),
        ({"unet": BOTH, "vae": BOTH}, None, None),
        ({"unet": BOTH, "vae": BOTH}, "fp16", "fp16"),
        ({"unet": BOTH, "vae": PLAIN}, "fp16", "fp16"),
        ({"unet": ["bf16", "fp16"], "vae": FP16}, None, "fp16"),
        ({}, None, None),
    ],
)
def test_the_only_variant_is_found_by_itself(there: Any, asked: str | None, expected: str | None) -> None:
    assert choose_variant("m", there, asked) == expected


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        ({"unet": PLAIN, "vae": BOTH}, "bf16", "'m' has no variant 'bf16'; on disk: unet: plain; vae: plain, fp16"),
        ({"unet": FP16, "vae": PLAIN}, "bf16", "'m' has no variant 'bf16'; on disk: unet: fp16; vae: plain"),
        ({"unet": FP16, "vae": ["ema"]}, "fp16", "has neither variant 'fp16' nor plain weights for vae; on disk: "),
        ({"unet": ["bf16", "fp16"]}, None, "no plain weights and several variants; choose one; on disk: unet: bf16, "),
        ({"unet": ["bf16"], "vae": FP16}, None, "has no variant for all of it; on disk: unet: bf16; vae: fp16"),
        ({}, "fp16", "has no variant 'fp16'; on disk: no weights in safetensors"),
        ({"unet": FP16}, "../x", "variant must be a word such as fp16, got '../x'"),
        ({"unet": FP16}, "", "variant must be a word such as fp16, got ''"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_on_disk(there: Any, asked: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_variant("m", there, asked)


# Loading.


def weights_of(pipe: DiffusionPipeline) -> list[torch.Tensor]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [weight for part in parts for weight in part.state_dict().values()]


def same(a: DiffusionPipeline, b: DiffusionPipeline) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    return tiny.pipeline("sd", tmp_path_factory.mktemp("tokenizer"))


Save = Callable[..., Path]


@pytest.fixture
def save(pipe: DiffusionPipeline, tmp_path: Path) -> Save:
    """Saves the pipeline with a variant, in shards if asked for."""

    def saved(variant: str | None, shards: bool = False, name: str = "model") -> Path:
        sharded: Any = {"max_shard_size": "20KB"} if shards else {}
        pipe.save_pretrained(tmp_path / name, variant=variant, **sharded)
        return tmp_path / name

    return saved


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("asked", [None, "fp16"])
def test_a_folder_with_one_variant_alone(asked: str | None, shards: bool, pipe: DiffusionPipeline, save: Save) -> None:
    folder = save("fp16", shards)
    assert any("fp16-00001-of" in file.name for file in folder.rglob("*.safetensors")) == shards
    assert same(load_pipeline(str(folder), variant=asked), pipe)


@pytest.mark.slow
def test_shards_named_the_former_way(pipe: DiffusionPipeline, save: Save) -> None:
    folder = save("fp16", shards=True)
    former = (r"\.fp16(-\d{5}-of-\d{5})\.safetensors", r"\1.fp16.safetensors")
    for index in (folder / "unet").glob("*.index.fp16.json"):
        index.write_text(re.sub(*former, index.read_text()))
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name(re.sub(*former, file.name)))
    assert all(file.name.endswith(".fp16.safetensors") for file in (folder / "unet").glob("*.safetensors"))
    assert same(load_pipeline(str(folder)), pipe)


def test_a_file_without_an_ending_beside_a_variant(pipe: DiffusionPipeline, save: Save) -> None:
    folder = save("fp16")
    (folder / "unet" / "LICENSE").write_text("do what you want")
    with pytest.raises(ValueError, match=r"variants cannot be read beside 'unet/LICENSE', a name without a dot"):
        load_pipeline(str(folder))


@pytest.mark.slow
def test_a_single_component_with_a_variant(pipe: DiffusionPipeline, save: Save) -> None:
    folder = save(None)
    file = folder / f"{UNET}.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.ema.safetensors"))
    assert same(load_pipeline(str(folder)), pipe)
    assert same(load_pipeline(str(folder), variant="ema"), pipe)
    with pytest.raises(ValueError, match=r"no variant 'fp16'; on disk: text_encoder: plain; unet: ema; vae: plain"):
        load_pipeline(str(folder), variant="fp16")


@pytest.mark.slow
def test_a_variant_beside_plain_weights_is_loaded_when_asked_for(pipe: DiffusionPipeline, save: Save) -> None:
    folder, other = save(None), save("ema", name="other")
    with torch.no_grad():
        changed = tiny.pipeline("sd", folder.parent / "tokenizer")
        changed.unet.conv_in.weight += 1
    changed.unet.save_pretrained(other / "unet", variant="ema")
    shutil.copy(other / "unet" / "diffusion_pytorch_model.ema.safetensors", folder / "unet")
    assert same(load_pipeline(str(folder)), pipe)
    assert same(load_pipeline(str(folder), variant="ema"), changed)


def test_a_sit_with_a_variant_alone(tmp_path: Path) -> None:
    SiTPipeline(tiny_dit(in_channels=3), FlowMatchEulerDiscreteScheduler(shift=1)).save_pretrained(
        tmp_path / "sit", variant="bf16"
    )
    assert isinstance(load_pipeline(str(tmp_path / "sit")), SiTPipeline)


def test_an_embedded_model_has_none() -> None:
    with pytest.raises(ValueError, match="embedded model 'emoji-sd' has no variants, got 'fp16'"):
        load_pipeline("emoji-sd", variant="fp16")


# On the command line.


@pytest.mark.slow
def test_generate_takes_a_variant_and_its_record_tells(save: Save, tmp_path: Path) -> None:
    from diffattn.drawing.request import record_of

    folder = save("fp16")
    words = f"generate --prompt x --model {folder} --method none --steps 1 --dtype float32 --device cpu"
    for variant, name in ((["--variant", "fp16"], "a.png"), ([], "b.png")):
        done = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path / name), *variant])
        assert done.exit_code == 0, done.output
    assert record_of(tmp_path / "a.png")["variant"] == "fp16"
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    "command", ["generate --prompt x", "info", "tune --out x.json", "evaluate --reference y --prompts p"]
)
def test_commands_refuse_a_variant_that_is_not_there(
    command: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").write_text("a cat\n")
    words = [*command.split(), "--model", str(save("fp16")), "--variant", "bf16", "--device", "cpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert "has no variant 'bf16'; on disk: text_encoder: fp16; unet: fp16; vae: fp16" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_info_needs_a_model_for_a_variant() -> None:
    done = CliRunner().invoke(app, ["info", "--variant", "fp16"])
    assert done.exit_code == 2
    assert "--variant 'fp16' applies to a model" in done.stderr

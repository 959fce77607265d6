"""Cached latents: contents, batches drawn from them, kills, refusals."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import safe_open
from support.streams import same, take
from support.tiny_pictures import class_folders, folder, packed, png
from torch import nn

from diffattn.data import ImageDataset, in_memory, open_dataset
from diffattn.training.batches import Batches
from diffattn.training.latents import LatentDataset, cache_latents
from diffattn.training.random import LATENT_NOISE, step_generator

SCALE, SHIFT = 0.7, 0.3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """7 pictures of 16x16."""
    content = {name: png(i, 16) for i, name in enumerate(class_folders({"cat": 4, "dog": 3}))}
    return open_dataset(packed(tmp_path_factory.mktemp("data") / "data.zip", content), 16)


def make_vae(seed: int = 0) -> AutoencoderKL:
    """Two latent channels at half the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(4, 8),  # type: ignore[arg-type]
            down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
            norm_num_groups=2,
            latent_channels=2,
            sample_size=16,
            scaling_factor=SCALE,
            shift_factor=SHIFT,
        ).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make_vae()


@pytest.fixture(scope="module")
def latents(dataset: ImageDataset, vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return cache_latents(dataset, vae, tmp_path_factory.mktemp("latents") / "cache", batch_size=2, shard_size=3)


def stop_after(pictures: int) -> Callable[[int, int], None]:
    """Progress that a user interrupts."""

    def progress(done: int, total: int) -> None:
        if done >= pictures:
            raise KeyboardInterrupt

    return progress


# Where it is kept.


def test_a_cache_that_is_no_folder_is_named(dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    for cache, reason in ((tmp_path / "afile", "File exists"), (tmp_path / "afile/inside", "Not a directory")):
        with pytest.raises(OSError, match=rf"latents \(data.cache\) cannot be created at '{cache}': {reason}"):
            cache_latents(dataset, vae, cache)


# What is kept.


@torch.no_grad()
def test_latents_are_what_the_autoencoder_gives(
    latents: LatentDataset, dataset: ImageDataset, vae: AutoencoderKL
) -> None:
    for i in range(7):
        moments, label = latents[i]
        assert (moments.dtype, moments.shape, label) == (torch.float16, (2, 4, 8, 8), dataset[i][1])
        x = dataset[i][0].float() / 127.5 - 1
        for side, picture in zip(moments, (x, x.flip(-1)), strict=True):
            found = vae.encode(picture[None]).latent_dist  # type: ignore[union-attr]
            torch.testing.assert_close(side[None].float(), torch.cat([found.mean, found.std], 1), rtol=1e-3, atol=1e-4)


def test_attributes_are_those_of_the_pictures(latents: LatentDataset, dataset: ImageDataset) -> None:
    assert len(latents) == 7
    assert torch.equal(latents.labels, dataset.labels)
    for name in ("class_names", "fingerprint", "size"):
        assert getattr(latents, name) == getattr(dataset, name)
    assert latents.class_counts() == {"cat": 4, "dog": 3}
    assert (latents.shape, latents.scaling_factor, latents.shift_factor) == ((2, 8, 8), SCALE, SHIFT)
    with pytest.raises(IndexError):
        latents[7]


def test_pictures_in_memory_give_the_same(latents: LatentDataset, dataset: ImageDataset, vae: AutoencoderKL) -> None:
    assert len(cache_latents(in_memory(dataset), vae, latents.folder)) == 7  # not refused


@pytest.mark.slow
def test_workers_decode_the_same(
    latents: LatentDataset, dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path
) -> None:
    other = cache_latents(dataset, vae, tmp_path / "cache", batch_size=2, shard_size=3, num_workers=1)
    assert all(torch.equal(other[i][0], latents[i][0]) for i in range(7))


def test_a_cache_can_be_opened_again_and_pickled(latents: LatentDataset) -> None:
    expected = latents[5][0]
    for copy in (LatentDataset(latents.folder), pickle.loads(pickle.dumps(latents))):
        assert torch.equal(copy[5][0], expected)
        assert torch.equal(copy.labels, latents.labels)
    assert len(pickle.dumps(latents)) < 4000  # the shards are not in it


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shards_are_memory_mapped(latents: LatentDataset) -> None:
    address = latents[0][0].data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(x, 16) for x in line[0].split("-")), line[-1]) for line in lines]
    assert [Path(name).name for low, high, name in spans if low <= address < high] == ["shard-00000.safetensors"]


# Batches of latents.


def test_batches_are_drawn_from_the_moments_and_scaled(latents: LatentDataset) -> None:
    batches = Batches(latents, 4, seed=1)
    x, y = take(1, batches, start=2)[0]
    indices, sides = batches.indices(2), batches.mirrored(2).long()
    assert 0 < sides.sum() < 4
    noise = torch.randn(4, 2, 8, 8, generator=step_generator(1, 2, LATENT_NOISE))
    mean, std = (
        torch.stack([latents[i][0][s] for i, s in zip(indices.tolist(), sides, strict=True)]).float().chunk(2, 1)
    )
    torch.testing.assert_close(x, (mean + std * noise - SHIFT) * SCALE)
    assert torch.equal(y, latents.labels[indices])


@pytest.mark.slow
def test_latents_are_the_same_for_any_number_of_processes_and_workers_and_from_any_start(
    latents: LatentDataset,
) -> None:
    whole = take(4, Batches(latents, 6, seed=1))
    parts = [take(4, Batches(latents, 6, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    together: Any = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert same(together, whole)
    assert same(take(2, Batches(latents, 6, seed=1, num_workers=1), start=2), whole[2:])


# Kills.


@pytest.mark.slow
def test_a_killed_run_goes_on(
    latents: LatentDataset, dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache_latents(dataset, vae, tmp_path, batch_size=2, shard_size=3, progress=stop_after(5))
    assert [path.name for path in sorted(tmp_path.glob("shard-*"))] == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"is incomplete: 2 of 3 shards are missing; repeat the encoding"):
        LatentDataset(tmp_path)

    stale = tmp_path / ".shard-00001.safetensors.123.part"
    stale.write_bytes(b"half a shard")
    kept, calls = (tmp_path / "shard-00000.safetensors").stat(), []
    done = cache_latents(dataset, vae, tmp_path, batch_size=2, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(3, 7), (5, 7), (6, 7), (7, 7)]
    assert (tmp_path / "shard-00000.safetensors").stat() == kept
    assert not stale.exists()
    assert all(torch.equal(done[i][0], latents[i][0]) for i in range(7))


@pytest.mark.slow
def test_a_kill_before_the_first_shard_leaves_nothing_in_the_way(
    dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache_latents(dataset, vae, tmp_path, progress=stop_after(1))
    (tmp_path / "index.json").unlink()
    assert len(cache_latents(dataset, vae, tmp_path)) == 7


# Refusals.


def test_a_cache_of_something_else_is_refused(
    latents: LatentDataset, dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path
) -> None:
    other = open_dataset(folder(tmp_path / "other", class_folders({"cat": 7})), 16)
    larger = ImageDataset(dataset.files, dataset.rows, dataset.labels, dataset.class_names, 32)
    rescaled = make_vae()
    rescaled.register_to_config(scaling_factor=2.0)
    for pictures, autoencoder, message in (
        (other, vae, rf"another data set \({dataset.fingerprint[:12]}, now {other.fingerprint[:12]}\); choose"),
        (larger, vae, r"another picture size \(16, now 32\)"),
        (dataset, make_vae(seed=1), r"another autoencoder \("),
        (dataset, rescaled, r"another scaling factor \(0.7, now 2.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_latents(pictures, autoencoder, latents.folder)
    assert len(LatentDataset(latents.folder)) == 7


def test_a_folder_that_is_no_cache_is_refused(
    latents: LatentDataset, dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"index.json' is not a readable JSON file"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, but 1 is needed"):
        LatentDataset(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "shard-00000.safetensors").write_bytes((latents.folder / "shard-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"contains shards without an index.json"):
        cache_latents(dataset, vae, tmp_path)


@pytest.mark.slow
def test_latents_that_are_not_finite_are_refused(dataset: ImageDataset, tmp_path: Path) -> None:
    broken: Any = make_vae()
    nn.init.constant_(broken.quant_conv.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite in float16 for picture 0 and 6 more; if its own dtype"):
        cache_latents(dataset, broken, tmp_path / "cache")


def test_an_autoencoder_without_a_distribution_is_refused(dataset: ImageDataset, tmp_path: Path) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(TypeError, match="AutoencoderTiny gives no latent_dist; use an AutoencoderKL"):
        cache_latents(dataset, tiny, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_an_unreadable_picture_is_named_and_what_was_done_stays(vae: AutoencoderKL, tmp_path: Path) -> None:
    content = {f"a/{i}.png": png(i, 16) for i in range(3)} | {"a/9.png": b"bad"}
    dataset = open_dataset(packed(tmp_path / "data.zip", content), 16)
    with pytest.raises(ValueError, match=r"^cannot read the picture 'a/9.png' in '[^\n]*$"):
        cache_latents(dataset, vae, tmp_path / "cache", shard_size=2, num_workers=1)
    with safe_open(tmp_path / "cache/shard-00000.safetensors", framework="pt") as file:
        assert file.get_slice("moments").get_shape() == [2, 2, 4, 8, 8]


def test_sizes_below_1_are_refused(dataset: ImageDataset, vae: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size and shard_size must be at least 1, got 0 and 2048"):
        cache_latents(dataset, vae, tmp_path, batch_size=0)

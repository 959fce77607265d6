"""Batches: a pure function of (seed, step), the same for any number of processes and workers, from any start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.streams import Batch, same, take
from support.tiny_pictures import class_folders, packed, png

from diffattn.data import InMemoryDataset, LabelledDataset, in_memory, open_dataset
from diffattn.training.batches import Batches
from diffattn.training.random import FLIP, SHUFFLE, mixed_seed, step_generator


@pytest.fixture(scope="module")
def on_demand(tmp_path_factory: pytest.TempPathFactory) -> LabelledDataset:
    """11 pictures of 8x8 in a zip."""
    return open_dataset(packed(tmp_path_factory.mktemp("data") / "data.zip", class_folders({"cat": 7, "dog": 4})), 8)


def numbered(count: int) -> InMemoryDataset:
    """Pictures of 1x2 pixels: the number of the picture, and that of the side."""
    images = torch.zeros(count, 3, 1, 2, dtype=torch.uint8)
    images[..., 0], images[..., 1] = torch.arange(count)[:, None, None], 255
    return InMemoryDataset(images, torch.arange(count) % 3, ("a", "b", "c"), "numbers")


# The order of the samples.


@pytest.mark.parametrize("batch_size", [1, 4, 10, 32])
def test_every_epoch_is_a_new_shuffle_and_nothing_is_dropped(batch_size: int) -> None:
    batches = Batches(numbered(10), batch_size, seed=0)
    order = torch.cat([batches.indices(step) for step in range(60 // batch_size + 1)])[:60].view(6, 10)
    assert torch.equal(order.sort(1).values, torch.arange(10).expand(6, 10))
    assert len({tuple(epoch) for epoch in order.tolist()}) == 6


def test_the_order_follows_the_seed() -> None:
    first, again, other = (Batches(numbered(50), 50, seed=seed).indices(3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_epochs_are_counted() -> None:
    batches = Batches(numbered(10), 4, seed=0)
    assert batches.steps_per_epoch == 3
    assert batches.epoch(5) == 2.0
    assert batches.fingerprint == "numbers"


# What a batch is.


def test_pictures_lie_in_minus_1_to_1_with_their_labels() -> None:
    dataset = numbered(256)
    batches = Batches(dataset, 256, seed=0, flip=False)
    x, y = next(batches.iterate())
    assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (256, 3, 1, 2))
    indices = batches.indices(0)
    torch.testing.assert_close(x[:, 0, 0, 0], indices / 127.5 - 1)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(y, indices % 3)


def test_half_of_the_pictures_are_mirrored_and_the_data_stay_as_they_are() -> None:
    dataset = numbered(200)
    before = dataset.images.clone()
    batches = Batches(dataset, 200, seed=0)
    x = torch.stack([x for x, _ in take(10, batches)])
    mirrored = torch.stack([batches.mirrored(step) for step in range(10)])
    plain = torch.stack([x for x, _ in take(10, Batches(dataset, 200, seed=0, flip=False))])
    assert torch.equal(x, torch.where(mirrored[..., None, None, None], plain.flip(-1), plain))
    assert 0.45 < mirrored.float().mean() < 0.55
    assert len({tuple(step) for step in mirrored.tolist()}) == 10
    assert torch.equal(dataset.images, before)


def test_memory_and_files_give_the_same(on_demand: Any) -> None:
    a, b = (take(4, Batches(dataset, 6, seed=3)) for dataset in (on_demand, in_memory(on_demand)))
    assert same(a, b)


# Resuming, processes, workers.


def test_a_resumed_run_goes_on_with_the_same_batches(on_demand: LabelledDataset) -> None:
    whole = take(8, Batches(on_demand, 4, seed=5))
    for start in (1, 5):
        torch.randn(start)  # whatever else ran
        assert same(whole[start:], take(8 - start, Batches(on_demand, 4, seed=5), start))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_see_together_what_one_sees(on_demand: LabelledDataset, world_size: int) -> None:
    def of_rank(rank: int) -> list[Batch]:
        batches = Batches(on_demand, 6, seed=5, rank=rank, world_size=world_size)
        assert batches.local_batch_size == 6 // world_size
        return take(4, batches)

    parts = [of_rank(rank) for rank in range(world_size)]
    together = [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*parts, strict=True)]
    assert same(together, take(4, Batches(on_demand, 6, seed=5)))


@pytest.mark.slow
def test_workers_change_nothing(on_demand: LabelledDataset) -> None:
    state = torch.get_rng_state()
    found = take(5, Batches(on_demand, 4, seed=5, num_workers=2), start=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(found, take(5, Batches(on_demand, 4, seed=5), start=3))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_picture_is_named_in_one_line(tmp_path: Path, num_workers: int) -> None:
    dataset = open_dataset(packed(tmp_path / "data.zip", {"a/bad.png": b"bad", "a/good.png": png(0)}), 8)
    with pytest.raises(ValueError, match=r"^cannot read the picture 'a/bad.png' in '[^\n]*$"):
        take(2, Batches(dataset, 1, seed=0, num_workers=num_workers))


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 7, "world_size": 2}, "batch_size must be a positive multiple of 2 processes, got 7"),
        ({"batch_size": 0}, "batch_size must be a positive multiple of 1 processes, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1, got rank 2 of 2"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_bad_input_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(numbered(4), **({"batch_size": 4, "seed": 0} | arguments))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        Batches(numbered(0), 4, seed=0)


# Random numbers.


def test_generators_follow_from_seed_step_and_stream_alone() -> None:
    keys = [(seed, step, stream) for seed in (0, 1, 2**40) for step in (0, 1, 2**33) for stream in (0, 1, 100)]

    def draws() -> list[tuple[float, ...]]:
        return [tuple(torch.rand(3, generator=step_generator(*key)).tolist()) for key in keys]

    assert draws() == draws()
    assert len(set(draws())) == len(keys)


@pytest.mark.slow
def test_no_two_of_many_steps_share_the_half_of_the_seed_that_torch_uses() -> None:
    for stream in (SHUFFLE, FLIP):
        assert len({mixed_seed(7, step, stream) & 0xFFFFFFFF for step in range(100_000)}) == 100_000


def test_every_bit_of_the_seed_depends_on_the_step() -> None:
    bits = torch.tensor([[mixed_seed(0, step) >> bit & 1 for bit in range(32)] for step in range(2000)]).float()
    assert (bits.mean(0) - 0.5).abs().max() < 0.06  # five standard deviations
    neighbours = (bits[1:] - bits[:-1]).abs().mean(0)
    assert (neighbours - 0.5).abs().max() < 0.06


def test_seeds_stay_what_they_are_so_that_old_runs_can_be_resumed() -> None:
    assert [mixed_seed(*key) for key in ((0, 0, 0), (1, 2, 3), (2**64 - 1, 2**40 + 5, 100))] == [
        3778988835998903212,
        12608347097266506739,
        16583160485392252182,
    ]


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (2**64, 0, 0)])
def test_numbers_out_of_range_are_refused(key: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number from 0 to 2\*\*64 - 1, got"):
        step_generator(*key)

"""Pictures to train on: where they come from, how they become batches, and their cached latents."""

from diffattn.training.data.batches import Batches
from diffattn.training.data.classes import ClassBalance, check_balance, check_classes
from diffattn.training.data.datasets import ImageDataset, InMemoryDataset, LabelledDataset, in_memory
from diffattn.training.data.latents import LatentDataset, cache_latents
from diffattn.training.data.opening import open_dataset

__all__ = [
    "Batches",
    "ClassBalance",
    "ImageDataset",
    "InMemoryDataset",
    "LabelledDataset",
    "LatentDataset",
    "cache_latents",
    "check_balance",
    "check_classes",
    "in_memory",
    "open_dataset",
]

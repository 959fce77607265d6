"""Pictures and their classes from folders, zips and the Hugging Face hub."""

from diffattn.data.classes import ClassBalance, check_balance, check_classes
from diffattn.data.datasets import ImageDataset, InMemoryDataset, LabelledDataset, in_memory
from diffattn.data.opening import open_dataset

__all__ = [
    "ClassBalance",
    "ImageDataset",
    "InMemoryDataset",
    "LabelledDataset",
    "check_balance",
    "check_classes",
    "in_memory",
    "open_dataset",
]

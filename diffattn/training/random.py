"""Random numbers that depend on (seed, step) alone, whatever ran before and in whichever process."""

import hashlib
import struct

import torch

SHUFFLE, FLIP, LATENT_NOISE = 0, 1, 2
"""Streams of the data; those of the loop start at 100."""

_LIMIT = 1 << 64
_WORD = (1 << 32) - 1


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A fresh CPU generator for one purpose in one step.

    Two generators of the same seed and stream are different for all steps below 2**32, and those of different seeds
    or streams are unrelated.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        step: number of the step, or of the epoch, 0 to 2**64 - 1.
        stream: identifies the purpose of the numbers, 0 to 2**64 - 1.

    Raises:
        ValueError: a number outside of that range.
    """
    return torch.Generator().manual_seed(mixed_seed(seed, step, stream))


def mixed_seed(seed: int, step: int, stream: int = 0) -> int:
    """The 64-bit seed of `step_generator`.

    torch's CPU generator only uses the low 32 bits. With a plain hash, some of a million steps would share them (the
    birthday problem), so they are a permutation of the step, chosen by a hash of seed and stream.
    """
    for name, value in (("seed", seed), ("step", step), ("stream", stream)):
        if not 0 <= value < _LIMIT:
            raise ValueError(f"{name} must be a whole number from 0 to 2**64 - 1, got {value}")
    key = hashlib.blake2b(struct.pack("<QQQ", seed, stream, step >> 32), digest_size=12, person=b"diffattn-steps")
    first, second, high = struct.unpack("<III", key.digest())
    return high << 32 | _permuted(_permuted(step & _WORD ^ first) ^ second)


def _permuted(x: int) -> int:
    """A permutation of 32-bit words in which every bit of the input moves half of the output (murmur3's last step)."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 & _WORD
    return x ^ x >> 16

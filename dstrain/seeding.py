"""Randomness is a function of (seed, purpose, numbers), never of what ran before.

A step's dropout masks come from (seed, step, rank), an epoch's order from (seed, epoch). So a resumed run needs no stored
generator state to repeat the uninterrupted one bit for bit, and no consumer of random numbers disturbs another.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed from `seed`, the name of its purpose, and any numbers (step, rank, epoch)."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int, purpose: str, *numbers: int) -> None:
    """Seed torch's generators, on the CPU and on every GPU, with `derive_seed`."""
    torch.manual_seed(derive_seed(seed, purpose, *numbers))

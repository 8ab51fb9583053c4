"""Where every random number comes from: generators keyed by what the number is for.

A draw is a function of (seed, keys) alone, never of what ran before it, so a resumed run continues bit for bit
and an image does not depend on its batch.
"""

import hashlib

import torch


def fold(seed: int, *keys: int | str) -> int:
    """Mix a seed with keys (step, rank, sample index, a purpose) into 63 bits, the same on every platform."""
    text = "\x1f".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device` for this purpose: `generator(seed, "train", step, rank)`."""
    return torch.Generator(device=device).manual_seed(fold(seed, *keys))

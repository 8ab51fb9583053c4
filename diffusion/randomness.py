"""Where every random number comes from: generators keyed by what the number is for.

A draw is a function of (seed, keys) alone, never of what ran before it, so a resumed run continues bit for bit
and an image does not depend on its batch.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


def fold(seed: int, *keys: int | str) -> int:
    """Mix a seed with keys (step, rank, sample index, a purpose) into 63 bits, the same on every platform."""
    text = "\x1f".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device` for this purpose: `generator(seed, "train", step, rank)`."""
    return torch.Generator(device=device).manual_seed(fold(seed, *keys))


class Draws(Protocol):
    """What is random about a batch of B samples, on the device where it is used; `diffusion.draws` has some."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers (B, *shape), float32."""

    def uniform(self, purpose: str) -> Tensor:
        """Return a number (B,) in [0, 1) for each sample, independently."""

    def stratified(self, purpose: str) -> Tensor:
        """Return a number (B,) in [0, 1) for each sample: in random order, one in each of as many equal parts."""

    def within(self, name: str) -> "Draws":
        """Return draws for a part that names its own purposes."""

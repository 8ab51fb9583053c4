"""Noise whose moves belong together: one Brownian path a seed over sigma/alpha, the same for every number of steps.

A virtual Brownian tree: the path is a function of (seed, sigma/alpha), found by halving, and nothing of it is kept.
Gaines and Lyons (1997), section 2; k-diffusion uses torchsde's, of which this is no copy, so images differ.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .randomness import generator
from .schedule import Level

HALVINGS = 20  # of an octave; between the last two points the path is a line: 1000 steps lose a part in 10^4
OCTAVES = 30  # above and below sigma/alpha = 1; what lies beyond counts as the end


class BrownianNoise:
    """Standard normal noise for a move between two levels: the increment of a Brownian path, divided by its deviation.

    Path i depends on `seeds[i]` alone; moves that do not overlap are independent.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.seeds = tuple(seeds)
        self.device = torch.device(device)
        self._newest: dict[float, Tensor] = {}  # a move starts where the last one ended

    def between(self, x: Tensor, here: Level, there: Level) -> Tensor:
        """Return noise like x (B, C, H, W), B the number of seeds, for a move between two levels."""
        if len(x) != len(self.seeds):
            raise ValueError(f"noise for {len(self.seeds)} samples was asked for a batch of {len(x)}")
        first, last = (_bounded(at) for at in (here, there))
        ends = [self._at(rho, x.shape[1:]) for rho in (first, last)]
        self._newest = {first: ends[0], last: ends[1]}
        return ((ends[0] - ends[1]) / math.sqrt(abs(first - last))).to(self.device, x.dtype)

    def _at(self, rho: float, shape: Sequence[int]) -> Tensor:
        """The paths (B, *shape) at rho, float64, counted from rho = 1."""
        known = self._newest.get(rho)
        if known is not None and known.shape[1:] == shape:
            return known
        return torch.stack([_path(seed, rho, shape) for seed in self.seeds])


def _bounded(at: Level) -> float:
    top = 2.0**OCTAVES
    return min(max(at.sigma / at.alpha, 1 / top), top) if at.alpha else top


def _path(seed: int, rho: float, shape: Sequence[int]) -> Tensor:
    """One path at rho: whole octaves from 1, then halving the octave that rho is in."""

    def normal(*keys: int) -> Tensor:
        return torch.randn(shape, generator=generator(seed, "brownian", *keys)).double()

    octave = math.floor(math.log2(rho))
    octave += (2.0 ** (octave + 1) <= rho) - (rho < 2.0**octave)  # what log2 rounded
    start = torch.zeros(shape, dtype=torch.float64)
    for k in range(octave) if octave > 0 else range(-1, octave - 1, -1):
        start += math.copysign(math.sqrt(2.0**k), octave) * normal(k)
    end = start + math.sqrt(2.0**octave) * normal(octave)
    low, width, place = 2.0**octave, 2.0**octave, 1
    for _ in range(HALVINGS):
        if rho == low:
            return start
        middle = (start + end) / 2 + math.sqrt(width) / 2 * normal(octave, place)
        width, right = width / 2, rho >= low + width / 2
        start, end, low, place = (middle, end, low + width, 2 * place + 1) if right else (start, middle, low, 2 * place)
    return torch.lerp(start, end, (rho - low) / width)

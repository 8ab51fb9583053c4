"""What is random about a sample of a training run? A function of (seed, purpose, its number in the run), nothing else.

So 1 x 16, 2 x 8 and 2 x 4 accumulated twice give a sample the same timestep and noise. numpy's Philox (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3") counts its way to any number: sample n has 2^64 blocks of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion.randomness import fold

GOLDEN = 0.6180339887498949  # (sqrt 5 - 1) / 2: its multiples, modulo 1, fill [0, 1) most evenly
NORMAL, UNIFORM, ORDER = range(3)  # kinds of draws, which never share a stream


@dataclass(frozen=True)
class SampleDraws:
    """Draws for the samples `numbers`, counted over the whole run; `step` are those of their whole optimizer step.

    Values are drawn on the CPU, whatever `device` they are handed over on: they depend neither on the kind of device
    nor on how many there are.
    """

    seed: int
    numbers: range
    step: range | None = None
    device: torch.device | str = "cpu"

    def within(self, name: str) -> "SampleDraws":
        """Draws for a part that names its own purposes, apart from all others."""
        return replace(self, seed=fold(self.seed, "within", name))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (B, *shape), float32."""
        source = np.random.Philox(key=key(self.seed, purpose, NORMAL))
        draws, values = np.random.Generator(source), np.empty((len(self.numbers), *shape), np.float32)
        state = source.state
        counter = state["state"]["counter"]
        for row, number in enumerate(self.numbers):  # a microsecond each; a generator of torch would take five
            counter[1] = number
            source.state = state
            draws.standard_normal(out=values[row, ...], dtype=np.float32)
        return self._placed(values)

    def uniform(self, purpose: str) -> Tensor:
        """A number (B,) in [0, 1) for each sample, float64."""
        return self._placed(self._uniform(purpose))

    def stratified(self, purpose: str) -> Tensor:
        """A number (B,) in [0, 1) for each sample, float64: one in each of N equal parts for the N of the step."""
        step = self.step or self.numbers
        source = np.random.Philox(key=key(self.seed, purpose, ORDER), counter=step.start)
        part = np.random.Generator(source).permutation(len(step))[self.numbers.start - step.start :][
            : len(self.numbers)
        ]
        return self._placed(((part + self._uniform(purpose)) / len(step)).clip(max=np.nextafter(1.0, 0.0)))

    def spread(self) -> Tensor:
        """A number (B,) in [0, 1) for each sample, float64, without chance: any samples in a row lie evenly."""
        return self._placed((np.arange(self.numbers.start, self.numbers.stop) + 0.5) * GOLDEN % 1)

    def _uniform(self, purpose: str) -> np.ndarray:
        source = np.random.Philox(key=key(self.seed, purpose, UNIFORM), counter=self.numbers.start)
        blocks = source.random_raw(4 * len(self.numbers)).reshape(-1, 4)  # a block of four a sample
        return (blocks[:, 0] >> np.uint64(11)) * 2.0**-53

    def _placed(self, values: np.ndarray) -> Tensor:
        tensor, device = torch.from_numpy(values), torch.device(self.device)
        if device.type == "cuda":  # without waiting for what the device still computes
            return tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "mps" and tensor.dtype is torch.float64:
            tensor = tensor.float()
        return tensor.to(device)


@lru_cache(maxsize=256)
def key(seed: int, purpose: str, kind: int) -> int:
    """The key of a stream, 128 bits."""
    return fold(seed, "sample draws", purpose) | kind << 64

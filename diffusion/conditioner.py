"""What does every conditioner keep, whatever it reads?

It prepares what people and batches hold as tensors of one row a sample and encodes those into a network's condition;
a row may be dropped for the null condition, and inputs of several parts are moved, cut and counted like one tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.randomness import Draws
from diffusion.sampling import Noise


@dataclass(frozen=True)
class JointInput:
    """Prepared inputs of several conditioners, moved, cut and counted like one tensor of as many rows."""

    parts: tuple["Tensor | JointInput", ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: Any) -> "JointInput":
        return JointInput(tuple(part[rows] for part in self.parts))

    def to(self, *args: Any, **kwargs: Any) -> "JointInput":
        return JointInput(tuple(part.to(*args, **kwargs) for part in self.parts))


Prepared = Tensor | JointInput  # what `prepare` makes of anything


class Conditioner(nn.Module, ABC):
    """What turns the batch entry `entry` into a network's condition.

    `provides` holds the widths of what `forward` returns, such as {"context": 512}.
    """

    entry: str
    provides: dict[str, int]
    num_classes: int | None = None  # where a label is read
    low_size: tuple[int, int] | None = None  # (H, W) of the images it takes, where that is not the training images'
    train_noise: tuple[float, float] = (0.0, 0.0)  # levels of noise on the condition that training shows, low and high

    @abstractmethod
    def prepare(self, values: Any) -> Prepared:
        """A tensor of one row a sample from what a person gave; ValueError if that is of another kind."""

    @abstractmethod
    def null_like(self, prepared: Prepared) -> Prepared:
        """What a sample without a condition holds instead, of the same shape."""

    @abstractmethod
    def encode(self, prepared: Prepared) -> dict[str, Tensor]:
        """The condition of every row, null rows included."""

    @property
    def entries(self) -> tuple[str, ...]:
        """All batch entries that are read."""
        return (self.entry,)

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers())).device

    def prepare_batch(self, batch: Mapping[str, Any]) -> Prepared:
        """`prepare` of this conditioner's entries; ValueError where the batch lacks one."""
        for entry in self.entries:
            if entry not in batch:
                raise ValueError(
                    f"this model is conditioned on `{entry}`, but the data give only {', '.join(batch)}; "
                    "choose data that have it, or another conditioner"
                )
        return self.prepare(*(batch[entry] for entry in self.entries))

    def augmented(self, prepared: Prepared, draws: Draws) -> Prepared:
        """What training shows of `prepared`: noise of a level in `train_noise`, or by default none, is on it."""
        return prepared

    def corrupted(self, prepared: Prepared, noise: Noise, level: float | None = None) -> Prepared:
        """What sampling shows of it: noise of this level, None for the conditioner's own; by default it as it is."""
        return prepared

    def forward(self, prepared: Prepared, drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition, on this module's device; rows where `drop` (B,) is True get the null condition."""
        prepared = prepared.to(self.device)
        if drop is not None:
            prepared = where(drop.to(self.device), self.null_like(prepared), prepared)
        return self.encode(prepared)

    def alike(self, one: Prepared, other: Prepared) -> tuple[Prepared, Prepared]:
        """Two prepared inputs made equally long, so that one batch can hold both conditions; by default as they are."""
        return one, other


def alike_parts(
    conditioners: Iterable[Conditioner], one: JointInput, other: JointInput
) -> tuple[JointInput, JointInput]:
    """`alike` of every part."""
    triples = zip(conditioners, one.parts, other.parts, strict=True)
    pairs = [conditioner.alike(first, second) for conditioner, first, second in triples]
    return JointInput(tuple(first for first, _ in pairs)), JointInput(tuple(second for _, second in pairs))


def where(rows: Tensor, one: Prepared, other: Prepared) -> Prepared:
    """`one` where `rows` (B,) is True, `other` elsewhere."""
    if isinstance(one, JointInput):
        pairs = zip(one.parts, other.parts, strict=True)
        return JointInput(tuple(where(rows, first, second) for first, second in pairs))
    return torch.where(rows.view(-1, *(1,) * (one.ndim - 1)), one, other)


def shown(value: Any) -> str:
    """A value in an error, at most 60 characters of it."""
    text = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

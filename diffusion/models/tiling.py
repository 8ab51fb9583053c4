"""How is an image coded that is larger than memory? In overlapping tiles that share their norms' statistics.

Two things make tiles disagree where they meet. Convolutions see padding instead of the neighbour: a strip as wide as
they reach counts for nothing, and between the strips tiles are blended. And group norms would measure each tile by
itself: they are fixed to what a survey of small crops from all over the image says, the same for all tiles.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Span = tuple[int, int]
Place = tuple[nn.Module, str]  # a module and the name of its child
Weights = tuple[Tensor, Tensor]  # of the rows of a survey's crops (rows, height), and of the columns (columns, width)


@dataclass(frozen=True)
class Tiles:
    """Tiles of a grid of which one step is `unit` pixels of the input and `out_unit` of the result.

    tile: greatest length of a tile; overlap: of two neighbours; margin: how far the function to be computed looks; all
    in steps.
    """

    tile: int
    overlap: int
    margin: float = 0.0
    unit: int = 1
    out_unit: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.tile, int) and isinstance(self.overlap, int)
        if not whole or not 0 <= self.overlap < self.tile:
            raise ValueError(
                f"tile={self.tile!r}, overlap={self.overlap!r}: both are whole numbers, overlap is at least 0 and tile "
                "above it; 64 and 8 latent pixels suit Stable Diffusion's autoencoder"
            )

    def spans(self, x: Tensor) -> list[list[Span]]:
        """Start and stop in steps of the tiles of x (B, C, H, W) along H and along W."""
        return [spans(size // self.unit, self.tile, self.overlap) for size in x.shape[-2:]]

    def __call__(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`compute(x)` of x (B, C, H, W), tile by tile, blended."""
        rows, columns = self.spans(x)
        across = blend_weights(columns, self.margin, self.out_unit)
        out = None
        for (top, bottom), down in zip(rows, blend_weights(rows, self.margin, self.out_unit), strict=True):
            for (left, right), side in zip(columns, across, strict=True):
                y = compute(x[..., _pixels(top, bottom, self.unit), _pixels(left, right, self.unit)])
                if out is None:
                    out = y.new_zeros(*y.shape[:2], rows[-1][1] * self.out_unit, columns[-1][1] * self.out_unit)
                area = (..., _pixels(top, bottom, self.out_unit), _pixels(left, right, self.out_unit))
                out[area] += y * (down[:, None] * side).to(y)
        return out

    def survey(self, x: Tensor) -> tuple[Tensor, Weights]:
        """Small crops of x from edge to edge, about a tile together, (B * rows * columns, C, h, w); their weights."""
        length = max(8, math.ceil(2 * self.margin))
        starts, weights = [], []
        for size, ((start, stop), *_) in zip(x.shape[-2:], self.spans(x), strict=True):
            steps = size // self.unit
            count = max(2, (stop - start) // length) if length < steps else 1
            part = min(length, steps)
            starts.append([round(i * (steps - part) / max(1, count - 1)) * self.unit for i in range(count)])
            weights.append(survey_weights(count, part, steps))
        height, width = (part.shape[1] * self.unit for part in weights)
        crops = [x[..., top : top + height, left : left + width] for top in starts[0] for left in starts[1]]
        return torch.stack(crops, dim=1).flatten(0, 1), (weights[0].to(x.device), weights[1].to(x.device))


def survey_weights(count: int, part: int, steps: int) -> Tensor:
    """How many of the image's steps each step of `count` crops of length `part` stands for, (count, part); sum `steps`.

    The quarter of a crop next to an inner border stands for none: it sees the border, if not as far as convolutions
    reach, then most of what matters. At the image's edges that quarter stands for itself, and the rest for all between.
    """
    weights = torch.ones(count, part)
    if part == steps:
        return weights
    quarter = math.ceil(part / 4)
    weights[1:, :quarter] = 0
    weights[:-1, part - quarter :] = 0
    between = weights.clone()
    between[0, :quarter] = between[-1, part - quarter :] = 0
    between[[0, -1]] /= 2  # the trapezoidal rule
    return torch.where(between > 0, between * (steps - 2 * quarter) / between.sum(), weights)


def _pixels(start: int, stop: int, unit: int) -> slice:
    return slice(start * unit, stop * unit)


def spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Start and stop of the fewest equally long intervals, none over `tile`, that cover `size` and overlap enough."""
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    length = math.ceil((size + (count - 1) * overlap) / count)
    starts = [round(i * (size - length) / (count - 1)) for i in range(count)]
    return [(start, start + length) for start in starts]


def blend_weights(spans: list[Span], margin: float, unit: int) -> list[Tensor]:
    """What each interval counts for at each of its pixels, `unit` to a step of the intervals; the sum is 1 everywhere.

    Zero within `margin` of an inner border, then rising smoothly until the neighbour's margin begins.
    """
    raw = []
    for number, (start, stop) in enumerate(spans):
        at = start + (torch.arange((stop - start) * unit, dtype=torch.float64) + 0.5) / unit
        weight = torch.ones_like(at)
        if number:
            weight = weight * _ramp(at - start, spans[number - 1][1] - start, margin, unit)
        if number + 1 < len(spans):
            weight = weight * _ramp(stop - at, stop - spans[number + 1][0], margin, unit)
        raw.append(weight)
    total = torch.zeros(spans[-1][1] * unit, dtype=torch.float64)
    for (start, stop), weight in zip(spans, raw, strict=True):
        total[_pixels(start, stop, unit)] += weight
    parts = [total[_pixels(start, stop, unit)] for start, stop in spans]
    return [(weight / part).float() for weight, part in zip(raw, parts, strict=True)]


def _ramp(distance: Tensor, overlap: int, margin: float, unit: int) -> Tensor:
    """0 up to `margin`, 1 from `overlap - margin`, between them the smooth step 3u^2 - 2u^3."""
    if not overlap:
        return torch.ones_like(distance)
    margin = min(margin, (overlap - 1 / unit) / 2)
    u = ((distance - margin) / (overlap - 2 * margin)).clamp(0, 1)
    return u * u * (3 - 2 * u)


class SharedNorm(nn.Module):
    """A group norm that measures the first batch it meets, the survey, and applies that to all that follow.

    weights: what the rows and the columns of the survey's crops count for.
    """

    def __init__(self, norm: nn.GroupNorm, weights: Weights) -> None:
        super().__init__()
        self.norm, self.weights = norm, weights
        self.affine: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        times = 1
        if self.affine is None:
            self.affine, times = self._measure(x), len(self.weights[0]) * len(self.weights[1])
        scale, shift = (part.repeat_interleave(times, dim=0) for part in self.affine)
        return torch.addcmul(shift, x.float(), scale).to(x.dtype)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (B, C, 1, 1) of each channel, from the moments of all crops of an image together."""
        rows, columns = (
            w.repeat_interleave(n // w.shape[1], 1) for w, n in zip(self.weights, x.shape[-2:], strict=True)
        )
        counts = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1)[:, None]
        counts = counts / counts.sum()
        crops = x.float().unflatten(0, (-1, len(counts)))
        groups = (self.norm.num_groups, -1)
        mean = (crops * counts).sum(dim=(1, 3, 4)).unflatten(1, groups).mean(2, keepdim=True)
        center = mean.expand(-1, -1, x.shape[1] // groups[0]).flatten(1)[:, None, :, None, None]
        var = ((crops - center).square_().mul_(counts)).sum(dim=(1, 3, 4)).unflatten(1, groups).mean(2, keepdim=True)
        scale = self.norm.weight.float().unflatten(0, groups) * (var + self.norm.eps).rsqrt()
        shift = self.norm.bias.float().unflatten(0, groups) - mean * scale
        return scale.flatten(1)[:, :, None, None], shift.flatten(1)[:, :, None, None]


def norm_places(root: nn.Module) -> list[Place]:
    """The group norms below `root`, each as its owner and its name there."""
    children = ((owner, name, child) for owner in root.modules() for name, child in owner.named_children())
    return [(owner, name) for owner, name, child in children if isinstance(child, nn.GroupNorm)]


@contextmanager
def shared_norms(places: Iterable[Place], weights: Weights) -> Iterator[None]:
    """Replace the group norms at these places by `SharedNorm`s for a while."""
    norms = [(parent, name, getattr(parent, name)) for parent, name in places]
    try:
        for parent, name, norm in norms:
            setattr(parent, name, SharedNorm(norm, weights))
        yield
    finally:
        for parent, name, norm in norms:
            setattr(parent, name, norm)


def in_tiles(compute: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles, norms: Iterable[Place] = ()) -> Tensor:
    """`compute(x)` in tiles that share the statistics of the group norms at the places `norms`."""
    if all(len(spans) == 1 for spans in tiles.spans(x)):
        return compute(x)
    crops, weights = tiles.survey(x)
    with shared_norms(norms, weights):
        with torch.no_grad():
            compute(crops)
        return tiles(compute, x)

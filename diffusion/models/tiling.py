"""How is an image coded that is larger than memory? In overlapping tiles whose seams are blended away.

Tiles share the image evenly, so that none is a sliver, and next to an inner border a strip as wide as the reach of the
convolutions, which has seen padding instead of its neighbours, counts for nothing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Span = tuple[int, int]


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
    size = spans[-1][1]
    raw = []
    for number, (start, stop) in enumerate(spans):
        at = start + (torch.arange((stop - start) * unit, dtype=torch.float64) + 0.5) / unit
        weight = torch.ones_like(at)
        if number:
            weight = weight * _ramp(at - start, spans[number - 1][1] - start, margin, unit)
        if number + 1 < len(spans):
            weight = weight * _ramp(stop - at, stop - spans[number + 1][0], margin, unit)
        raw.append(weight)
    total = torch.zeros(size * unit, dtype=torch.float64)
    for (start, stop), weight in zip(spans, raw, strict=True):
        total[start * unit : stop * unit] += weight
    parts = [total[start * unit : stop * unit] for start, stop in spans]
    return [(weight / part).float() for weight, part in zip(raw, parts, strict=True)]


def _ramp(distance: Tensor, overlap: int, margin: float, unit: int) -> Tensor:
    """0 up to `margin`, 1 from `overlap - margin`, between them the smooth step 3u^2 - 2u^3."""
    margin = min(margin, (overlap - 1 / unit) / 2)
    u = ((distance - margin) / (overlap - 2 * margin)).clamp(0, 1) if overlap else torch.ones_like(distance)
    return u * u * (3 - 2 * u)


def in_tiles(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    margin: float = 0.0,
    unit: int = 1,
    out_unit: int = 1,
) -> Tensor:
    """`call(x)` of x (B, C, H, W) computed in tiles; one tile's memory, and the result's.

    tile, overlap, margin: in steps of a grid of which one step is `unit` pixels of x and `out_unit` of the result.
    Tiles are at most `tile` long; `margin` is how far `call` looks.
    """
    if not 0 <= overlap < tile or not isinstance(tile, int) or not isinstance(overlap, int):
        raise ValueError(
            f"tile={tile!r}, overlap={overlap!r}: tile must be a whole number of latent pixels above overlap, and "
            "overlap at least 0; 64 and 16 suit Stable Diffusion's autoencoder"
        )
    rows, columns = (spans(size // unit, tile, overlap) for size in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return call(x)
    across = [weight.to(x.device) for weight in blend_weights(columns, margin, out_unit)]
    out = None
    for (top, bottom), down in zip(rows, blend_weights(rows, margin, out_unit), strict=True):
        for (left, right), side in zip(columns, across, strict=True):
            y = call(x[..., top * unit : bottom * unit, left * unit : right * unit])
            y = y * (down.to(x.device)[:, None] * side).to(y.dtype)
            if out is None:
                out = y.new_zeros(*y.shape[:2], rows[-1][1] * out_unit, columns[-1][1] * out_unit)
            out[..., top * out_unit : bottom * out_unit, left * out_unit : right * out_unit] += y
    return out

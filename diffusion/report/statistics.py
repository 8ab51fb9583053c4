"""Which differences between runs are more than chance? Means over seeds, and differences of runs with the same seed.

The interval of a paired difference is Student's: mean +- t(0.975, n - 1) * sd / sqrt(n).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from scipy.special import stdtrit

Direction = Literal["lower", "higher"]

LOWER = r"(?:\w+_)?loss|s?fid|kid|nll|bits_per_dim|lpips|edge_distance|mse|mae|error|seconds|memory_gb|perplexity"
HIGHER = r"accuracy|psnr|ssim|is|precision|recall|density|coverage|images_per_second|codebook_usage"
_KNOWN = re.compile(rf"(?:(?P<lower>{LOWER})|(?P<higher>{HIGHER}))(?![a-z])")
CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over `n` values with their standard deviation (of a sample: n - 1), NaN where there are less than two."""

    mean: float
    sd: float
    n: int


class Paired(NamedTuple):
    """A mean of `n` differences, and half of its 95 % interval, NaN where there are less than two."""

    mean: float
    half: float
    n: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half


def direction(metric: str) -> Direction | None:
    """Say whether less or more of a metric is better; None where its name does not tell."""
    found = _KNOWN.match(metric.rpartition("/")[2])
    return None if found is None else "lower" if found["lower"] else "higher"


def mean(values: Sequence[float]) -> Mean:
    """Return mean and standard deviation; NaN for none at all."""
    n = len(values)
    if n == 0:
        return Mean(math.nan, math.nan, 0)
    middle = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1)) if n > 1 else math.nan
    return Mean(middle, sd, n)


def paired(ones: Mapping[str, float], others: Mapping[str, float]) -> Paired | None:
    """Return the mean of `ones` minus `others` over the keys (seeds) that both have; None where they share none."""
    differences = [value - others[key] for key, value in ones.items() if key in others]
    if not differences:
        return None
    middle, sd, n = mean(differences)
    return Paired(middle, float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(n) if n > 1 else math.nan, n)


def best(means: Sequence[Mean | None], better: Direction | None) -> set[int]:
    """Return the numbers of the best means, all that are equal; none where one has no rival or `better` is None."""
    finite = {number: mean.mean for number, mean in enumerate(means) if mean and math.isfinite(mean.mean)}
    if better is None or len(finite) < 2:
        return set()
    winner = (min if better == "lower" else max)(finite.values())
    winners = {number for number, value in finite.items() if value == winner}
    return winners if len(winners) < len(finite) else set()

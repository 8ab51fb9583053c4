"""Which timesteps does a sampler visit? Grids by name, by numbers, or even in noise; each falls, and ends in `final`.

Here sigma means sigma/alpha, the noise level of k-diffusion and of EDM (arXiv 2206.00364); a grid of noise levels has
fractional timesteps, found by `Schedule.time_of`.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Schedule

Grid = tuple[int | float, ...]

INTEGER_SPACINGS = ("trailing", "leading", "linspace", "quad", "ldm", "ldm_quad")
PEER_SPACINGS = ("simple", "ddim_uniform", "beta", "sgm", "lcm")
FRACTION_SPACINGS = ("normal", "sgm_uniform")
NOISE_SPACINGS = ("karras", "exponential", "polyexponential", "kl_optimal")
SEARCHED_SPACINGS = ("align_your_steps", "align_your_steps_xl")
SPACINGS = (*INTEGER_SPACINGS, *PEER_SPACINGS, *FRACTION_SPACINGS, *NOISE_SPACINGS, *SEARCHED_SPACINGS)

RHO = {"karras": 7.0, "polyexponential": 1.0}
_TAKES = {
    "offset": (*INTEGER_SPACINGS, *PEER_SPACINGS, "sections"),
    "sigma_min": FRACTION_SPACINGS + NOISE_SPACINGS,
    "sigma_max": FRACTION_SPACINGS + NOISE_SPACINGS,
    "rho": tuple(RHO),
    "discard_penultimate": SPACINGS,
}

LCM_TIMESTEPS = 50  # of the model that a latent consistency model learned from (arXiv 2310.04378)
BETA = 0.6  # both parameters of the spacing "beta" (arXiv 2407.12173)
TYPED = 0.01  # how far a noise level that was typed may lie outside the chain: 14.7 for 14.61, 0.029 for 0.0292

# arXiv 2404.14507, as published for Stable Diffusion 1 and XL: ten steps, and where the last one ends.
ALIGN_YOUR_STEPS = {
    "align_your_steps": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "align_your_steps_xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


def timesteps(
    schedule: "Schedule",
    num_steps: int | str,
    spacing: str = "trailing",
    *,
    final: int,
    offset: int = 0,
    grid: Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    discard_penultimate: bool = False,
) -> Grid:
    """Return a sampler's grid: see `Schedule.timesteps`. Whole timesteps are ints."""
    total = schedule.num_train_timesteps
    check_spacing(spacing)
    kind = "grid" if grid is not None else "sections" if isinstance(num_steps, str) else spacing
    bounds = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    _check_fields(kind, {**bounds, "offset": offset or None, "discard_penultimate": discard_penultimate or None})
    if grid is not None:
        rising = _given(total, grid, final)
    elif isinstance(num_steps, str):
        rising = _sections(total, num_steps)
    else:
        most = total - discard_penultimate
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= most:
            raise ValueError(f"num_steps must be 1..{most} (the trained timesteps), got {num_steps!r}")
        rising = _named(schedule, num_steps + discard_penultimate, spacing, **bounds)[discard_penultimate:]
    rising = [t + offset for t in rising] if offset else rising
    if rising[-1] > total - 1 or rising[0] < 0:
        raise ValueError(
            f"offset {offset} moves the {spacing} grid of {num_steps} steps to {rising[0]}..{rising[-1]}, "
            f"outside 0..{total - 1}; use a smaller offset or spacing=trailing"
        )
    # A grid whose last entry is `final` itself has nothing left to do there.
    falling = tuple(t for t in reversed(rising) if t > final)
    if not falling:
        raise ValueError(f"no timestep of the {spacing} grid of {num_steps} steps lies above final={final}")
    return (*falling, final)


def _named(
    schedule: "Schedule",
    n: int,
    spacing: str,
    sigma_min: float | None,
    sigma_max: float | None,
    rho: float | None,
) -> list[int | float]:
    """Return the n rising timesteps of a spacing."""
    if spacing in FRACTION_SPACINGS + NOISE_SPACINGS:
        high, low = _noise_range(schedule, sigma_min, sigma_max)
        return _noisy(schedule, n, spacing, high, low, rho)
    if spacing in SEARCHED_SPACINGS:
        return _searched(schedule, n, spacing)
    return _spaced(schedule.num_train_timesteps, n, spacing)


def check_spacing(spacing: str) -> None:
    """Raise ValueError for an unknown spacing, with the names near to it."""
    if spacing not in SPACINGS:
        near = difflib.get_close_matches(str(spacing), SPACINGS, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"there is no spacing {spacing!r}; {hint}spacing must be one of {', '.join(SPACINGS)}")


def _check_fields(kind: str, fields: Mapping[str, float | None]) -> None:
    """Raise ValueError for a setting that this kind of grid has no use for: it would be believed and do nothing."""
    for name, value in fields.items():
        if value is not None and kind not in _TAKES[name]:
            allowed = ", ".join(spacing for spacing in SPACINGS if spacing in _TAKES[name])
            raise ValueError(f"{name}={value} does nothing with {kind}; it belongs to spacing={allowed}")
    if fields["rho"] is not None and fields["rho"] <= 0:
        raise ValueError(f"rho must be above 0 (karras has 7), got {fields['rho']}")


def as_grid(numbers: Sequence[float]) -> Grid:
    """Return timesteps that were given as numbers. Raises ValueError unless they are, and fall."""
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise ValueError(f"grid must be a list of timesteps, such as [999,850,736], got {numbers!r}")
    if not all(isinstance(t, (int, float)) and math.isfinite(t) for t in numbers):
        raise ValueError(f"grid must be a list of timesteps, such as [999,850,736], got {list(numbers)}")
    falling = tuple(int(t) if t == int(t) else t for t in numbers)
    if not falling or any(t <= s for t, s in pairwise(falling)):
        raise ValueError(f"grid must be timesteps that fall, such as [999,850,736], got {list(numbers)}")
    return falling


def _given(total: int, numbers: Sequence[float], final: int) -> list[int | float]:
    """Return timesteps that were given as numbers, rising and without `final`, which may be there or not."""
    falling = as_grid(numbers)
    falling = falling[:-1] if falling[-1] == final else falling
    if not falling or falling[0] > total - 1 or falling[-1] < 0:
        raise ValueError(f"grid must be timesteps in 0..{total - 1}, got {list(numbers)}")
    return list(reversed(falling))


# ---------------------------------------------------------------------------------------------------------------------
# whole timesteps


def _spaced(total: int, n: int, spacing: str) -> list[int]:
    match spacing:
        case "trailing":
            # Written as numpy's arange computes it, so that ties round as in diffusers.
            stride = total - (total - total / n)
            return sorted(round(total - k * stride) - 1 for k in range(n))
        case "leading":
            return [k * (total // n) for k in range(n)]
        case "linspace":
            return [total - 1] if n == 1 else [round(k * ((total - 1) / (n - 1))) for k in range(n)]
        case "quad":
            return [max(int(q), k) for k, q in enumerate(_quadratic(total, n))]
        case "ldm":
            return sorted({min(t + 1, total - 1) for t in range(0, total, total // n)})
        case "ldm_quad":
            return sorted({min(int(q) + 1, total - 1) for q in _quadratic(total, n)})
        case "simple":
            return sorted(total - 1 - int(k * (total / n)) for k in range(n))
        case "ddim_uniform":
            return list(range(1, total, total // n)) or [0]
        case "sgm":
            return sorted(int(total - 1 - k * ((total - 1) / n)) for k in range(n))
        case "lcm":
            return _distilled(total, n)
    return sorted({round(_beta_quantile(1 - k / n) * (total - 1)) for k in range(n)})


def _distilled(total: int, n: int) -> list[int]:
    """Choose n of the LCM_TIMESTEPS that a consistency model was distilled on, as diffusers does."""
    known = min(LCM_TIMESTEPS, total)
    if n > known:
        raise ValueError(f"spacing=lcm chooses among {known} timesteps, so that num_steps must be 1..{known}, got {n}")
    return sorted(total - 1 - int(k * (known / n)) * (total // known) for k in range(n))


def _quadratic(total: int, n: int) -> list[float]:
    # DDIM appendix D.2: quadratic in the index, up to 0.8 T. Rounded as numpy's linspace, because callers truncate.
    end = math.sqrt(total * 0.8)
    roots = [k * (end / (n - 1)) for k in range(n - 1)] + [end] if n > 1 else [0.0]
    return [root * root for root in roots]


def _beta_quantile(p: float) -> float:
    """Return x with P(X <= x) = p for X ~ Beta(BETA, BETA), by bisection."""
    if p >= 0.5:  # the distribution is symmetric, and the series is good on its left half only
        return 1 - _beta_quantile(1 - p) if p > 0.5 else 0.5
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_cdf(middle) < p else (low, middle)
    return (low + high) / 2


def _beta_cdf(x: float) -> float:
    """The regularised incomplete beta function at x in [0, 1/2], by its power series (DLMF 8.17.7)."""
    term, total = 1.0, 1 / BETA
    for k in range(1, 60):
        term *= (k - BETA) / k * x
        total += term / (BETA + k)
    return x**BETA * total * math.gamma(2 * BETA) / math.gamma(BETA) ** 2


def _sections(total: int, text: str) -> list[int]:
    """Read guided-diffusion's timestep_respacing strings, its accumulated stride and banker's rounding included."""
    if text.startswith("ddim") and text[4:].isdigit():
        wanted = int(text[4:])
        stride = next((i for i in range(1, total) if len(range(0, total, i)) == wanted), None)
        if stride is None:
            raise ValueError(
                f"no integer stride visits {wanted} of {total} timesteps; drop the 'ddim' or choose another"
            )
        return list(range(0, total, stride))
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"num_steps {text!r} is not understood; give a number, 'ddim25' or sections like '10,15,20'")
    steps, start = [], 0
    for i, count in enumerate(int(part) for part in parts):
        size = total // len(parts) + (i < total % len(parts))
        if size < count:
            raise ValueError(
                f"num_steps {text!r}: section {i + 1} has {size} timesteps, which cannot give {count} steps"
            )
        stride, position = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return steps


# ---------------------------------------------------------------------------------------------------------------------
# levels of noise


def _noise_range(schedule: "Schedule", sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """Return the highest and lowest sigma of a grid; at zero terminal SNR the highest is infinite."""
    last = schedule.num_train_timesteps - 1
    ends = schedule.noise_to_signal(last), schedule.noise_to_signal(0)
    high = ends[0] if sigma_max is None else sigma_max
    low = ends[1] if sigma_min is None else sigma_min
    if not ends[1] * (1 - TYPED) <= low <= high <= ends[0] * (1 + TYPED):
        raise ValueError(
            f"sigma_min={low:g} and sigma_max={high:g} must lie in {ends[1]:.4g} <= sigma_min <= sigma_max <= "
            f"{ends[0]:.4g}, the noise levels (sigma/alpha) of this schedule"
        )
    return min(high, ends[0]), max(low, ends[1])


def _noisy(schedule: "Schedule", n: int, spacing: str, high: float, low: float, rho: float | None) -> list[int | float]:
    """Return n rising timesteps between two levels of noise."""
    first, last = schedule.time_of(high), schedule.time_of(low)
    if spacing in FRACTION_SPACINGS:
        parts = n if spacing == "sgm_uniform" else max(n - 1, 1)
        return _rising(first + k * (last - first) / parts for k in range(n))
    if math.isinf(high):  # zero terminal SNR: the start is pure noise, the others share what is finite
        high = schedule.noise_to_signal(schedule.num_train_timesteps - 2)
    ramp = _RAMPS[spacing]
    inner = (schedule.time_of(ramp(k / (n - 1), high, low, rho or RHO.get(spacing, 1.0))) for k in range(1, n))
    return _rising((first, *inner))


def _karras(u: float, high: float, low: float, rho: float) -> float:
    """EDM eq. 5."""
    return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def _polyexponential(u: float, high: float, low: float, rho: float) -> float:
    """k-diffusion's: even in log sigma at rho = 1, more of the steps at low noise above it."""
    return low * (high / low) ** ((1 - u) ** rho)


def _kl_optimal(u: float, high: float, low: float, rho: float) -> float:
    """arXiv 2404.14507, theorem 3.1: even in the angle of noise to signal."""
    return math.tan((1 - u) * math.atan(high) + u * math.atan(low))


_RAMPS: dict[str, Callable[[float, float, float, float], float]] = {
    "karras": _karras,
    "exponential": _polyexponential,
    "polyexponential": _polyexponential,
    "kl_optimal": _kl_optimal,
}


def _searched(schedule: "Schedule", n: int, spacing: str) -> list[int | float]:
    """Return a published grid, interpolated in log sigma to n steps as its authors do."""
    table = ALIGN_YOUR_STEPS[spacing]
    if schedule.num_train_timesteps != table[0] + 1:
        raise ValueError(
            f"spacing={spacing} was found for {table[0] + 1} trained timesteps, this model has "
            f"{schedule.num_train_timesteps}; use spacing=karras"
        )
    start = table[0] - 1 if schedule.zero_terminal_snr else table[0]  # pure noise has no logarithm
    logs = [math.log(schedule.noise_to_signal(t)) for t in (start, *table[1:])]
    times = [table[0]]
    for k in range(1, n):
        i, weight = divmod(k * (len(logs) - 1) / n, 1)
        times.append(schedule.time_of(math.exp(logs[int(i)] * (1 - weight) + logs[int(i) + 1] * weight)))
    return _rising(times)


def _rising(times) -> list[int | float]:
    """Sort timesteps, one that comes twice once: a move of no length would do nothing."""
    return sorted({int(t) if t == int(t) else t for t in times})

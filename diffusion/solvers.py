"""What to believe about an interval t -> s, given the network's answers so far. The one file a new sampler touches.

A solver's `belief` is a function of the denoiser, the newest state and the history (newest first, at most four
answers); it returns a Prediction and keeps nothing between calls. How to move, given the belief, is
`process.transition`. Below, rho is sigma/alpha, the "sigma" of k-diffusion, in which the flow is d(x/alpha) = eps drho.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Denoiser
from .guidance import Levels, is_noise
from .process import Prediction, fresh_variance, mix, target, transition
from .schedule import CLEAN, Level

History = tuple[tuple[float, Prediction], ...]
TimeOf = Callable[[float], float]  # the timestep of a value of sigma/alpha: Schedule.time_of
Draw = Callable[..., Tensor]  # draw(x, here, there): noise for a move between two levels, s_noise included


@dataclass(frozen=True)
class Solver:
    """One way to believe, and what is to know about it before it is chosen.

    `belief(denoise, level, x, t, s, history)` may ask by keyword for what the step knows: `eta`, `time_of` (the
    timestep of a value of sigma/alpha), `draw`, `parameterization` (of the network). `law` is what eta means to
    `process.transition`.
    """

    name: str
    belief: Callable[..., Prediction]
    order: int | None = None  # of convergence, without noise; None: not known
    evaluations: int = 1  # of the network, a step
    text: str = ""
    orders: Mapping[int, int] = field(default_factory=dict, hash=False)  # to choose from, and how they converge
    kinds: Mapping[str, int] = field(default_factory=dict, hash=False)  # likewise
    takes_eta: bool = True
    takes_churn: bool = True
    eta: float = 0.0  # unless told otherwise
    law: str = "ddim"

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise unless told otherwise."""
        return self.eta > 0

    def check_noise(self, eta: float, s_noise: float = 1.0, s_churn: float = 0.0) -> None:
        """Raise ValueError for noise that this solver has no use for."""
        if not self.takes_eta and eta != self.eta:
            able = ", ".join(name for name, one in SOLVERS.items() if one.takes_eta)
            raise ValueError(f"solver {self.name} takes no eta, got {eta}; leave it out, or use one of {able}")
        if self.takes_eta and not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1] (0 is DDIM, 1 is DDPM), got {eta}")
        if s_churn and not self.takes_churn:
            able = ", ".join(name for name, one in SOLVERS.items() if one.takes_churn)
            raise ValueError(f"solver {self.name} takes no s_churn, got {s_churn}; leave it out, or use one of {able}")
        if not (s_noise >= 0 and s_churn >= 0):
            raise ValueError(f"s_noise and s_churn must be at least 0, got {s_noise} and {s_churn}")

    def having(self, order: int | None = None, kind: str | None = None, **options) -> "Solver":
        """Return the same solver at another of its orders, of another kind, or with other options of its belief."""
        for name, value, allowed in (("order", order, self.orders), ("kind", kind, self.kinds)):
            if value is not None and value not in allowed:
                choices = f"must be one of {', '.join(map(str, allowed))}" if allowed else "cannot be chosen"
                raise ValueError(f"the {name} of solver {self.name} {choices}, got {value}")
        told = options | {k: v for k, v in (("order", order), ("kind", kind)) if v is not None}
        converges = self.orders.get(order) or self.kinds.get(kind) or self.order
        return replace(self, belief=partial(self.belief, **told), order=converges)

    def __call__(
        self, denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, **known
    ) -> Prediction:
        return self.belief(
            denoise, level, x, t, s, history, **{k: known[k] for k in _wanted(self.belief) if k in known}
        )


@lru_cache(maxsize=128)
def _wanted(belief: Callable) -> tuple[str, ...]:
    """Which of the things that a step knows this function asks for by keyword."""
    kinds = inspect.signature(belief).parameters.values()
    return tuple(p.name for p in kinds if p.kind == p.KEYWORD_ONLY)


def find_solver(solver: "str | Solver | Callable[..., Prediction]") -> Solver:
    """Return the solver of this name, or wrap a function of one's own. Unknown names are a ValueError."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        return _BY_BELIEF.get(solver) or Solver(getattr(solver, "__name__", "function"), solver)
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver, SOLVERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"there is no solver {solver!r}; {hint}solver must be one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]


# -- the points of an interval ---------------------------------------------------------------------------------------


def _log_rho(at: Level) -> float:
    """log(sigma/alpha), the coordinate of time in which DPM-Solver works, with its sign changed."""
    if at.alpha == 0 or at.sigma == 0:
        return math.inf if at.alpha == 0 else -math.inf
    return math.log(at.sigma / at.alpha)


def _bare(level: Levels, t: float, s: float) -> bool:
    """Say whether one end has no noise or no signal: rho is 0 or infinite there, and the last answer all to go by."""
    return s == CLEAN or level(t).alpha == 0


def _far(level: Levels, t: float, s: float) -> bool:
    """Say the same of an end that has hardly any signal: eps changes little there, but rho falls by thousands."""
    return s == CLEAN or is_noise(level(t))


def _points(level: Levels, history: History, order: int) -> list[tuple[float, Prediction]]:
    """The newest answers, at most `order`, by log rho. One at zero SNR is infinitely far away: its weight is 0."""
    points = [(_log_rho(level(t)), p) for t, p in history[:order]]
    return [(u, p) for u, p in points if u < math.inf]


def _ask(denoise: Denoiser, level: Levels, p: Prediction, t: float, u: float) -> Prediction:
    """What the network says at timestep u to the x that p carries there from t."""
    return denoise(transition(p, level(t), level(u))[0], u)


# -- one step ----------------------------------------------------------------------------------------------------------


def euler(denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History) -> Prediction:
    """Believe the last answer: DDIM with eta = 0, DDPM with eta = 1. First order."""
    return history[0][1]


def heun(denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History) -> Prediction:
    """The mean of eps at both ends: EDM (2206.00364) algorithm 1."""
    p = history[0][1]
    if _far(level, t, s):
        return p
    q = _ask(denoise, level, p, t, s)
    return Prediction.from_eps(x, (p.eps + q.eps) / 2, level(t), p.var_frac)


def _middle(denoise: Denoiser, level: Levels, p: Prediction, t: float, s: float, eta: float, time_of: TimeOf):
    """The answer halfway in log rho to where the flow takes x, which is below s if noise is to be added there."""
    here, there = level(t), level(s)
    down = math.sqrt(max(there.sigma**2 - fresh_variance(here, there, eta), 0.0)) / there.alpha
    return _ask(denoise, level, p, t, time_of(math.sqrt(down * here.sigma / here.alpha))) if down > 0 else p


def dpm2(
    denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, *, eta: float, time_of: TimeOf
) -> Prediction:
    """The eps of the middle: DPM-Solver-2 (2206.00927) and, with eta, k-diffusion's DPM2 ancestral."""
    p = history[0][1]
    if _far(level, t, s):
        return p
    return Prediction.from_eps(x, _middle(denoise, level, p, t, s, eta, time_of).eps, level(t), p.var_frac)


def dpmpp_2s(
    denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, *, eta: float, time_of: TimeOf
) -> Prediction:
    """The x0 of the middle: DPM-Solver++(2S) (2211.01095) and, with eta, its ancestral form."""
    p = history[0][1]
    if _bare(level, t, s):
        return p
    return Prediction.from_x0(x, _middle(denoise, level, p, t, s, eta, time_of).x0, level(t), p.var_frac)


def dpm3(
    denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, *, time_of: TimeOf
) -> Prediction:
    """DPM-Solver-3 (2206.00927, algorithm 2 with r1 = 1/3, r2 = 2/3): what k-diffusion's dpm_fast is made of."""
    p, here = history[0][1], level(t)
    if _far(level, t, s):
        return p
    first, last = _log_rho(here), _log_rho(level(s))
    third, two_thirds = (time_of(math.exp(first + r * (last - first))) for r in (1 / 3, 2 / 3))
    eps = p.eps + 2 * _linear(2 / 3 * (first - last)) * (_ask(denoise, level, p, t, third).eps - p.eps)
    q = _ask(denoise, level, Prediction.from_eps(x, eps, here), t, two_thirds)
    return Prediction.from_eps(x, p.eps + 1.5 * _linear(first - last) * (q.eps - p.eps), here, p.var_frac)


def _linear(h: float) -> float:
    """The mean of u in [0, 1] weighed by e^(-h u)."""
    return 1 / h - 1 / math.expm1(h)


def _square(h: float) -> float:
    """The mean of u^2 in [0, 1] weighed by e^(-h u)."""
    return (2 * _linear(h) - h / math.expm1(h)) / h


def dpmpp_sde(
    denoise: Denoiser,
    level: Levels,
    x: Tensor,
    t: float,
    s: float,
    history: History,
    *,
    eta: float,
    time_of: TimeOf,
    draw: Draw,
    r: float = 0.5,
) -> Prediction:
    """k-diffusion's DPM-Solver++ SDE: x0 at the share r of the way in log rho, reached with noise as well."""
    p, here = history[0][1], level(t)
    if _bare(level, t, s):
        return p
    u = time_of(math.exp((1 - r) * _log_rho(here) + r * _log_rho(level(s))))
    mean, var = transition(p, here, level(u), eta)
    q = denoise(mean + var**0.5 * draw(x, here, level(u)) if var else mean, u)
    return Prediction.from_x0(x, torch.lerp(p.x0, q.x0, 0.5 / r), here, p.var_frac)


def lcm(
    denoise: Denoiser,
    level: Levels,
    x: Tensor,
    t: float,
    s: float,
    history: History,
    *,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
) -> Prediction:
    """The x0 of a latent consistency model, with its skip connection (2310.04378, eq. 9); all noise is drawn anew."""
    p, scaled = history[0][1], timestep_scaling * max(t, 0)
    norm = math.hypot(scaled, sigma_data)
    return Prediction.from_x0(x, mix(scaled / norm, p.x0, (sigma_data / norm) ** 2, x), level(t), p.var_frac)


# -- many steps --------------------------------------------------------------------------------------------------------

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: Denoiser,
    level: Levels,
    x: Tensor,
    t: float,
    s: float,
    history: History,
    *,
    order: int = 4,
    kind: str = "eps",
    parameterization: str = "eps",
) -> Prediction:
    """Adams-Bashforth for even steps on eps (PNDM, 2202.09778), as in latent-diffusion: the first step is Heun's.

    `kind`: "eps", or "own": what the network answers itself, as diffusers mixes, which differs where that is v.
    """
    p, answers = history[0][1], history
    if len(history) == 1 and order > 1:
        if _far(level, t, s):
            return p
        answers, weights = ((s, _ask(denoise, level, p, t, s)), *history), (1 / 2, 1 / 2)
    elif level(t).alpha == 0:
        return p
    else:
        weights = ADAMS_BASHFORTH[min(order, len(history)) - 1]
    mixed = parameterization if kind == "own" and parameterization in _READ else "eps"
    answer = sum(w * target(mixed, q.x0, q.eps, level(k)) for w, (k, q) in zip(weights, answers, strict=False))
    return _READ[mixed](x, answer, level(t), p.var_frac)


_READ = {"eps": Prediction.from_eps, "x0": Prediction.from_x0, "v": Prediction.from_v}


def pndm(denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History) -> Prediction:
    """PLMS whose first three steps are Runge-Kutta's of fourth order (PNDM, 2202.09778, algorithm 2)."""
    p = history[0][1]
    if len(history) == 4:
        return plms(denoise, level, x, t, s, history)
    if _far(level, t, s):
        return p
    # Trained timesteps have a trained one in the middle, rounded as in diffusers.
    middle = s + (t - s) // 2 if isinstance(t, int) and isinstance(s, int) else (t + s) / 2
    a = _ask(denoise, level, p, t, middle).eps
    b = _ask(denoise, level, Prediction.from_eps(x, a, level(t)), t, middle).eps
    c = _ask(denoise, level, Prediction.from_eps(x, b, level(t)), t, s).eps
    return Prediction.from_eps(x, (p.eps + 2 * a + 2 * b + c) / 6, level(t), p.var_frac)


def lms(
    denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, *, order: int = 4
) -> Prediction:
    """Adams-Bashforth for any steps: eps is a polynomial in rho (k-diffusion's LMS)."""
    points = [(math.exp(u), p.eps) for u, p in _points(level, history, order)]
    if len(points) < 2:
        return history[0][1]
    last = level(s).sigma / level(s).alpha
    return Prediction.from_eps(x, _mean(points, points[0][0], last, lambda u: 1.0), level(t), history[0][1].var_frac)


def deis(
    denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, *, order: int = 3
) -> Prediction:
    """eps is a polynomial in log rho: DEIS (2204.13902), its "rho AB" in the form that diffusers runs."""
    points = [(u, p.eps) for u, p in _points(level, history, order)]
    if s == CLEAN or len(points) < 2:
        return history[0][1]
    eps = _mean(points, points[0][0], _log_rho(level(s)), math.exp)
    return Prediction.from_eps(x, eps, level(t), history[0][1].var_frac)


def _mean(points: list[tuple[float, Tensor]], first: float, last: float, density: Callable[[float], float]) -> Tensor:
    """The mean from u = first to last, weighed by density(u), of the polynomial through these points (u, value)."""
    nodes, weights = _gauss_legendre(16)
    at = [first + (last - first) * (node + 1) / 2 for node in nodes]
    mass = [weight * density(u) for u, weight in zip(at, weights, strict=True)]
    total = 0.0
    for k, (mine, value) in enumerate(points):
        others = [u for i, (u, _) in enumerate(points) if i != k]
        shape = [math.prod((u - other) / (mine - other) for other in others) for u in at]
        total = total + value * (sum(m * y for m, y in zip(mass, shape, strict=True)) / sum(mass))
    return total


@cache
def _gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    """Nodes in [-1, 1] and weights: exact for polynomials of degree 2n - 1 (Golub and Welsch, 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(off + off.T)
    return nodes.tolist(), (2 * vectors[0] ** 2).tolist()


def dpmpp_multistep(
    denoise: Denoiser,
    level: Levels,
    x: Tensor,
    t: float,
    s: float,
    history: History,
    *,
    eta: float,
    order: int = 2,
    kind: str = "midpoint",
) -> Prediction:
    """x0 extrapolated in log rho: DPM-Solver++(2M) and (3M), and with eta their SDE forms (2211.01095).

    `kind`: "midpoint" is its second order as published, "heun" the exponential's own weights. The third order takes
    those, but half the weight of the curvature, as k-diffusion and diffusers do; "exact" takes all of it.
    """
    p = history[0][1]
    points = _points(level, history, order)
    if s == CLEAN or len(points) < 2:
        return p
    h = points[0][0] - _log_rho(level(s))
    slopes = [(a.x0 - b.x0) * (h / (v - u)) for (u, a), (v, b) in pairwise(points)]
    linear = 0.5 if kind == "midpoint" else _linear(-h * (1 + eta))
    if len(points) == 2:
        return Prediction.from_x0(x, p.x0 + linear * slopes[0], level(t), p.var_frac)
    (u, _), (v, _), (w, _) = points
    curve = (slopes[0] - slopes[1]) * (h / (w - u))
    square = (1.0 if kind == "exact" else 0.5) * _square(-h * (1 + eta))
    x0 = p.x0 + linear * (slopes[0] + curve * ((v - u) / h)) + square * curve
    return Prediction.from_x0(x, x0, level(t), p.var_frac)


def unipc(
    denoise: Denoiser,
    level: Levels,
    x: Tensor,
    t: float,
    s: float,
    history: History,
    *,
    order: int = 2,
    kind: str = "bh2",
) -> Prediction:
    """UniPC (2302.04867) on x0: correct x with the answer at the end of the last step, then predict the next.

    The corrected and the predicted x differ by what was believed about x0 alone, so no earlier x is kept. `kind` is
    the paper's B(h): "bh1" is h, "bh2" is e^h - 1.
    """
    p, here = history[0][1], level(t)
    older = [(_log_rho(level(k)), q.x0) for k, q in history[1:]][:order]
    if older:
        now = _log_rho(here)
        change = _unified(older, now, kind, end=p.x0) - _unified(older, now, kind)
        x = x - here.alpha * math.expm1(now - older[0][0]) * change
    if _bare(level, t, s):
        return Prediction.from_x0(x, p.x0, here, p.var_frac)
    newest = [(_log_rho(here), p.x0), *older][:order]
    return Prediction.from_x0(x, _unified(newest, _log_rho(level(s)), kind), here, p.var_frac)


def _unified(points: list[tuple[float, Tensor]], last: float, kind: str, end: Tensor | None = None) -> Tensor:
    """The x0 that UniPC believes from the first of the points (log rho, x0) to log rho = `last`; `end` corrects it."""
    (first, x0), *older = points
    h = first - last
    ratios = [(first - u) / h for u, _ in older if u < math.inf]
    slopes = [(value - x0) / r for r, (_, value) in zip(ratios, older, strict=False)]
    if end is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, end - x0]
    scale = h / -math.expm1(-h) if kind == "bh1" else 1.0
    if not slopes or scale == math.inf:
        return x0
    # A single weight is 1/2 by convention; beside a point that is infinitely far away it follows from h as others do.
    single = len(older) + (end is not None) == 1
    weights = [0.5] if single else _unipc_weights(ratios, h, scale)
    return x0 + scale * sum(w * slope for w, slope in zip(weights, slopes, strict=True))


def _unipc_weights(ratios: list[float], h: float, scale: float) -> list[float]:
    """Solve UniPC's conditions of order (2302.04867, eq. 5 and theorem 3.1)."""
    wanted, phi = [], math.expm1(-h) / -h - 1
    for k in range(1, len(ratios) + 1):
        wanted.append(phi * math.factorial(k) / (math.expm1(-h) * scale))
        phi = phi / -h - 1 / math.factorial(k + 1)
    rows = [[r**k for r in ratios] for k in range(len(ratios))]
    return torch.linalg.solve(*(torch.tensor(part, dtype=torch.float64) for part in (rows, wanted))).tolist()


# -- all of them, by name ----------------------------------------------------------------------------------------------

_ODE = {"takes_eta": False, "takes_churn": False}
_SDE = {"takes_churn": False, "eta": 1.0}
_SECOND, _THIRD = {"midpoint": 2, "heun": 2}, {"heun": 2, "exact": 3}
_PLMS = {1: 1, 2: 2, 3: 2, 4: 2}  # of second order whichever it mixes, on grids that are not even in sigma/alpha
_2M = partial(dpmpp_multistep, order=2)
_3M = partial(dpmpp_multistep, order=3, kind="heun")
_BUILT_IN = (
    Solver("euler", euler, 1, 1, "the last answer: DDIM; with eta=1 DDPM and Euler ancestral"),
    Solver("heun", heun, 2, 2, "mean of the eps at both ends", takes_eta=False),
    Solver("dpm2", dpm2, 2, 2, "eps of the middle: DPM-Solver-2; with eta=1 DPM2 ancestral"),
    Solver("dpm3", dpm3, 3, 3, "DPM-Solver-3: what DPM fast is made of", takes_eta=False),
    Solver("dpmpp_2s", dpmpp_2s, 2, 2, "x0 of the middle: DPM-Solver++(2S); with eta=1 its ancestral form"),
    Solver("lms", lms, 4, 1, "eps a polynomial in sigma/alpha: K-LMS", {1: 1, 2: 2, 3: 3, 4: 4}, **_ODE),
    Solver("plms", plms, 2, 1, "eps by Adams-Bashforth: Stable Diffusion's", _PLMS, {"eps": 2, "own": 2}, **_ODE),
    Solver("pndm", pndm, 2, 1, "PLMS after three Runge-Kutta steps (of four evaluations)", **_ODE),
    Solver("deis", deis, 3, 1, "eps a polynomial in log(sigma/alpha)", {1: 1, 2: 2, 3: 3, 4: 4}, **_ODE),
    Solver("dpmpp_2m", dpmpp_multistep, 2, 1, "x0 extrapolated: DPM-Solver++(2M)", kinds=_SECOND, **_ODE),
    Solver("dpmpp_3m", _3M, 2, 1, "x0 extrapolated from three answers: DPM-Solver++(3M)", kinds=_THIRD, **_ODE),
    Solver("unipc", unipc, 3, 1, "x0 extrapolated, then corrected", {1: 2, 2: 3, 3: 4}, {"bh1": 3, "bh2": 3}, **_ODE),
    Solver("dpmpp_sde", dpmpp_sde, 2, 2, "x0 of the middle, with noise: DPM-Solver++ SDE", **_SDE),
    Solver("dpmpp_2m_sde", _2M, 2, 1, "DPM-Solver++(2M) with noise", kinds=_SECOND, law="sde", **_SDE),
    Solver("dpmpp_3m_sde", partial(_3M), 2, 1, "DPM-Solver++(3M) with noise", kinds=_THIRD, law="sde", **_SDE),
    Solver("lcm", lcm, None, 1, "x0 of a consistency model, all noise drawn anew", **_ODE, eta=math.inf, law="sde"),
)
SOLVERS: Mapping[str, Solver] = {solver.name: solver for solver in _BUILT_IN}
_BY_BELIEF = {solver.belief: solver for solver in _BUILT_IN}

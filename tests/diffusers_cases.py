"""How diffusers' schedulers walk, told in our terms: which levels, what the network is told there, which belief.

Its timesteps and sigmas can differ from each other; here a timestep is always the one that has the sigma.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from scipy.stats import beta
from torch import Tensor

from diffusion.process import Prediction, target, transition
from diffusion.schedule import CLEAN, Level, Schedule, cosine, power, zero_terminal_snr
from diffusion.solvers import Solver, dpmpp_multistep, find_solver, unipc

KARRAS_LIKE = ("Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral", "LMS")
DPM_LIKE = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep")
TWO_CALLS = ("Heun", "KDPM2", "KDPM2Ancestral")  # a step; the last has one
FEW_STEPS = 15  # below, diffusers lowers the order at the end
SMALLEST = 2.0**-24  # alphas_cumprod in place of zero
SETTINGS = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("timestep_spacing", "steps_offset", "prediction_type", "final_sigmas_type", "solver_order", "solver_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "interpolation_type"),
    *("algorithm_type", "lower_order_final", "euler_at_final", "predict_x0", "disable_corrector", "set_alpha_to_one"),
    *("clip_sample", "clip_sample_range", "thresholding", "sample_max_value", "dynamic_thresholding_ratio"),
    *("skip_prk_steps", "timestep_type", "sigma_min", "sigma_max", "original_inference_steps", "timestep_scaling"),
}


def peer_schedule(init: Mapping) -> Schedule:
    """Return the schedule of a scheduler's settings, which must all be known."""
    if unknown := set(init) - SETTINGS - {"variance_type"}:
        raise ValueError(f"no counterpart for {', '.join(sorted(unknown))}")
    total = init.get("num_train_timesteps", 1000)
    ends = {"beta_start": init.get("beta_start", 1e-4), "beta_end": init.get("beta_end", 0.02)}
    match init.get("beta_schedule", "linear"):
        case _ if init.get("trained_betas") is not None:
            schedule = Schedule(init["trained_betas"])
        case "linear":
            schedule = power(total, **ends)
        case "scaled_linear":
            schedule = power(total, **ends, power=2.0)
        case "squaredcos_cap_v2":
            schedule = cosine(total)
        case other:
            raise ValueError(f"no schedule for {other}")
    return zero_terminal_snr(schedule) if init.get("rescale_betas_zero_snr") else schedule


def almost_zero_snr(schedule: Schedule) -> Schedule:
    """Put back the little signal that its sigma schedulers leave."""
    return Schedule([*schedule.betas[:-1].tolist(), 1 - SMALLEST / schedule.alphas_cumprod[-2].item()])


@dataclass
class Walk:
    """Keys are our timesteps, the last one included; call `after[k]` of the peer returns what our move k does."""

    keys: Sequence[float]
    level: Callable[[float], Level]
    time_of: Callable[[float], float]
    solver: Solver
    after: Sequence[int]
    told: Mapping[float, float] = field(default_factory=dict)  # what the network is told, where it is not the key
    eta: float = 0.0
    start: float = 1.0  # the first x is noise times this
    even_in_sigma: bool = False  # the peer's samples are x/alpha
    churn: Mapping = field(default_factory=dict)
    intervals: Sequence[tuple[float, float]] = ()

    @property
    def moves(self) -> list[tuple[float, float]]:
        return list(self.intervals or zip(self.keys[:-1], self.keys[1:], strict=True))


def walk_of(name: str, init: Mapping, steps: int, step_kwargs: Mapping) -> Walk:
    """Return the walk of the scheduler `name`, less its "Scheduler" and "Discrete"."""
    schedule = peer_schedule(init)
    if name == "PNDM":
        return pndm_walk(init, schedule, steps)
    if name == "LCM":
        return lcm_walk(init, schedule, steps)
    if schedule.zero_terminal_snr:
        schedule = almost_zero_snr(schedule)
    told, sigmas = noise_grid(name, init, schedule, steps)
    level, time_of = schedule.level, schedule.time_of
    if init.get("timestep_type") == "continuous":
        level, time_of = log_level, log_time_of
        told = [0.25 * math.log(sigma) for sigma in sigmas[:-1]]
    keys = [time_of(sigma) if sigma else CLEAN for sigma in sigmas]
    after = range(steps)
    if name in TWO_CALLS:
        after = [*range(1, 2 * steps - 2, 2), 2 * steps - 2]
    walk = Walk(keys, level, time_of, find_solver("euler"), after, dict(zip(keys, told, strict=False)))
    if name in KARRAS_LIKE:
        high = sigmas[0]
        spread = init.get("timestep_spacing", "linspace") == "leading"
        walk = replace(walk, start=math.hypot(high, 1) if spread else high, even_in_sigma=True, churn=step_kwargs)
    if name == "DPMSolverSinglestep":
        return single_walk(walk, init, steps)
    solver, eta = belief_of(name, init, steps, step_kwargs, walk)
    return replace(walk, solver=solver, eta=eta, churn=step_kwargs if name == "Euler" else {})


# -- levels --------------------------------------------------------------------------------------------------------


def log_level(key: float) -> Level:
    """Levels by log sigma, for a peer without a chain; 100 keeps them above CLEAN."""
    sigma = 0.0 if key == CLEAN else math.exp(key - 100)
    return Level(1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1))


def log_time_of(sigma: float) -> float:
    return math.log(sigma) + 100


def noise_grid(name: str, init: Mapping, schedule: Schedule, steps: int) -> tuple[list[float], list[float]]:
    """Return what the network is told at each step, and the sigma of each and of the end."""
    dpm = name in DPM_LIKE
    spacing = init.get("timestep_spacing", "linspace") if name != "DPMSolverSinglestep" else "linspace"
    offset = init.get("steps_offset", 0) if spacing == "leading" else 0
    ours = "normal" if spacing == "linspace" and not dpm else spacing
    discard = dpm and spacing != "trailing"
    told = schedule.timesteps(steps, ours, offset=offset, discard_penultimate=discard)[:-1]
    table = [schedule.noise_to_signal(t) for t in range(schedule.num_train_timesteps)]
    sigmas = np.interp(told, range(len(table)), table).tolist()  # the peer is linear in sigma, not in its logarithm
    ends = (table[0], table[-1]) if dpm else (sigmas[-1], sigmas[0])
    low, high = (init.get(f"sigma_{end}") or value for end, value in zip(("min", "max"), ends, strict=True))
    last = table[0] if final_sigma(name, init) == "sigma_min" else 0.0
    if init.get("interpolation_type") == "log_linear":
        return list(told), np.geomspace(table[-1], table[0], steps + 1).tolist()
    wanted = [kind for kind in ("karras", "exponential", "beta") if init.get(f"use_{kind}_sigmas")]
    wanted += ["lu"] if init.get("use_lu_lambdas") else []
    if not wanted:
        return list(told), [*sigmas, last]
    sigmas = bent(wanted[0], schedule, steps, low, high, continuous=init.get("timestep_type") == "continuous")
    told = [schedule.time_of(sigma) for sigma in sigmas]
    if dpm or (name.startswith("KDPM2") and wanted[0] == "karras"):  # rounded in two of the cases, else cut off
        told = [round(t) if wanted[0] in ("karras", "lu") else int(t) for t in told]
        if dpm and final_sigma(name, init) == "sigma_min" and not name.startswith("DPM"):
            last = sigmas[-1]
    return told, [*sigmas, last]


def final_sigma(name: str, init: Mapping) -> str:
    return "sigma_min" if name.startswith("DEIS") else init.get("final_sigmas_type", "zero")


def bent(kind: str, schedule: Schedule, steps: int, low: float, high: float, *, continuous: bool) -> list[float]:
    """Return the sigmas of a spacing by noise, from ours where the chain has them."""
    if kind == "beta":  # ComfyUI and the paper take quantiles of timesteps, diffusers of sigmas
        return (low + beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (high - low)).tolist()
    if continuous:
        return (np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7).tolist()
    ours = {"lu": "exponential"}.get(kind, kind)
    return [schedule.noise_to_signal(t) for t in schedule.timesteps(steps, ours, sigma_min=low, sigma_max=high)[:-1]]


# -- beliefs -------------------------------------------------------------------------------------------------------


def belief_of(name: str, init: Mapping, steps: int, step_kwargs: Mapping, walk: Walk) -> tuple[Solver, float]:
    """Return the solver, and its eta."""
    order = init.get("solver_order", 2)
    match name:
        case "Euler":
            return find_solver("euler"), 0.0
        case "EulerAncestral":
            return find_solver("euler"), 1.0
        case "Heun":
            return find_solver("heun"), 0.0
        case "KDPM2" | "KDPM2Ancestral":
            return find_solver("dpm2"), float(name.endswith("Ancestral"))
        case "LMS":
            return find_solver("lms").having(order=step_kwargs.get("order", 4)), 0.0
        case "DEISMultistep":
            orders = orders_at(init, steps, order, walk, zero=False)
            return limited(find_solver("deis").having(order=order), orders), 0.0
        case "UniPCMultistep":
            return unipc_belief(init, steps, order, walk), 0.0
        case "DPMSolverMultistep":
            return dpm_belief(init, steps, order, walk)
    raise ValueError(f"no counterpart for {name}")


def orders_at(init: Mapping, steps: int, order: int, walk: Walk, *, zero: bool) -> dict[float, int]:
    """Return the order of each step: diffusers lowers it at the start, and at the end for few steps."""
    few = init.get("lower_order_final", True) and steps < FEW_STEPS
    orders = [min(order, k + 1) for k in range(steps)]
    if few and steps > 1:
        orders[-2] = min(orders[-2], 2)
    if few or zero or init.get("euler_at_final"):
        orders[-1] = 1
    return dict(zip(walk.keys, orders, strict=False))


def limited(solver: Solver, orders: Mapping[float, int]) -> Solver:
    """Return the solver with so many answers to go by at each step."""

    def belief(denoise, level, x, t, s, history, *, eta, time_of, draw):
        known = {"eta": eta, "time_of": time_of, "draw": draw}
        return solver(denoise, level, x, t, s, history[: orders[t]], **known)

    return replace(solver, belief=belief)


def swapped(solver: Solver) -> Solver:
    """Return the solver that believes about eps what this one believes about x0: x = alpha x0 + sigma eps is even."""

    def belief(denoise, level, x, t, s, history, *, eta, time_of, draw):
        def other(k):
            return Level(*reversed(level(k)))

        turned = tuple((k, Prediction(p.eps, p.x0)) for k, p in history)
        p = solver(denoise, other, x, t, s, turned, eta=eta, time_of=time_of, draw=draw)
        return Prediction(p.eps, p.x0)

    return replace(solver, belief=belief)


def dpm_belief(init: Mapping, steps: int, order: int, walk: Walk) -> tuple[Solver, float]:
    orders = orders_at(init, steps, order, walk, zero=final_sigma("DPM", init) == "zero")
    kind = init.get("solver_type", "midpoint")
    stochastic = init.get("algorithm_type", "dpmsolver++").startswith("sde-")

    def belief(denoise, level, x, t, s, history, *, eta):
        # Its third order knows one kind only, and the formula of eps has the signs of h turned.
        chosen = "heun" if orders[t] == 3 else kind
        return dpmpp_multistep(denoise, level, x, t, s, history[: orders[t]], eta=eta, order=orders[t], kind=chosen)

    solver = Solver("dpm", belief, law="sde" if stochastic else "ddim")
    match init.get("algorithm_type", "dpmsolver++"):
        case "dpmsolver++" | "sde-dpmsolver++":
            return solver, float(stochastic)
        case "dpmsolver":
            return swapped(solver), 0.0
    raise ValueError(f"no counterpart for algorithm_type={init['algorithm_type']}")


def unipc_belief(init: Mapping, steps: int, order: int, walk: Walk) -> Solver:
    """UniPC whose predictor has an order a step, and whose corrector may rest."""
    lower = init.get("lower_order_final", True)
    orders = [min(order, k + 1, steps - k if lower else order) for k in range(steps)]
    place = {key: k for k, key in enumerate(walk.keys[:-1])}
    idle = {k + 1 for k in init.get("disable_corrector", ())}
    kind = init.get("solver_type", "bh2")

    def belief(denoise, level, x, t, s, history):
        k = place[t]
        before = orders[k - 1] if k else 1
        corrected = unipc(denoise, level, x, t, s, history[: before + 1], order=before, kind=kind)
        at = level(t)
        if k not in idle:
            x = at.alpha * corrected.x0 + at.sigma * corrected.eps
        x0 = unipc(denoise, level, x, t, s, history[: orders[k]], order=orders[k], kind=kind).x0
        return Prediction.from_x0(x, x0, at)

    solver = Solver("unipc", belief)
    return solver if init.get("predict_x0", True) else swapped(solver)


def single_walk(walk: Walk, init: Mapping, steps: int) -> Walk:
    """DPM-Solver++ in groups of calls, each group one move of ours that asks at the points between."""
    order = init.get("solver_order", 2)
    if init.get("algorithm_type", "dpmsolver++") != "dpmsolver++" or init.get("solver_type", "midpoint") != "midpoint":
        raise ValueError("no counterpart for the singlestep solvers but dpmsolver++ by midpoints")
    sizes = group_sizes(steps, order, zero=init.get("final_sigmas_type", "zero") == "zero")
    starts = np.cumsum([0, *sizes]).tolist()
    between = {walk.keys[a]: walk.keys[a + 1 : b] for a, b in pairwise(starts)}

    def belief(denoise, level, x, t, s, history):
        def log_noise(key):
            return math.log(level(key).sigma / level(key).alpha)

        p = believed = history[0][1]
        first = log_noise(t)
        for k, u in enumerate(between[t]):
            asked = denoise(transition(believed, level(t), level(u))[0], u)
            after = (*between[t], s)[k + 1]
            h = first - log_noise(after)
            weight = 0.5 if k == 0 else 1 / (1 - math.exp(-h)) - 1 / h
            x0 = p.x0 + weight * h / (first - log_noise(u)) * (asked.x0 - p.x0)
            believed = Prediction.from_x0(x, x0, level(t))
        return believed

    intervals = [(walk.keys[a], walk.keys[b]) for a, b in pairwise(starts)]
    return replace(walk, solver=Solver("single", belief), after=[b - 1 for b in starts[1:]], intervals=intervals)


def group_sizes(steps: int, order: int, *, zero: bool) -> list[int]:
    """How many calls make a move: the order, but for what is left over and, towards zero noise, the last call."""
    if not zero and steps % order == 0:
        return [order] * (steps // order)
    whole, rest = divmod(steps, order)
    if rest == 0:
        whole, rest = whole - 1, order
    # The last groups must end in a call of first order.
    return [order] * whole + ([1] if rest == 1 else [rest - 1, 1] if rest == order else [rest])


# -- PNDM and LCM --------------------------------------------------------------------------------------------------


def pndm_walk(init: Mapping, schedule: Schedule, steps: int) -> Walk:
    """Its moves go T // n down from wherever they are; the second call repeats the first move from below."""
    total = schedule.num_train_timesteps
    spacing = init.get("timestep_spacing", "leading")
    offset = init.get("steps_offset", 0) if spacing == "leading" else 0
    grid = schedule.timesteps(steps, spacing, offset=offset)[:-1]
    final = CLEAN if init.get("set_alpha_to_one", False) else 0
    stride = total // steps

    def below(t: float) -> float:
        return t - stride if t >= stride else final

    moves = [(t, below(t)) for t in grid]
    walk = Walk(grid, schedule.level, schedule.time_of, find_solver("pndm"), range(steps), intervals=moves)
    if not init.get("skip_prk_steps", False):
        return replace(walk, after=[3, 7, 11, *range(12, 9 + steps)])
    solver = find_solver("plms").having(kind="own")
    walk = replace(walk, solver=solver, after=range(1, steps + 1))
    if steps == 1 or below(grid[0]) == grid[1]:
        return walk

    def belief(denoise, level, x, t, s, history, *, parameterization):
        if len(history) > 1:
            return solver(denoise, level, x, t, s, history, parameterization=parameterization)
        # The grid is uneven: the first call moves from its first timestep, the second from above its second.
        first = target(parameterization, history[0][1].x0, history[0][1].eps, level(t))
        moved = transition(read(parameterization, x, first, level(grid[0])), level(grid[0]), level(below(grid[0])))[0]
        q = denoise(moved, grid[1])
        second = target(parameterization, q.x0, q.eps, level(grid[1]))
        return read(parameterization, x, (first + second) / 2, level(t))

    raised = grid[1] + stride
    return replace(
        walk, solver=Solver("pndm", belief), intervals=[(raised, grid[1]), *moves[1:]], told={raised: grid[0]}
    )


def read(parameterization: str, x: Tensor, answer: Tensor, at: Level) -> Prediction:
    """Return what a network's answer means."""
    return getattr(Prediction, f"from_{parameterization}")(x, answer, at)


def lcm_walk(init: Mapping, schedule: Schedule, steps: int) -> Walk:
    if init.get("original_inference_steps", 50) != 50:
        raise ValueError("no counterpart for another original_inference_steps than 50")
    keys = schedule.timesteps(steps, "lcm")
    solver = find_solver("lcm").having(timestep_scaling=init.get("timestep_scaling", 10.0))
    return Walk(keys, schedule.level, schedule.time_of, solver, range(steps), eta=math.inf)

"""What to believe about an interval t -> s, given the network's answers so far. The one file a new sampler touches.

A solver's `belief` is a function of the denoiser, the newest state and the history (newest first, at most four
answers); it returns a Prediction and keeps nothing between calls. How to move, given the belief, is
`process.transition`. Below, rho is sigma/alpha, the "sigma" of k-diffusion, in which the flow is d(x/alpha) = eps drho.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from torch import Tensor

from .denoiser import Denoiser
from .guidance import Levels
from .process import Prediction

History = tuple[tuple[float, Prediction], ...]
Draw = Callable[..., Tensor]  # draw(x, here, there): noise for a move between two levels, s_noise included


@dataclass(frozen=True)
class Solver:
    """One way to believe, and what is to know about it before it is chosen.

    `belief(denoise, level, x, t, s, history)` may ask by keyword for what the step knows: `eta`, `time_of` (the
    timestep of a value of sigma/alpha) and `draw`. `law` is what eta means to `process.transition`.
    """

    name: str
    belief: Callable[..., Prediction]
    order: int | None = None  # of convergence at eta = 0; None: not known
    evaluations: int = 1  # of the network, a step
    text: str = ""
    orders: tuple[int, ...] = ()  # to choose from
    takes_eta: bool = True
    takes_churn: bool = True
    eta: float = 0.0  # unless told otherwise
    law: str = "ddim"

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise unless told otherwise."""
        return self.eta > 0

    def of_order(self, order: int) -> "Solver":
        """Return the same solver at another of its orders."""
        if order not in self.orders:
            allowed = f"one of {', '.join(map(str, self.orders))}" if self.orders else f"{self.order}, its only one"
            raise ValueError(f"the order of solver {self.name} must be {allowed}, got {order}")
        return replace(self, belief=partial(self.belief, order=order), order=order)

    def __call__(
        self, denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History, **known
    ) -> Prediction:
        return self.belief(denoise, level, x, t, s, history, **{k: known[k] for k in _wanted(self.belief) if k in known})


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


def euler(denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History) -> Prediction:
    """Believe the last answer: DDIM with eta = 0, DDPM with eta = 1. First order."""
    return history[0][1]


SOLVERS: Mapping[str, Solver] = {
    solver.name: solver
    for solver in (Solver("euler", euler, 1, 1, "the last answer: DDIM, with eta=1 DDPM and Euler ancestral"),)
}
_BY_BELIEF = {solver.belief: solver for solver in SOLVERS.values()}

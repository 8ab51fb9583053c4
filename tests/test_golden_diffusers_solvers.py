"""diffusers' schedulers beyond DDPM and DDIM: whole trajectories, what the network is told, and the start."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers_cases import Walk, read, walk_of
from golden_cases import Case, assert_close, load, names

from diffusion.guidance import clip_x0, threshold_x0
from diffusion.process import Prediction, q_step, target, transition
from diffusion.sampling import sample
from diffusion.schedule import CLEAN

PARAMETERIZATIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
TOLERANCE = 5e-5  # the peer computes in float32
OTHERS = {"DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"}
FILES = [name for name in names("diffusers_schedulers/*Scheduler") if name.rpartition("/")[2] not in OTHERS]
RUNS = [(name, key) for name in FILES for key in load(name).config["cases"]]


class Run:
    """One run of a scheduler on the case's toy network, in float64."""

    def __init__(self, case: Case, key: str):
        self.case, self.key = case, key
        run = case.config["cases"][key]
        self.init, self.steps, self.kwargs = run["init"], run["steps"], run["step_kwargs"]
        scheduler = case.name.rpartition("/")[2].removesuffix("Scheduler").removesuffix("Discrete")
        self.walk: Walk = walk_of(scheduler, self.init, self.steps, self.kwargs)
        self.parameterization = PARAMETERIZATIONS[self.init.get("prediction_type", "epsilon")]
        self.asked: list[float] = []
        assert abs(self.walk.start - run["init_noise_sigma"]) <= 1e-5 * self.walk.start

    def denoise(self, x: torch.Tensor, key: float) -> Prediction:
        W, b = self.case["toy.W"].double(), self.case["toy.b"].double()
        time = self.walk.told.get(key, key)
        self.asked.append(time)
        output = torch.tanh(torch.einsum("oc,bchw->bohw", W, x) + time / 1000 * b[None, :, None, None])
        return read(self.parameterization, x, output, self.walk.level(key))

    def limited(self, x: torch.Tensor, key: float) -> Prediction:
        init, level = self.init, self.walk.level
        if init.get("thresholding"):
            quantile, most = init.get("dynamic_thresholding_ratio", 0.995), init.get("sample_max_value", 1)
            return threshold_x0(self.denoise, level, quantile=quantile, max_bound=most)(x, key)
        if init.get("clip_sample"):
            return clip_x0(self.denoise, level, bound=init.get("clip_sample_range", 1.0))(x, key)
        return self.denoise(x, key)

    def states(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield x and the timestep it is at, after every move."""
        walk = self.walk
        draws = iter(self.case.tensors.get(f"in.{self.key}.step_noise", torch.empty(0)).double())
        first = walk.level(walk.moves[0][0] if not walk.told else walk.keys[0])
        x = self.case["in.noise"].double() * walk.start * (first.alpha if walk.even_in_sigma else 1)
        if walk.churn.get("s_churn"):
            yield from self.churned(x, draws)
            return
        for state in sample(
            self.limited,
            x,
            [(t, s) for t, s in walk.moves if s < t],
            walk.level,
            solver=walk.solver,
            eta=walk.eta,
            time_of=walk.time_of,
            parameterization=self.parameterization,
            noise=lambda x: next(draws),
        ):
            yield state.x, state.s

    def churned(self, x: torch.Tensor, draws: Iterator[torch.Tensor]) -> Iterator[tuple[torch.Tensor, float]]:
        """Its Euler asks the network before it adds the noise, EDM after: so not `step`, but all the rest of it."""
        walk, level, wanted = self.walk, self.walk.level, self.walk.churn
        share = min(wanted["s_churn"] / self.steps, 2**0.5 - 1)
        low, high = wanted.get("s_tmin", 0.0), wanted.get("s_tmax", float("inf"))
        for t, s in walk.moves:
            here, rho = level(t), level(t).sigma / level(t).alpha
            p = self.denoise(x, t)
            answer = target(self.parameterization, p.x0, p.eps, here)
            if low <= rho <= high and share > 0:
                raised = np.hypot(1, (1 + share) * rho)
                noisier = type(here)(1 / raised, (1 + share) * rho / raised)
                x, here = q_step(x, wanted.get("s_noise", 1.0) * next(draws), here, noisier), noisier
            x = transition(read(self.parameterization, x, answer, here), here, level(s))[0]
            yield x, s


@pytest.mark.parametrize(("name", "key"), RUNS, ids=[f"{name.rpartition('/')[2]}-{key}" for name, key in RUNS])
def test_trajectories(name, key):
    case = load(name)
    run = Run(case, key)
    theirs = case[f"out.{key}.samples"]
    states = list(run.states())
    after = [k for k, (t, s) in zip(run.walk.after, run.walk.moves, strict=True) if s < t]
    for place, (x, s) in zip(after, states, strict=True):
        x = x / run.walk.level(s).alpha if run.walk.even_in_sigma else x
        assert_close(x, theirs[place], TOLERANCE, f"{key} after call {place}")
    assert_close(x, theirs[-1], TOLERANCE, f"{key} at the end")
    told = case[f"out.{key}.timesteps"].tolist()
    assert np.allclose(run.asked, told[: len(run.asked)], atol=0.02), key  # its tables are float32
    assert len(run.asked) == len(told) - (len(after) < len(run.walk.moves))


def test_every_scheduler_has_runs_and_every_run_ends():
    assert len({name for name, _ in RUNS}) >= 12
    assert {Run(load(name), key).walk.moves[-1][1] for name, key in RUNS} <= {CLEAN, 0}

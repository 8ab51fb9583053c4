"""diffusers' DDPM, DDIM and inverse DDIM schedulers: timesteps and whole trajectories, their quirks named here."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from diffusers_cases import peer_schedule
from golden_cases import Case, assert_close, load, names

from diffusion.denoiser import denoiser
from diffusion.guidance import clip_x0, threshold_x0
from diffusion.process import GaussianDiffusion, q_sample, target
from diffusion.sampling import State, sample
from diffusion.schedule import CLEAN, Schedule, power

PARAMETERIZATIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "jump"}


def peer_intervals(init: dict, schedule: Schedule, steps: int, scheduler: str) -> list[tuple[int, int]]:
    """The peer's (t, s). Its DDIM goes to t - T // n whatever the grid's next entry is; its DDPM takes the grid's."""
    spacing, total = init.get("timestep_spacing", "leading"), schedule.num_train_timesteps
    offset = init.get("steps_offset", 0) if spacing == "leading" else 0
    final = CLEAN if init.get("set_alpha_to_one", True) else 0
    grid = schedule.timesteps(steps, spacing, offset=offset)
    if scheduler == "DDPMScheduler":
        return list(pairwise(grid))
    pairs = [(t, t - total // steps) for t in grid[:-1]]
    if scheduler == "DDIMScheduler":
        return [(t, s if s >= 0 else final) for t, s in pairs]
    return [(min(s, total - 1) if s >= 0 else final, t) for t, s in reversed(pairs)]


def walk(case: Case, key: str, scheduler: str) -> tuple[list[tuple[int, int]], Iterator[State]]:
    run = case.config["cases"][key]
    init, kwargs = run["init"], run["step_kwargs"]
    schedule = peer_schedule(init)
    diffusion = GaussianDiffusion(schedule, PARAMETERIZATIONS[init.get("prediction_type", "epsilon")])
    W, b = case["toy.W"].double(), case["toy.b"].double()

    def net(x, t):
        return torch.tanh(torch.einsum("oc,bchw->bohw", W, x) + t[0] / 1000 * b[None, :, None, None])

    intervals = peer_intervals(init, schedule, run["steps"], scheduler)
    denoise, step_kwargs = denoiser(diffusion, net), {}
    if scheduler == "DDIMInverseScheduler":
        # The peer asks the network at the noisier end and reads its answer at the level where x is: the same for eps.
        noisier, step_kwargs = dict(intervals), {"ask": min}

        def denoise(x, t):
            return diffusion.prediction(net(x, diffusion.time(x, noisier[t])), x, t)

    # The peer's DDIM moves with the network's eps even where it has clipped x0, unless told otherwise.
    keep = {"keep_eps": scheduler != "DDPMScheduler" and not kwargs.get("use_clipped_model_output", False)}
    if init.get("thresholding"):
        bounds = {
            "quantile": init.get("dynamic_thresholding_ratio", 0.995),
            "max_bound": init.get("sample_max_value", 1),
        }
        denoise = threshold_x0(denoise, schedule.level, **bounds, **keep)
    elif init.get("clip_sample", True):
        denoise = clip_x0(denoise, schedule.level, bound=init.get("clip_sample_range", 1.0), **keep)
    draws = iter(case.tensors.get(f"in.{key}.step_noise", torch.empty(0)).double())
    eta = 1.0 if scheduler == "DDPMScheduler" else kwargs.get("eta", 0.0)
    variance = VARIANCES[init.get("variance_type", "fixed_small")]
    x = case["in.noise"].double() * run["init_noise_sigma"]
    step_kwargs |= {"eta": eta, "variance": variance, "noise": lambda x: next(draws)}
    return intervals, sample(denoise, x, intervals, schedule.level, **step_kwargs)


def cases(scheduler: str) -> list[tuple[str, str]]:
    return [(n, key) for n in names(f"diffusers_schedulers/{scheduler}") for key in load(n).config["cases"]]


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
def test_timesteps_and_trajectories(scheduler):
    checked = 0
    for name, key in cases(scheduler):
        case = load(name)
        if case.config["cases"][key].get("ignored_by_peer"):
            continue
        intervals, states = walk(case, key, scheduler)
        asked = [max(pair) for pair in intervals]
        assert asked == case[f"out.{key}.timesteps"].tolist(), key
        for k, state in enumerate(states):
            assert_close(state.x, case[f"out.{key}.samples"][k], 1e-5, f"{key} after step {k}")
            if f"out.{key}.pred_x0" in case.tensors and scheduler != "DDIMInverseScheduler":
                assert_close(state.prediction.x0, case[f"out.{key}.pred_x0"][k], 1e-5, f"{key} x0 at {k}")
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", names("diffusers_schedulers/DD[IP]MScheduler"))
def test_add_noise_and_velocity(name):
    case = load(name)
    schedule = power(1000, beta_start=0.00085, beta_end=0.012, power=2.0)
    x0, eps = case["in.x0"].double(), case["in.noise"].double()
    assert_close(q_sample(x0, eps, schedule.level(case["in.add_noise_t"])), case["out.add_noise"], 1e-5)
    if "out.velocity" in case.tensors:
        at = schedule.level(case["in.velocity_t"])
        assert_close(target("v", x0, eps, at), case["out.velocity"], 1e-5)

"""latent-diffusion's own numbers: beta schedules, registered buffers, DDIM grids and trajectories, PLMS, img2img."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close, load, names

from diffusion.guidance import ClassifierFreeGuidance
from diffusion.losses import in_output_space
from diffusion.process import GaussianDiffusion, posterior_mean, q_sample, reverse_variance, transition, variances
from diffusion.sampling import sample, step
from diffusion.schedule import Schedule, cosine, power, scaled_linear


def peer_schedule(kind: str, total: int, start: float, end: float) -> Schedule:
    match kind:
        case "linear":  # linear in sqrt(beta)
            return scaled_linear(total, beta_start=start, beta_end=end)
        case "sqrt_linear":
            return power(total, beta_start=start, beta_end=end)
        case "sqrt":
            return power(total, beta_start=start**0.5, beta_end=end**0.5, power=0.5)
        case "cosine":
            return cosine(total)
    raise AssertionError(f"unknown schedule {kind}")


@pytest.mark.parametrize("name", names("ldm_samplers/make_beta_schedule"))
def test_beta_schedules(name):
    case = load(name)
    for kind, total, start, end in case.config["cases"]:
        schedule, key = peer_schedule(kind, total, start, end), f"{kind}_T{total}_{start}_{end}"
        torch.testing.assert_close(schedule.betas, case[f"out.betas.{key}"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            schedule.alphas_cumprod.float(), case[f"out.alphas_cumprod_f32.{key}"], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", names("ldm_samplers/register_schedule"))
@pytest.mark.parametrize(("key", "schedule", "v"), [("sd", scaled_linear(), 0.0), ("cosine_vpost", cosine(100), 0.5)])
def test_registered_buffers(name, key, schedule, v):
    buffers = load(name).group(f"out.{key}")
    t = torch.arange(schedule.num_train_timesteps)
    here, there = schedule.level(t), schedule.level(t - 1)
    jump, posterior = variances(here, there)
    one, zero = torch.ones_like(jump), torch.zeros_like(jump)
    posterior = (1 - v) * posterior + v * jump  # v_posterior: between DDPM's two choices, linearly
    snr = (here.alpha / here.sigma) ** 2
    ours = {
        "betas": jump,
        "alphas_cumprod": here.alpha**2,
        "alphas_cumprod_prev": there.alpha**2,
        "sqrt_alphas_cumprod": here.alpha,
        "sqrt_one_minus_alphas_cumprod": here.sigma,
        "log_one_minus_alphas_cumprod": 2 * here.sigma.log(),
        "sqrt_recip_alphas_cumprod": 1 / here.alpha,
        "sqrt_recipm1_alphas_cumprod": here.sigma / here.alpha,
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": posterior.clamp(min=1e-20).log(),
        "posterior_mean_coef1": posterior_mean(one, zero, here, there),
        "posterior_mean_coef2": posterior_mean(zero, one, here, there),
    }
    for buffer, values in ours.items():
        torch.testing.assert_close(values.flatten().float(), buffers[buffer], rtol=2e-6, atol=1e-9, msg=buffer)
    if v == 0:  # the bound's weight on eps is its weight on x0, (SNR(t-1) - SNR(t)) / 2, in eps' space
        x0_weight = ((there.alpha / there.sigma) ** 2 - snr)[1:] / 2
        weight = in_output_space("eps", x0_weight, snr[1:]).flatten().float()
        torch.testing.assert_close(weight, buffers["lvlb_weights.eps"][1:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", names("ldm_samplers/ddim_schedule"))
def test_ddim_grids_and_their_variances(name):
    case = load(name)
    config = case.config
    schedule = scaled_linear(config["T"], beta_start=config["linear_start"], beta_end=config["linear_end"])
    for key in (k for k in case.group("out") if k.startswith("steps.")):
        _, method, n = key.split(".")
        grid = schedule.timesteps(int(n), {"uniform": "ldm", "quad": "ldm_quad"}[method], final=0)
        theirs = case[f"out.{key}"].tolist()
        # Steps that repeat do not move, and the index beyond the last timestep is an IndexError in the peer.
        assert list(grid[-2::-1]) == sorted({min(t, config["T"] - 1) for t in theirs})
        if len(set(theirs)) < len(theirs) or f"out.alphas.{method}.{n}" not in case.tensors:
            continue
        levels = [schedule.level(t) for t in grid[::-1]]
        alphas, before = ([at.alpha**2 for at in part] for part in (levels[1:], levels[:-1]))
        assert_close(torch.tensor(alphas), case[f"out.alphas.{method}.{n}"], 1e-6)
        assert_close(torch.tensor(before), case[f"out.alphas_prev.{method}.{n}"], 1e-6)
        for eta in (0.0, 1.0):
            sigmas = [
                eta * reverse_variance("posterior", *variances(at, s)) ** 0.5
                for at, s in zip(levels[1:], levels[:-1], strict=True)
            ]
            assert_close(torch.tensor(sigmas), case[f"out.sigmas.{method}.{n}.eta{eta}"], 1e-5)


def guided_toy(case, schedule: Schedule, scale: float, seen: list):
    """The case's eps model under classifier-free guidance, in float64."""
    w, b = case["toy.w"].double(), case["toy.b"].double()

    def net(x, t, *, vector):
        seen.append(t[0].item())
        shift = b[None, :, None, None] * t[:, None, None, None] / 1000
        return torch.tanh(F.conv2d(x, w, padding=1) + shift + vector[:, :, None, None])

    condition, null = {"vector": case["in.c"].double()}, {"vector": case["in.uc"].double()}
    return ClassifierFreeGuidance(scale)(GaussianDiffusion(schedule), net, condition, null)


def sd_schedule(config: dict) -> Schedule:
    return scaled_linear(config["T"], beta_start=config["linear_start"], beta_end=config["linear_end"])


TRAJECTORIES = [n for n in names("ldm_samplers/ddim_*") if not n.endswith("schedule")]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_ddim_trajectories(name):
    case, config = load(name), load(name).config
    schedule, seen = sd_schedule(config), []
    denoise = guided_toy(case, schedule, config["cfg_scale"], seen)
    grid = schedule.timesteps(config["steps"], {"uniform": "ldm", "quad": "ldm_quad"}[config["discretize"]], final=0)
    draws = iter(case["in.noise"].double())

    x, history = case["in.x_T"].double(), ()
    for k, (t, s) in enumerate(pairwise(grid)):
        if config["mask"]:
            keep = case["in.mask"].double()
            x = keep * q_sample(case["in.x0"].double(), next(draws), schedule.level(t)) + (1 - keep) * x
        fresh = next(draws) * config["temperature"]
        x, history = step(denoise, schedule.level, x, t, s, history, eta=config["eta"], noise=lambda x, z=fresh: z)
        assert_close(x, case["out.x"][k], 1e-5, f"x after step {k}")
        assert_close(history[0][1].x0, case["out.pred_x0"][k], 1e-5, f"x0 at step {k}")
    assert_close(x, case["out.final"], 1e-5)
    assert seen == case["out.model_t"].tolist()


@pytest.mark.parametrize("name", names("ldm_samplers/plms_*"))
def test_plms_trajectories(name):
    case, config = load(name), load(name).config
    schedule, seen = sd_schedule(config), []
    denoise = guided_toy(case, schedule, config["cfg_scale"], seen)
    grid = schedule.timesteps(config["steps"], {"uniform": "ldm", "quad": "ldm_quad"}[config["discretize"]], final=0)
    for k, state in enumerate(sample(denoise, case["in.x_T"].double(), grid, schedule.level, solver="plms")):
        assert_close(state.x, case["out.x"][k], 1e-5, f"x after step {k}")
    assert_close(state.x, case["out.final"], 1e-5)
    assert seen == case["out.model_t"].tolist()  # twice in the first step


@pytest.mark.parametrize("name", names("ldm_samplers/img2img_*"))
def test_img2img_is_q_sample_and_the_tail_of_a_grid(name):
    case, config = load(name), load(name).config
    schedule, seen = sd_schedule(config), []
    denoise = guided_toy(case, schedule, config["cfg_scale"], seen)
    grid, t_enc = schedule.timesteps(config["steps"], "ldm", final=0), config["t_enc"]
    x0, eps = case["in.x0"].double(), case["in.noise"].double()
    # The peer encodes one level above its first decoding step, and so does this grid.
    rising = grid[-2::-1]
    assert_close(q_sample(x0, eps, schedule.level(rising[t_enc])), case["out.encoded"], 1e-5)
    assert_close(q_sample(x0, eps, schedule.level(t_enc)), case["out.encoded_original_steps"], 1e-5)
    tail = (*reversed(rising[:t_enc]), 0)
    *_, last = sample(denoise, case["out.encoded"].double(), tail, schedule.level, eta=config["eta"])
    assert_close(last.x, case["out.decoded"], 1e-5)
    assert seen == case["out.model_t"].tolist()


def test_the_last_level_is_the_grids_and_not_the_samplers():
    schedule = scaled_linear()
    ends = [schedule.timesteps(10, "ldm", final=final)[-1] for final in (0, -1)]
    assert ends == [0, -1]
    p = GaussianDiffusion(schedule).prediction(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), 1)
    there = [transition(p, schedule.level(1), schedule.level(end))[0] for end in ends]
    assert not torch.equal(*there)

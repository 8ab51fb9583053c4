"""guided-diffusion's own numbers: schedules, steps, losses, bounds, whole sampling loops."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, assert_close, load, names

from diffusion.denoiser import denoiser
from diffusion.guidance import ClassifierGuidance, classifier_score, clip_x0, is_noise
from diffusion.likelihood import (
    approximate_normal_cdf,
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bits_per_dim,
    reverse_log_variance,
    vlb_term,
)
from diffusion.losses import DenoisingLoss
from diffusion.process import GaussianDiffusion, Prediction, posterior_mean, q_sample, transition, variances
from diffusion.sampling import Sampler, step
from diffusion.schedule import CLEAN, Schedule, cosine, linear

SCHEDULES = {"linear": linear, "cosine": cosine}
MEANS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "mean"}
VARIANCES = {"FIXED_SMALL": "posterior", "FIXED_LARGE": "jump", "LEARNED_RANGE": "learned"}


def make_diffusion(schedule: Schedule, mean: str = "EPSILON", var: str = "FIXED_SMALL", **kwargs) -> GaussianDiffusion:
    return GaussianDiffusion(schedule, MEANS[mean], VARIANCES[var], **kwargs)


def toy_net(case: Case, learned: bool, dtype=torch.float32):
    w, b, wv = (case[f"toy.{k}"].to(dtype) for k in ("w", "b", "wv"))

    def net(x, t):
        shift = b[None, :, None, None] * t.to(dtype)[:, None, None, None] / 1000
        mean = torch.tanh(F.conv2d(x, w, padding=1) + shift)
        return torch.cat([mean, torch.tanh(F.conv2d(x, wv, padding=1) - shift)], 1) if learned else mean

    return net


@pytest.mark.parametrize("name", names("gd/schedule_*"))
def test_schedule_tables_are_those_of_the_peer(name):
    case = load(name)
    schedule = SCHEDULES[case.config["noise_schedule"]](case.config["diffusion_steps"])
    t = torch.arange(schedule.num_train_timesteps)
    here, there = schedule.level(t), schedule.level(t - 1)
    jump, posterior = (v.flatten() for v in variances(here, there))
    acp = schedule.alphas_cumprod
    one, zero = torch.ones(len(t), 1, 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    ours = {
        "betas": schedule.betas,
        "alphas_cumprod": acp,
        "alphas_cumprod_prev": (there.alpha**2).flatten(),
        "alphas_cumprod_next": torch.cat([acp[1:], torch.zeros(1, dtype=torch.float64)]),
        "sqrt_alphas_cumprod": here.alpha.flatten(),
        "sqrt_one_minus_alphas_cumprod": here.sigma.flatten(),
        "log_one_minus_alphas_cumprod": (1 - acp).log(),
        "sqrt_recip_alphas_cumprod": 1 / here.alpha.flatten(),
        "sqrt_recipm1_alphas_cumprod": (here.sigma / here.alpha).flatten(),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": torch.cat([posterior[1:2], posterior[1:]]).log(),
        "posterior_mean_coef1": posterior_mean(one, zero, here, there).flatten(),
        "posterior_mean_coef2": posterior_mean(zero, one, here, there).flatten(),
    }
    for key, theirs in case.group("out").items():
        torch.testing.assert_close(
            ours[key], theirs, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert torch.allclose(jump, schedule.betas, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", names("gd/space_timesteps"))
def test_section_strings_choose_the_peers_timesteps(name):
    case = load(name)
    for total, spec in case.config["cases"]:
        schedule = linear(total)
        grid = schedule.timesteps(spec)
        key = f"T{total}_{spec.replace(',', '-')}"
        assert list(grid[-2::-1]) == case[f"out.steps_{key}"].tolist()
        acp = schedule.alphas_cumprod[list(grid[-2::-1])]
        if f"out.acp_{key}" in case.tensors:
            assert torch.allclose(acp, case[f"out.acp_{key}"], rtol=1e-12, atol=0)
            levels = [schedule.level(t) for t in grid]
            jumps = torch.tensor([variances(*pair)[0] for pair in pairwise(levels)][::-1])
            betas = case[f"out.betas_{key}"]
            assert ((jumps.double() - betas).abs() / betas).max() < 1e-6
    for spec, answer in case.config["errors"]:
        if answer == "ok":
            linear(1000).timesteps(spec)
        else:
            with pytest.raises(ValueError, match=r"section|stride"):
                linear(1000).timesteps(spec)


@pytest.mark.parametrize("name", names("gd/q_sample_*"))
def test_forward_process_and_posterior(name):
    case = load(name)
    schedule = SCHEDULES[case.config["noise_schedule"]](case.config["diffusion_steps"])
    x0, t = case["in.x_start"], case["in.t"]
    here, there = schedule.level(t), schedule.level(t - 1)
    _, posterior = variances(here, there)
    first = variances(schedule.level(1), schedule.level(0))[1]
    clipped = torch.where((t == 0).view(-1, 1, 1, 1), torch.full_like(posterior, first), posterior)
    x_t = q_sample(x0, case["in.noise"], here)
    ours = {
        "x_t": x_t,
        "q_mean": q_sample(x0, torch.zeros_like(x0), here),
        "q_variance": (here.sigma**2).expand_as(x0),
        "q_log_variance": (here.sigma**2).log().expand_as(x0),
        "posterior_mean": posterior_mean(x0, case["out.x_t"], here.to(x0), there.to(x0)),
        "posterior_variance": posterior.expand_as(x0),
        "posterior_log_variance": clipped.log().expand_as(x0),
        "prior_bpd": prior_bits_per_dim(GaussianDiffusion(schedule), x0),
    }
    for key, theirs in case.group("out").items():
        assert_close(ours[key], theirs, 1e-5, key)


@pytest.mark.parametrize("name", names("gd/likelihood"))
def test_likelihood_terms(name):
    case = load(name)
    x, mean, log_scale = case["in.x"], case["in.means"], case["in.log_scales"]
    assert_close(approximate_normal_cdf(4 * mean), case["out.cdf"], 1e-6)
    assert_close(discretized_gaussian_log_likelihood(x, mean, log_scale), case["out.dgll"], 1e-5)
    assert_close(normal_kl(mean, log_scale, x, 0.3 * log_scale), case["out.normal_kl"], 1e-6)


def read(case: Case, diffusion: GaussianDiffusion, clip: bool) -> tuple[Prediction, Prediction]:
    """The prediction at in.x, in.t from in.model_output: as it is, and after the clip that was asked for."""
    x, t = case["in.x"].double(), case["in.t"]
    output = case["in.model_output"].double()
    if diffusion.learned_variance:
        output = torch.cat([output, case["in.model_var_values"].double()], 1)
    raw = denoiser(diffusion, lambda x, t: output)
    level = diffusion.schedule.level
    return raw(x, t), (clip_x0(raw, level) if clip else raw)(x, t)


P_MEAN_KEYS = [
    (name, key)
    for name in names("gd/p_mean_variance")
    for key in sorted(load(name).group("out"))
    if ".LEARNED." not in key  # a log-variance answered directly: iDDPM rejects it, and so it has no place here
]


@pytest.mark.parametrize(("name", "key"), P_MEAN_KEYS)
def test_reverse_mean_and_variance(name, key):
    case = load(name)
    kind, mean, var, clip, field = key.split(".")
    diffusion = make_diffusion(SCHEDULES[kind](case.config["diffusion_steps"]), mean, var)
    x, t = case["in.x"].double(), case["in.t"]
    raw, p = read(case, diffusion, clip == "clip")
    first_posterior = variances(diffusion.schedule.level(1), diffusion.schedule.level(0))[1]
    match field:
        case "pred_xstart":
            ours = p.x0
        case "log_variance":
            ours = reverse_log_variance(diffusion, p, t, t - 1, first_posterior)[1].expand_as(x)
        case "mean":
            # The peer's PREVIOUS_X ignores the clip in the mean; here the mean always follows x0.
            p = raw if mean == "PREVIOUS_X" else p
            here, there = (diffusion.schedule.level(at).to(x) for at in (t, t - 1))
            ours = transition(p, here, there, eta=1.0)[0]
            assert_close(posterior_mean(p.x0, x, here, there), ours, 2e-5, "posterior_mean")
    for i in range(len(t)):  # each sample against its own scale
        # The peer's x0 is rounded before it is clipped, on the scale that it has there.
        scale = max(1.0, raw.x0[i].abs().max().item()) if field == "pred_xstart" else 1.0
        assert_close(ours[i], case[f"out.{key}"][i], 1e-5 * scale, f"{key} t={t[i].item()}")


@pytest.mark.parametrize("name", names("gd/p_mean_variance_denoised_fn"))
def test_a_function_of_x0_before_the_clip_is_one_more_wrapper(name):
    case = load(name)
    diffusion = make_diffusion(SCHEDULES[case.config["noise_schedule"]](case.config["diffusion_steps"]))
    level, x, t = diffusion.schedule.level, case["in.x"], case["in.t"]
    raw = denoiser(diffusion, lambda x, t: case["in.model_output"])
    bent = clip_x0(lambda x, t: raw(x, t)._replace(x0=0.5 * raw(x, t).x0 + 0.1), level)
    p = bent(x, t)
    assert_close(p.x0, case["out.pred_xstart"], 1e-5)
    assert_close(transition(p, level(t).to(x), level(t - 1).to(x), 1.0)[0], case["out.mean"], 1e-5)


def keys_of(name: str, *kinds: str) -> list[tuple[str, str]]:
    return [(n, key) for n in names(name) for key in sorted(load(n).group("out")) if key.split(".")[0] in kinds]


def given(case: Case, diffusion: GaussianDiffusion, i: int, clip: bool):
    """Sample i of the case in float64: x, the classifier's gradient, the step's noise, and the denoiser."""
    x, output, var, grad, noise = (
        case[f"in.{key}"][i : i + 1].double()
        for key in ("x", "model_output", "model_var_values", "cond_grad", "step_noise")
    )
    output = torch.cat([output, var], 1) if diffusion.learned_variance else output
    denoise = denoiser(diffusion, lambda x, t: output)
    return x, grad, noise, clip_x0(denoise, diffusion.schedule.level) if clip else denoise


@pytest.mark.parametrize(("name", "key"), keys_of("gd/single_steps", "p_sample", "condition_mean"))
def test_ddpm_step_and_mean_shift(name, key):
    case = load(name)
    what, kind, *parts = key.split(".")
    var = parts.pop(0) if what == "p_sample" else "FIXED_LARGE"
    diffusion = make_diffusion(SCHEDULES[kind](case.config["diffusion_steps"]), "EPSILON", var)
    guided = what == "condition_mean" or parts[1] == "cond"
    for i, t in enumerate(case["in.t"].tolist()):
        x, grad, noise, denoise = given(case, diffusion, i, parts[0] == "clip")
        noise = torch.zeros_like(noise) if what == "condition_mean" else noise
        ours, _ = step(
            denoise,
            diffusion.schedule.level,
            x,
            t,
            t - 1,
            ((t + 1, None),),  # where the walk came from defines the last move's variance
            eta=1.0,
            variance=diffusion.variance,
            shift=(lambda x, t, grad=grad: grad) if guided else None,
            noise=lambda x, noise=noise: noise,
        )
        assert_close(ours[0], case[f"out.{key}"][i], 1e-5, f"{key} t={t}")


def ddim_by_the_paper(x, output, t, s, acp, eta, noise, clip, grad, dtype):
    """DDIM eq. 12 on tables rounded to `dtype`, guided as in 2105.05233 algorithm 2."""
    a, b = (torch.tensor(1.0 if k == CLEAN else 0.0 if k == len(acp) else acp[k], dtype=dtype) for k in (t, s))
    recip, recipm1 = (torch.tensor(v, dtype=dtype) for v in ((1 / acp[t]) ** 0.5, (1 / acp[t] - 1) ** 0.5))
    x, output, noise = x.to(dtype), output.to(dtype), noise.to(dtype)
    x0 = recip * x - recipm1 * output
    x0 = x0.clamp(-1, 1) if clip else x0
    if grad is not None:
        x0 = recip * x - recipm1 * ((recip * x - x0) / recipm1 - (1 - a).sqrt() * grad.to(dtype))
    eps = (recip * x - x0) / recipm1
    sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt() if eta else 0.0
    return b.sqrt() * x0 + (1 - b - sigma**2).sqrt() * eps + sigma * noise * (s != CLEAN)


@pytest.mark.parametrize(("name", "key"), keys_of("gd/single_steps", "ddim_sample", "ddim_reverse_sample"))
def test_ddim_step_and_its_reverse(name, key):
    """The peer subtracts alphas_cumprod from 1 in float32, which costs it 2e-4 at t = 1: so the paper's formula stands
    between us. Rounded as the peer rounds it gives the peer's numbers, in float64 it gives ours.
    """
    case = load(name)
    what, kind, clip, *_ = key.split(".")
    diffusion = make_diffusion(SCHEDULES[kind](case.config["diffusion_steps"]))
    level, acp = diffusion.schedule.level, diffusion.schedule.alphas_cumprod.tolist()
    eta = float(key.split("eta")[1].rsplit(".", 1)[0]) if "eta" in key else 0.0
    for i, t in enumerate(case["in.t"].tolist()):
        x, grad, noise, denoise = given(case, diffusion, i, clip == "clip")
        grad = grad if key.endswith(".cond") else None
        s = t + 1 if what == "ddim_reverse_sample" else t - 1
        paper = [
            ddim_by_the_paper(x, case["in.model_output"][i : i + 1], t, s, acp, eta, noise, clip == "clip", grad, dtype)
            for dtype in (torch.float32, torch.float64)
        ]
        assert_close(paper[0][0], case[f"out.{key}"][i], 1e-6, f"{key} t={t}")
        if s == len(acp):  # the peer's level after the last, pure noise, is no timestep of ours
            assert_close(denoise(x, t).eps, paper[1], 1e-9, f"{key} t={t}")
        elif s > t:  # the peer moves along the clipped belief; our own inversion keeps eps and finds x0 anew
            assert_close(transition(denoise(x, t), level(t), level(s))[0], paper[1], 1e-9, f"{key} t={t}")
        else:
            scored = denoise if grad is None else classifier_score(denoise, lambda x, t, grad=grad: grad, level)
            ours, _ = step(scored, level, x, t, s, eta=eta, noise=lambda x, noise=noise: noise)
            assert_close(ours, paper[1], 1e-9, f"{key} t={t}")


@pytest.mark.parametrize(("name", "key"), keys_of("gd/single_steps", "condition_score_xstart", "condition_score_mean"))
def test_classifier_score_is_not_clipped_again(name, key):
    case = load(name)
    what, kind, clip = key.split(".")
    diffusion = make_diffusion(SCHEDULES[kind](case.config["diffusion_steps"]))
    level = diffusion.schedule.level
    for i, t in enumerate(case["in.t"].tolist()):
        x, grad, _, denoise = given(case, diffusion, i, clip == "clip")
        p = classifier_score(denoise, lambda x, t, grad=grad: grad, level)(x, t)
        ours = p.x0 if what.endswith("xstart") else transition(p, level(t), level(t - 1), 1.0)[0]
        assert_close(ours[0], case[f"out.{key}"][i], 1e-5, f"{key} t={t}")


LOSSES = {"MSE": ("mse", None), "RESCALED_MSE": ("mse", 0.001), "KL": ("vlb", None), "RESCALED_KL": ("vlb", 1.0)}


def make_loss(kind: str, var: str, chain) -> DenoisingLoss:
    simple, vlb_weight = LOSSES[kind]
    vlb_weight = 1 / (len(chain) - 1) if vlb_weight is None else vlb_weight
    return DenoisingLoss(
        simple, vlb_weight=vlb_weight if simple == "vlb" or var == "LEARNED_RANGE" else 0.0, timesteps=chain
    )


TRAINING_KEYS = [
    (name, key) for name in names("gd/training_losses") for key in sorted(load(name).group("out")) if ".loss" in key
]


@pytest.mark.parametrize(("name", "key"), TRAINING_KEYS)
def test_training_losses(name, key):
    case = load(name)
    schedule_name, kind, mean, var, span, _ = key.split(".")
    diffusion = make_diffusion(SCHEDULES[schedule_name](case.config["diffusion_steps"]), mean, var)
    chain = diffusion.schedule.timesteps(diffusion.num_train_timesteps if span == "full" else span.removeprefix("resp"))
    t = case["in.t"] if span == "full" else torch.tensor(chain[-2::-1])[case["in.t_resp"]]
    loss = make_loss(kind, var, chain)
    net = toy_net(case, var == "LEARNED_RANGE")
    terms = loss(diffusion, net, case["in.x_start"], t, case["in.noise"], {})
    prefix = f"out.{key.removesuffix('.loss')}"
    theirs = {name: case.tensors.get(f"{prefix}.{name}") for name in ("loss", "mse", "vb")}
    scale = len(chain) - 1
    vb = None if terms.vlb is None else terms.vlb * (scale / 1000 if kind == "RESCALED_MSE" else 1)
    unit = scale if kind == "RESCALED_KL" else 1  # an exact factor on one term of the bound
    for ours, expected in ((terms.loss, theirs["loss"]), (terms.mse, theirs["mse"]), (vb, theirs["vb"])):
        for i in range(len(t) if expected is not None else 0):
            assert_close(ours[i] / unit, expected[i] / unit, 1e-5, f"{key} t={t[i].item()}")


@pytest.mark.parametrize("name", names("gd/hybrid_loss_grad"))
@pytest.mark.parametrize("kind", ["MSE", "RESCALED_MSE", "KL"])
def test_hybrid_loss_stops_the_mean_in_the_bound(name, kind):
    case = load(name)
    config = case.config
    diffusion = make_diffusion(
        SCHEDULES[config["noise_schedule"]](config["diffusion_steps"]), config["mean_type"], config["var_type"]
    )
    output = torch.cat([case["in.model_output"], case["in.model_var_values"]], 1).requires_grad_()
    chain = diffusion.schedule.timesteps(diffusion.num_train_timesteps)
    loss = make_loss(kind, config["var_type"], chain)
    loss(diffusion, lambda x, t: output, case["in.x_start"], case["in.t"], case["in.noise"], {}).loss.sum().backward()
    grad_eps, grad_var = output.grad.chunk(2, 1)
    assert_close(grad_eps, case[f"out.{kind}.grad_eps"], 3e-4, "eps")
    assert_close(grad_var, case[f"out.{kind}.grad_var"], 3e-4, "var")


@pytest.mark.parametrize("name", names("gd/bpd_*"))
def test_bits_per_dim(name):
    case = load(name)
    config = case.config
    diffusion = make_diffusion(
        SCHEDULES[config["noise_schedule"]](config["diffusion_steps"]), config["mean_type"], config["var_type"]
    )
    denoise = denoiser(diffusion, toy_net(case, diffusion.learned_variance))
    denoise = clip_x0(denoise, diffusion.schedule.level) if config["clip_denoised"] else denoise
    noises = iter(case["in.loop_noise"])
    result = bits_per_dim(diffusion, denoise, case["in.x_start"], noise=lambda x: next(noises))
    for key, ours in {"total_bpd": result.total, "prior_bpd": result.prior, "vb": result.vlb,
                      "xstart_mse": result.x0_mse, "mse": result.eps_mse}.items():  # fmt: skip
        assert_close(ours, case[f"out.loop_{key}"], 1e-5, key)
    x, t = case["in.x_t"], case["in.t"]
    p = denoise(x, t)
    assert_close(p.x0, case["out.vb_pred_xstart"], 1e-5)
    assert_close(vlb_term(diffusion, p, case["in.x_start"], x, t), case["out.vb_terms"], 1e-5)


def classifier_with_gradient(target, slope: float):
    """A classifier of two classes whose log p(0 | x_t) is -slope / 2 |x - target|^2 (1 + time / 1000).

    Its logits are log-probabilities already, so that the gradient is -slope (x - target) (1 + time / 1000), which is
    what the peer was given.
    """

    def classifier(x, time):
        log_p = -0.5 * slope * (x - target).square().flatten(1).sum(1) * (1 + time / 1000)
        return torch.stack([log_p, torch.log1p(-log_p.exp())], 1)

    return classifier


@pytest.mark.parametrize("name", names("gd/loop_*"))
def test_whole_loops(name):
    case, config = load(name), load(name).config
    total = config["diffusion_steps"]
    diffusion = make_diffusion(
        SCHEDULES[config["noise_schedule"]](total),
        config["mean_type"],
        config["var_type"],
        time_scale=1000 / total if config["rescale_timesteps"] else 1.0,
    )
    level, seen = diffusion.schedule.level, []
    net = toy_net(case, diffusion.learned_variance, torch.float64)

    def watched(x, t):
        seen.append(t[0].item())
        return net(x, t)

    x, noises, push = case["in.x_T"].double(), iter(case["in.noise"].double()), None
    if config["cond"]:
        guidance = ClassifierGuidance(classifier=classifier_with_gradient(case["in.A"].double(), 0.7))
        push = guidance.log_prob_grad(diffusion, x, [0] * len(x))
    denoise, ddpm = denoiser(diffusion, watched), config["kind"] == "ddpm"
    sampler = Sampler(
        config["timestep_respacing"],
        eta=1.0 if ddpm else config["eta"],
        variance=None if ddpm else "posterior",
        clip="clip" if config["clip_denoised"] else None,
    )
    starts_in_noise = is_noise(level(sampler.timesteps(diffusion.schedule)[0]))
    if push is not None and not ddpm and (sampler.shifts_mean or starts_in_noise):
        # The peer's DDIM takes the score at eta = 1, too, where ours is DDPM, and in noise: the same wrappers by hand.
        denoise = classifier_score(clip_x0(denoise, level) if sampler.clip else denoise, push, level)
        sampler, push = replace(sampler, clip=None), None
    states = sampler.states(diffusion, denoise, x, noise=lambda x: next(noises), log_prob_grad=push)
    for k, state in enumerate(states):
        if config["eta"] == 0:
            next(noises)  # the peer draws at every step
        assert_close(state.x, case["out.sample"][k], 1e-5, f"sample after step {k}")
        # x0 = x / alpha - ...: the peer's rounding of x comes before its clip, on that scale.
        unclipped = max(1.0, 1 / level(state.t).alpha)
        assert_close(state.prediction.x0, case["out.pred_xstart"][k], 1e-5 + 1e-6 * unclipped, f"x0 at {k}")
    assert state.s == CLEAN
    assert seen == pytest.approx(case["out.model_t"].tolist(), abs=1e-4)

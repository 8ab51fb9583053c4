"""Schedules against the papers' formulas, levels between timesteps and the way back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.schedule import (
    CLEAN,
    Level,
    Schedule,
    cosine,
    linear,
    power,
    scaled_linear,
    shifted,
    shifted_cosine,
    sigmoid,
    zero_terminal_snr,
)

LENGTHS = (1, 2, 7, 50, 997, 1000)
FAMILIES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "shifted_cosine": shifted_cosine,
}
WHOLE = [(name, total) for name in FAMILIES for total in LENGTHS if name != "linear" or total > 20]
properties = settings(max_examples=40, deadline=None, derandomize=True)


def log_snr(schedule: Schedule) -> np.ndarray:
    acp = schedule.alphas_cumprod.numpy()
    return np.log(acp / (1 - acp))


# -- the papers' formulas ----------------------------------------------------------------------------------------


def test_linear_is_ddpm_section_4():
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    assert np.allclose(linear().betas, betas, rtol=1e-13)
    assert np.allclose(linear().alphas_cumprod, np.cumprod(1 - np.array(betas)), rtol=1e-12)


@pytest.mark.parametrize("total", [50, 250, 4000])
def test_linear_scales_betas_to_the_length_of_the_chain(total):
    betas = 1000 / total * (1e-4 + (0.02 - 1e-4) * np.arange(total) / (total - 1))
    assert np.allclose(linear(total).betas, betas, rtol=1e-13)
    assert np.allclose(linear(total, reference_steps=None).betas, betas * total / 1000, rtol=1e-13)


@pytest.mark.parametrize("total", [2, 7, 997, 1000])
def test_scaled_linear_is_linear_in_the_root_of_beta(total):
    roots = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * np.arange(total) / (total - 1)
    assert np.allclose(scaled_linear(total).betas, roots**2, rtol=1e-13)


def test_power_interpolates_beta_to_any_root():
    betas = (0.001**0.25 + (0.02**0.25 - 0.001**0.25) * np.arange(30) / 29) ** 4
    assert np.allclose(power(30, beta_start=0.001, beta_end=0.02, power=4).betas, betas, rtol=1e-12)


@pytest.mark.parametrize("total", [2, 7, 50, 997, 1000])
def test_cosine_is_iddpm_eq_17(total):
    def f(t):
        return math.cos((t / total + 0.008) / 1.008 * math.pi / 2) ** 2

    wanted = [f(t) / f(0) for t in range(1, total)]
    assert np.allclose(cosine(total).alphas_cumprod[:-1], wanted, rtol=1e-9)
    assert cosine(total).betas[-1] == 0.999


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1.0), (0, 3, 0.3), (-3, 3, 1.1), (0, 3, 0.9)])
def test_sigmoid_is_chens_algorithm_1(start, end, tau):
    def sigmoid_schedule(t, clip_min=1e-9):  # as printed in arXiv 2301.10972
        v_start, v_end = 1 / (1 + np.exp(-start / tau)), 1 / (1 + np.exp(-end / tau))
        output = 1 / (1 + np.exp(-(t * (end - start) + start) / tau))
        return np.clip((v_end - output) / (v_end - v_start), clip_min, 1.0)

    ours = sigmoid(200, start=start, end=end, tau=tau)
    assert np.allclose(ours.alphas_cumprod[:-1], sigmoid_schedule(np.arange(1, 200) / 200), rtol=1e-9)


@pytest.mark.parametrize(("size", "reference"), [(256, 64), (512, 32), (64, 64), (32, 64)])
def test_shifted_cosine_moves_log_snr_by_twice_the_log_of_the_ratio(size, reference):
    def cosine_log_snr(t):  # simple diffusion, section 3.1, at iDDPM's offset
        angle = (t + 0.008) / 1.008 * math.pi / 2
        scale = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        acp = math.cos(angle) ** 2 / scale
        return math.log(acp / (1 - acp))

    ours = log_snr(shifted_cosine(100, image_size=size, reference_size=reference))
    wanted = [cosine_log_snr(t / 100) + 2 * math.log(reference / size) for t in range(1, 100)]
    assert np.allclose(ours[:-1], wanted, atol=1e-7)


def test_any_schedule_shifts_and_shifts_back():
    there = shifted(linear(100), image_size=128, reference_size=32)
    assert np.allclose(log_snr(there), log_snr(linear(100)) - 2 * math.log(4), atol=1e-9)
    assert np.allclose(shifted(there, image_size=32, reference_size=128).betas, linear(100).betas, rtol=1e-6)


@pytest.mark.parametrize(("name", "total"), [(n, t) for n, t in WHOLE if t > 1])
def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_noise(name, total):
    before = FAMILIES[name](total)
    after = zero_terminal_snr(before)
    roots = np.sqrt(before.alphas_cumprod.numpy())  # arXiv 2305.08891, algorithm 1
    wanted = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    assert np.allclose(after.alphas_cumprod, wanted**2, rtol=1e-9, atol=1e-15)
    assert after.alphas_cumprod[0].item() == pytest.approx(before.alphas_cumprod[0].item(), rel=1e-12)
    assert after.alphas_cumprod[-1] == 0
    assert after.betas[-1] == 1
    assert after.level(total - 1) == Level(0.0, 1.0)
    assert after.zero_terminal_snr
    assert not before.zero_terminal_snr
    again = zero_terminal_snr(after)
    assert torch.allclose(again.betas, after.betas, rtol=1e-9)


# -- levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "total"), WHOLE)
def test_every_schedule_falls_inside_the_unit_interval(name, total):
    schedule = FAMILIES[name](total)
    acp = schedule.alphas_cumprod
    assert schedule.num_train_timesteps == len(acp) == total
    assert acp.dtype == torch.float64
    assert (acp.diff() < 0).all()
    assert acp[-1] > 0
    assert acp[0] < 1


@properties
@given(st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=20), st.data())
def test_levels_preserve_variance_and_follow_the_product(betas, data):
    schedule = Schedule(betas)
    t = data.draw(st.integers(0, len(betas) - 1))
    at = schedule.level(t)
    assert at.alpha**2 == pytest.approx(math.prod(1 - b for b in betas[: t + 1]), rel=1e-9)
    assert at.alpha**2 + at.sigma**2 == pytest.approx(1, abs=1e-12)


def test_clean_data_has_a_timestep():
    assert linear(50).level(CLEAN) == Level(1.0, 0.0)
    at = linear(50).level(torch.tensor([CLEAN, 0]))
    assert (at.alpha[0].item(), at.sigma[0].item()) == (1, 0)


@properties
@given(st.floats(0, 49), st.sampled_from(sorted(FAMILIES)))
def test_a_fractional_level_interpolates_log_snr(t, name):
    schedule = FAMILIES[name](50)
    wanted = np.interp(t, np.arange(50), log_snr(schedule))
    at = schedule.level(t)
    assert isinstance(at.alpha, float)
    assert 2 * math.log(at.alpha / at.sigma) == pytest.approx(wanted, abs=1e-9)
    assert at.alpha**2 + at.sigma**2 == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("schedule", [linear(50), zero_terminal_snr(scaled_linear(50))], ids=["plain", "zero-snr"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_numbers_and_tensors_have_the_same_levels(schedule, dtype):
    t = torch.arange(CLEAN, 50).to(dtype)
    at = schedule.level(t)
    assert at.alpha.shape == at.sigma.shape == (51, 1, 1, 1)
    scalars = [schedule.level(k) for k in t.tolist()]
    assert torch.allclose(at.alpha.flatten(), torch.tensor([s.alpha for s in scalars], dtype=torch.float64), atol=1e-15)
    assert torch.allclose(at.sigma.flatten(), torch.tensor([s.sigma for s in scalars], dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("schedule", [linear(50), zero_terminal_snr(scaled_linear(50))], ids=["plain", "zero-snr"])
def test_fractions_are_finite_and_agree_on_both_paths_up_to_both_ends(schedule):
    t = torch.linspace(CLEAN, 49, 401, dtype=torch.float64)
    at = schedule.level(t)
    scalars = torch.tensor([schedule.level(k) for k in t.tolist()], dtype=torch.float64)
    assert torch.allclose(torch.stack(at, -1).view(-1, 2), scalars, rtol=0, atol=1e-15)
    assert torch.isfinite(scalars).all()
    assert (scalars[:, 0].diff() <= 0).all()
    assert torch.allclose(scalars.square().sum(1), torch.ones(401, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_take_the_dtype_of_the_image(dtype):
    x = torch.zeros(3, 1, 2, 2, dtype=dtype)
    at = linear(50).level(torch.tensor([0, 7, 49])).to(x)
    assert at.alpha.dtype == at.sigma.dtype == dtype
    assert linear(50).level(7).to(x) == linear(50).level(7)  # numbers have no dtype


def test_levels_live_on_the_device_of_the_timesteps():
    at = linear(50).level(torch.zeros(3, dtype=torch.long, device="meta"))
    assert at.alpha.device.type == "meta"
    assert at.alpha.dtype == torch.float64
    assert linear(50).level(torch.zeros(3, device="meta")).sigma.device.type == "meta"


@pytest.mark.parametrize("t", [-2, 50, 49.5, -1.5, math.nan, math.inf])
def test_a_timestep_off_the_chain_is_an_error_on_both_paths(t):
    with pytest.raises(ValueError, match=r"-1 \(clean data\) \.\. 49"):
        linear(50).level(t)
    with pytest.raises(ValueError, match=r"-1 \(clean data\) \.\. 49"):
        linear(50).level(torch.tensor([3, t]))


def test_changing_the_callers_betas_does_not_change_the_schedule():
    betas = torch.full((5,), 0.1, dtype=torch.float64)
    schedule = Schedule(betas)
    betas += 1
    assert (schedule.betas == 0.1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_whole_timestep_is_found_again_from_its_noise(name):
    schedule = FAMILIES[name](997)
    found = [schedule.time_of(schedule.noise_to_signal(t)) for t in range(997)]
    assert found == list(range(997))
    assert all(type(t) is int for t in found)
    assert schedule.time_of(0.0) == CLEAN


@pytest.mark.parametrize("schedule", [scaled_linear(), cosine(200), zero_terminal_snr(scaled_linear())])
def test_fractions_go_to_noise_and_back(schedule):
    for t in np.linspace(0, schedule.num_train_timesteps - 2, 333):
        assert schedule.time_of(schedule.noise_to_signal(float(t))) == pytest.approx(t, abs=1e-8)


def test_time_is_linear_in_the_logarithm_of_noise():
    schedule = scaled_linear()
    sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().numpy()
    for noise in (0.03, 0.5, 1.0, 7.7, 14.6):
        wanted = np.interp(np.log(noise), np.log(sigmas), np.arange(1000))
        assert schedule.time_of(noise) == pytest.approx(wanted, abs=1e-9)


def test_noise_outside_the_chain_is_its_nearest_end():
    schedule = scaled_linear()
    assert schedule.time_of(1e-9) == schedule.time_of(0.029) == 0
    assert schedule.time_of(14.7) == schedule.time_of(math.inf) == 999
    with pytest.raises(ValueError, match="at least 0, got -1"):
        schedule.time_of(-1)
    with pytest.raises(ValueError, match="at least 0, got nan"):
        schedule.time_of(math.nan)


def test_pure_noise_has_a_timestep_and_no_neighbourhood():
    schedule = zero_terminal_snr(scaled_linear())
    assert schedule.noise_to_signal(999) == math.inf
    assert schedule.time_of(math.inf) == 999
    assert schedule.time_of(schedule.noise_to_signal(998) * 2) == 998


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [[], [0.1, 1.1], [-0.1], [math.nan], [0.1, math.nan, 0.2]])
def test_betas_outside_the_unit_interval_are_an_error(betas):
    with pytest.raises(ValueError, match=r"betas must be a non-empty list in \[0, 1\]"):
        Schedule(betas)


def test_a_linear_schedule_of_ten_steps_points_to_cosine():
    with pytest.raises(ValueError, match="needs more than 20 steps, cosine works for any number"):
        linear(10)


@pytest.mark.parametrize("total", [0, -3])
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_chain_without_timesteps_is_an_error(make, total):
    with pytest.raises(ValueError, match=f"num_train_timesteps must be at least 1, got {total}"):
        make(total)


def test_wrong_sizes_and_too_short_chains_are_errors():
    with pytest.raises(ValueError, match="must be positive, got 0 and 64"):
        shifted_cosine(image_size=0)
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        zero_terminal_snr(cosine(1))

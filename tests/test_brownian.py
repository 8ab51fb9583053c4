"""Brownian noise: standard normal for each move, of one path a seed whatever the steps and whatever the batch."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Mixture, normal
from torch import Tensor

from diffusion.brownian import BrownianNoise
from diffusion.process import GaussianDiffusion
from diffusion.sampling import SampleNoise, Sampler
from diffusion.schedule import Level, scaled_linear

SHAPE = (1, 64, 64)


def at(rho: float) -> Level:
    return Level(1 / math.hypot(1, rho), rho / math.hypot(1, rho)) if rho < math.inf else Level(0.0, 1.0)


def move(noise: BrownianNoise, high: float, low: float) -> Tensor:
    return noise.between(torch.zeros(len(noise.seeds), *SHAPE, dtype=torch.float64), at(high), at(low))


@pytest.mark.parametrize(
    ("high", "low"), [(14.6, 9.3), (2.0, 1.0), (1.0, 0.9), (0.3, 0.03), (157.0, 0.01), (3.01, 3.0), (math.inf, 40)]
)
def test_noise_of_a_move_is_standard_normal(high, low):
    z = move(BrownianNoise([5, 6]), high, low)
    count = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)  # the fourth moment's own deviation
    assert abs((z[0] * z[1]).mean()) < 4 / math.sqrt(count / 2)


def test_moves_that_do_not_overlap_are_independent():
    noise = BrownianNoise([0])
    moves = [move(noise, high, low) for high, low in pairwise((14.0, 9.0, 4.0, 3.9, 1.2, 0.7, 0.1))]
    for i, a in enumerate(moves):
        for b in moves[:i]:
            assert abs((a * b).mean()) < 4.5 / 64


def test_a_move_is_the_sum_of_its_parts():
    whole, parts = BrownianNoise([3]), BrownianNoise([3])
    rhos = (12.0, 8.0, 5.5, 1.0, 0.6, 0.05)
    total = sum(move(parts, high, low) * math.sqrt(high - low) for high, low in pairwise(rhos))
    assert torch.allclose(move(whole, 12.0, 0.05) * math.sqrt(12.0 - 0.05), total, atol=1e-10)


def test_moves_may_be_asked_in_any_order_and_back():
    forwards, backwards = BrownianNoise([3]), BrownianNoise([3])
    pairs = [(9.0, 4.0), (4.0, 0.5), (9.0, 0.5)]
    first = [move(forwards, *pair) for pair in pairs]
    again = [move(backwards, *pair) for pair in reversed(pairs)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(move(forwards, 0.5, 4.0), -first[1])


def test_near_points_of_the_path_are_near():
    noise = BrownianNoise([0])
    far = move(noise, 2.0, 1.0) * 1.0
    for gap in (1e-2, 1e-4, 1e-7):
        assert (move(noise, 2.0 + gap, 1.0) * math.sqrt(1 + gap) - far).abs().max() < 6 * math.sqrt(gap)


def test_a_samples_path_depends_on_its_seed_alone():
    together, alone = BrownianNoise([7, 8, 9]), BrownianNoise([8])
    for high, low in pairwise((9.0, 4.0, 0.5)):
        assert torch.equal(move(together, high, low)[1:2], move(alone, high, low))


def test_noise_for_another_batch_is_an_error():
    with pytest.raises(ValueError, match="noise for 3 samples was asked for a batch of 2"):
        BrownianNoise([0, 1, 2]).between(torch.zeros(2, 1, 2, 2), at(2), at(1))


def test_noise_has_the_dtype_of_the_image():
    z = BrownianNoise([0, 1]).between(torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), at(2), at(1))
    assert z.dtype == torch.bfloat16


def images(noise: str, steps: int, seeds=range(3), solver: str = "dpmpp_2m_sde") -> Tensor:
    schedule, source = scaled_linear(), SampleNoise(seeds)
    sampler = Sampler(steps, solver=solver, eta=1.0, spacing="karras", clip=None, noise=noise)
    x = source.initial((1, 16, 16)).double()
    return sampler.sample(GaussianDiffusion(schedule), Mixture().denoiser(schedule.level), x, noise=source)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_a_picture_changes_little_with_the_number_of_steps(solver):
    along, fresh = (
        (images(noise, 40, solver=solver) - images(noise, 80, solver=solver)).abs().mean()
        for noise in ("brownian", "fresh")
    )
    assert along < fresh / 3


@pytest.mark.parametrize("solver", ["dpmpp_sde", "dpmpp_2m_sde"])
def test_images_along_a_path_do_not_depend_on_the_batch(solver):
    together = images("brownian", 7, range(3), solver)
    assert torch.equal(together, torch.cat([images("brownian", 7, [seed], solver) for seed in range(3)]))


def test_the_paths_moments_are_the_datas():
    x = images("brownian", 60, range(24))
    mean, std = Mixture().moments
    assert abs(x.mean() - mean) < 4 * std / math.sqrt(x.numel())
    assert abs(x.std() - std) < 0.02


def test_the_path_is_not_the_start_again():
    noise = SampleNoise([4])
    first = noise.brownian().between(normal((1, 1, 4, 4)), at(2), at(1))
    assert not torch.allclose(first.float(), noise.initial((1, 4, 4)))

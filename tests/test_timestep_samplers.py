"""Timestep samplers: the distributions they promise, unbiased weights, and a history that survives a checkpoint."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.draws import SampleDraws
from diffusion.timestep_samplers import ImportanceTimesteps, StratifiedTimesteps, UniformTimesteps

ALL = (UniformTimesteps, StratifiedTimesteps, ImportanceTimesteps)
properties = settings(max_examples=40, deadline=None, derandomize=True)


def warmed(total: int = 6, history: int = 3, **kwargs) -> tuple[ImportanceTimesteps, np.ndarray]:
    """A sampler with a full history, and that history in the order in which it was appended."""
    sampler = ImportanceTimesteps(total, history, **kwargs)
    losses = np.abs(np.random.default_rng(0).normal(size=(history, total))) * np.arange(1, total + 1)
    for row in losses:
        sampler.update(torch.arange(total), torch.tensor(row))
    return sampler, losses.T


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("make", ALL)
def test_timesteps_are_uniform_and_weigh_one_at_the_start(make):
    t, weight = make(20)(SampleDraws(0, range(20000)))
    assert t.shape == weight.shape == (20000,)
    assert t.dtype == torch.int64
    assert weight.dtype == torch.float32
    assert torch.allclose(weight, torch.ones(20000))
    # chi-square with 19 degrees of freedom: 43.8 is exceeded once in 1000 seeds
    assert chi_square(torch.bincount(t, minlength=20), torch.full((20,), 1 / 20)) < 43.8


@pytest.mark.parametrize("make", ALL)
def test_the_draws_decide_everything(make):
    sampler = warmed()[0] if make is ImportanceTimesteps else make(6)
    first, again, other = (sampler(SampleDraws(0, range(64 * step, 64 * step + 64)))[0] for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@properties
@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5))
def test_stratified_timesteps_take_one_from_each_equal_part_of_the_chain(total, batch, seed):
    t, _ = StratifiedTimesteps(total)(SampleDraws(seed, range(batch)))
    assert ((t >= 0) & (t < total)).all()
    for k, step in enumerate(
        sorted(t.tolist())
    ):  # part k is [k T / B, (k + 1) T / B), and t the floor of a point in it
        assert np.floor(k * total / batch) <= step < np.ceil((k + 1) * total / batch)


def test_a_batch_as_long_as_the_chain_visits_every_timestep_once():
    t, _ = StratifiedTimesteps(50)(SampleDraws(0, range(50)))
    assert sorted(t.tolist()) == list(range(50))
    assert t.tolist() != sorted(t.tolist())


def test_stratified_timesteps_have_less_variance():
    sums = {make: torch.tensor([make(1000)(SampleDraws(k, range(16)))[0].double().mean() for k in range(200)])
            for make in (UniformTimesteps, StratifiedTimesteps)}  # fmt: skip
    assert sums[StratifiedTimesteps].std() < 0.2 * sums[UniformTimesteps].std()
    assert abs(sums[StratifiedTimesteps].mean() - 499.5) < 4 * 1000 / 12**0.5 / 16 / 200**0.5


def test_importance_is_guided_diffusions_formula():
    sampler, losses = warmed(uniform_fraction=0.01)
    # LossSecondMomentResampler.weights, written out: sqrt of the second moment, normalised, mixed with uniform.
    weights = np.sqrt(np.mean(losses**2, axis=-1))
    weights /= np.sum(weights)
    weights *= 1 - 0.01
    weights += 0.01 / len(weights)
    assert np.allclose(sampler.probabilities(), weights, rtol=1e-12)
    t, weight = sampler(SampleDraws(0, range(500)))
    assert np.allclose(weight, 1 / (len(weights) * weights[t]), rtol=1e-6)


def test_importance_draws_by_its_probabilities():
    sampler, _ = warmed()
    t, _ = sampler(SampleDraws(0, range(20000)))
    assert chi_square(torch.bincount(t, minlength=6), sampler.probabilities()) < 20.5  # 5 degrees of freedom, 1 in 1000


def test_importance_weights_leave_the_mean_unbiased():
    sampler, _ = warmed()
    f = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    t, weight = sampler(SampleDraws(1, range(40000)))
    of_each = torch.zeros(6).index_put((t,), weight)  # every timestep occurs
    assert (sampler.probabilities() * of_each * f).sum().item() == pytest.approx(f.mean().item(), rel=1e-6)
    draws = weight * f[t]
    assert abs(draws.mean() - f.mean()) < 4 * draws.std() / 200  # 4 standard errors


def test_importance_stays_uniform_until_every_timestep_has_a_full_history():
    sampler = ImportanceTimesteps(4, 2)
    for t in ([0, 1, 2, 3], [0, 1, 2], [0, 0, 0]):
        sampler.update(torch.tensor(t), torch.full((len(t),), 7.0))
        assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    sampler.update(torch.tensor([3]), torch.tensor([50.0]))
    assert not torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_only_the_last_losses_of_each_timestep_count():
    sampler = ImportanceTimesteps(2, 3, uniform_fraction=0.0)
    for loss in (100.0, 100.0, 1.0, 2.0, 3.0):
        sampler.update(torch.tensor([0, 1]), torch.tensor([loss, 1.0]))
    second = np.sqrt((1 + 4 + 9) / 3)
    assert np.allclose(sampler.probabilities(), [second / (second + 1), 1 / (second + 1)])


def test_a_timestep_that_occurs_twice_in_a_batch_is_noted_twice():
    together, apart = ImportanceTimesteps(2, 3), ImportanceTimesteps(2, 3)
    t, losses = torch.tensor([1, 0, 1, 1, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    together.update(t, losses)
    for k in range(5):
        apart.update(t[k : k + 1], losses[k : k + 1])
    assert torch.equal(together.history, apart.history)
    assert sorted(together.history[1].tolist()) == [3, 4, 5]


def test_the_history_rides_in_the_state_dict():
    sampler, _ = warmed()
    sampler.update(torch.tensor([2]), torch.tensor([0.5]))  # the ring stands in the middle
    other = ImportanceTimesteps(6, 3)
    other.load_state_dict(sampler.state_dict())
    for each in (sampler, other):
        each.update(torch.tensor([2, 2, 4]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(sampler.probabilities(), other.probabilities())
    assert torch.equal(sampler(SampleDraws(3, range(64)))[0], other(SampleDraws(3, range(64)))[0])
    assert not list(sampler.parameters())


def test_losses_with_a_gradient_are_noted_without_it():
    sampler = ImportanceTimesteps(2, 1)
    sampler.update(torch.tensor([0]), torch.tensor([2.0], requires_grad=True) * 3)
    assert sampler.history[0].item() == 6
    assert not sampler.history.requires_grad


@pytest.mark.parametrize("make", [UniformTimesteps, StratifiedTimesteps])
def test_losses_change_nothing_for_other_samplers(make):
    told, untold = make(5), make(5)
    told.update(torch.tensor([0, 1]), torch.tensor([1.0, 1e6]))
    drawn = (sampler(SampleDraws(0, range(8))) for sampler in (told, untold))
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize("kwargs", [{"history_per_timestep": 0}, {"uniform_fraction": -0.1}, {"uniform_fraction": 1.1}])
def test_settings_out_of_range_are_errors(kwargs):
    with pytest.raises(ValueError, match=r"history_per_timestep must be >= 1 and uniform_fraction in \[0, 1\]"):
        ImportanceTimesteps(5, **kwargs)

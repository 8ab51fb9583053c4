"""What is random about a sample depends on its number in the run, never on the batch, rank or step it came in."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from training_cases import alone, tiny

from diffusion.draws import SampleDraws, key
from diffusion.randomness import fold
from diffusion.training.run import build_task

properties = settings(max_examples=30, deadline=None, derandomize=True)
KINDS = {
    "normal": lambda draws: draws.normal("eps", (2, 3)),
    "uniform": lambda draws: draws.uniform("t"),
    "stratified": lambda draws: draws.stratified("t"),
    "spread": lambda draws: draws.spread(),
    "within": lambda draws: draws.within("part").normal("eps", (1,)),
}


@properties
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**45), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_however_a_step_is_split_its_samples_draw_the_same(kind, first, sizes):
    step = range(first, first + sum(sizes))
    whole = KINDS[kind](SampleDraws(3, step, step))
    starts = [first + sum(sizes[:i]) for i in range(len(sizes))]
    shares = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    assert torch.equal(whole, torch.cat([KINDS[kind](SampleDraws(3, share, step)) for share in shares]))


@pytest.mark.parametrize("kind", ["normal", "uniform", "stratified", "within"])
def test_other_seeds_and_other_samples_draw_something_else(kind):
    one, *others = (
        KINDS[kind](SampleDraws(seed, range(first, first + 8))) for seed, first in ((0, 0), (1, 0), (0, 8), (0, 4))
    )
    assert not any(torch.equal(one, other) for other in others)


def test_other_purposes_draw_something_else():
    draws = SampleDraws(0, range(8))
    made = [draws.normal("eps", (4,)), draws.normal("offset", (4,)), draws.within("a").normal("eps", (4,))]
    made.append(draws.within("b").normal("eps", (4,)))
    assert len({tensor.numpy().tobytes() for tensor in made}) == 4
    uniform = draws.uniform("eps").float()
    assert not any(torch.isin(uniform, tensor).any() for tensor in made)


def test_the_numbers_are_philoxs_at_the_samples_own_count():
    for number in (0, 7, 2**40 + 1):
        draws = SampleDraws(5, range(number, number + 1))
        raw = np.random.Philox(key=key(5, "t", 1), counter=number).random_raw()
        assert draws.uniform("t").item() == int(raw >> 11) / 2**53
        source = np.random.Generator(np.random.Philox(key=key(5, "eps", 0), counter=number << 64))
        assert np.array_equal(draws.normal("eps", (40,))[0].numpy(), source.standard_normal(40, dtype=np.float32))


def test_noise_is_standard_normal_within_a_sample_and_across_samples():
    noise = SampleDraws(0, range(2000)).normal("eps", (64,)).numpy()
    for values in (noise[0], noise[:, 0], noise[:, -1], noise.ravel()[:50000]):
        assert stats.kstest(values, "norm").pvalue > 1e-3
    rows = np.corrcoef(noise[:40])[np.triu_indices(40, 1)]
    assert abs(rows).max() < 5 / 8  # neighbours share nothing: 780 pairs of 64 numbers
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 4 / noise.size**0.5


def test_uniform_numbers_are_uniform():
    u = SampleDraws(0, range(20000)).uniform("t").numpy()
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_a_step_has_one_stratified_number_in_each_equal_part_and_no_order():
    step = range(640, 704)
    u = SampleDraws(0, step, step).stratified("t")
    assert sorted((u * 64).long().tolist()) == list(range(64))
    assert (u * 64).long().tolist() != list(range(64))
    share = SampleDraws(0, range(656, 664), step).stratified("t")  # of eight, anywhere on the chain
    assert torch.equal(share, u[16:24]) and sorted((share * 8).long().tolist()) != list(range(8))


@given(st.integers(0, 2**30))
@properties
def test_any_samples_in_a_row_are_spread_evenly(first):
    counts = np.bincount((SampleDraws(0, range(first, first + 80)).spread() * 8).long(), minlength=8)
    assert counts.min() >= 8 and counts.max() <= 12


# ---------------------------------------------------------------------------------------------------------------------
# which samples a task counts


def counted_task(tmp_path, *, world_size: int = 1, rank: int = 0, accumulate: int = 3, batches: float = 7):
    task = alone(build_task(tiny(tmp_path)))
    task.trainer.world_size, task.trainer.global_rank = world_size, rank
    task.trainer.accumulate_grad_batches, task.trainer.num_training_batches = accumulate, batches
    return task


def test_the_last_step_of_an_epoch_takes_what_is_left_and_is_a_mean_all_the_same(tmp_path):
    task = counted_task(tmp_path)
    seen = []
    for batch_idx in [*range(7), *range(7)]:
        draws = task.draws(4, batch_idx)
        loss = task.counted(torch.tensor(1.0), 4, batch_idx).item()
        seen.append((draws.numbers.start, draws.step.start, len(draws.step), loss))
    steps = [(0, 12, 1), (12, 12, 1), (24, 4, 3)]  # Lightning divides each loss by three
    steps += [(28 + start, size, factor) for start, size, factor in steps]
    expected = [(at, start, size, factor) for start, size, factor in steps for at in range(start, start + size, 4)]
    assert seen == expected


def test_ranks_take_their_shares_of_a_batch_in_turn(tmp_path):
    tasks = [counted_task(tmp_path, world_size=2, rank=rank, accumulate=1) for rank in range(2)]
    for number in range(3):
        shares = [task.draws(4, number).numbers for task in tasks]
        assert shares == [range(8 * number, 8 * number + 4), range(8 * number + 4, 8 * number + 8)]
        for task in tasks:
            task.counted(torch.tensor(1.0), 4, number)


def test_a_checkpoint_counts_the_samples_of_whole_steps(tmp_path):
    task = counted_task(tmp_path)
    saved = []
    for batch_idx in range(5):
        task.counted(torch.tensor(1.0), 4, batch_idx)
        checkpoint: dict = {}
        task.on_save_checkpoint(checkpoint)
        saved.append((checkpoint["batches_seen"], checkpoint["samples_seen"]))
    assert saved == [(0, 0), (0, 0), (3, 12), (3, 12), (3, 12)]
    other = counted_task(tmp_path, world_size=2, accumulate=1)  # another split of the same batch goes on there
    other.on_load_checkpoint(checkpoint)
    assert other.draws(2, 0).numbers == range(12, 14)


def test_a_checkpoint_from_before_samples_were_counted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="older version, which counted batches"):
        counted_task(tmp_path).on_load_checkpoint({"batches_seen": 4})


def test_repeats_at_the_end_of_validation_do_not_count(tmp_path):
    batch = {"image": torch.zeros(3, 1, 8, 8), "label": [0, 1, 2]}
    found = []
    for rank in range(3):  # 20 samples dealt in batches of 3 x 4: the last eight in shares of three, one of them twice
        task = counted_task(tmp_path, world_size=3, rank=rank)
        task.trainer.val_dataloaders = SimpleNamespace(batches=SimpleNamespace(global_batch_size=12, num_samples=20))
        shown, draws, count = task.validated(batch, 1)
        found.append((draws.numbers, count, len(shown["label"])))
        assert draws.seed == fold(0, "validation")
    assert found == [(range(12, 15), 3, 3), (range(15, 18), 3, 3), (range(18, 20), 2, 2)]
    task.trainer.val_dataloaders.batches.num_samples = 18
    shown, _, count = task.validated(batch, 1)
    assert count == 0 and len(shown["image"]) == 1  # a network in shards needs every rank

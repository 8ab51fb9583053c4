"""Shards on two ranks: no sample twice in an epoch, and a run that goes on in mid-epoch ends with the same bits."""

import pytest
import torch
from rank_cases import SHOWN, run_ranks
from shard_cases import shards_of
from training_cases import assert_same_outcome, tiny

STEPS, STOPPED = 14, 8
WAYS = {
    "indexed": {},
    "indexed, with workers": {"num_workers": 2},
    "stream": {"reading": "stream", "shuffle_buffer": 7},
    "stream, with workers": {"reading": "stream", "shuffle_buffer": 7, "num_workers": 2},
}


def configs(folder, name, how):
    """A run, and the same one in two parts."""
    data = {
        "_target_": "diffusion.data.shards.Shards",
        "shards": str(folder / "shards"),
        "image_size": 8,
        "channels": 1,
        "num_classes": 10,
        "batch_size": 4,
        "samples_per_epoch": 40,
        "horizontal_flip": True,
        "val_fraction": 0.1,
        **how,
    }
    changes = {"data": data, "trainer__devices": 2, "trainer__strategy": "ddp", "trainer__val_check_interval": 3}
    runs = [
        tiny(folder / name / part, **changes, callbacks__samples=None, callbacks__shown=SHOWN)
        for part in ("whole", "parts", "parts")
    ]
    runs[1]["trainer"]["max_steps"] = STOPPED
    return runs


def indices(run_dir):
    """Each rank's batches of samples."""
    return [
        [batch["index"].tolist() for batch in torch.load(run_dir / f"shown_{rank}.pt", weights_only=True)[0]]
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_two_ranks_go_on_in_mid_epoch_and_see_no_sample_twice(tmp_path, how):
    shards_of(tmp_path / "shards", 90)
    run_ranks(configs(tmp_path, "run", how), tmp_path / "configs.json")
    whole, parts = (tmp_path / "run" / name for name in ("whole", "parts"))
    ranks = indices(whole)
    assert [batches[STOPPED:] for batches in ranks] == indices(parts)
    epoch = 5 if "reading" in how else 81 // 8  # batches a rank
    for begin in range(0, STEPS - epoch + 1, epoch):
        seen = [index for batches in ranks for batch in batches[begin : begin + epoch] for index in batch]
        assert len(seen) == len(set(seen)) == 8 * epoch
    assert_same_outcome(whole, parts)

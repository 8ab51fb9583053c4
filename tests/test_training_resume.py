"""Does a run that was stopped anywhere end with the same bits as one that was not?"""

import pytest
import torch
from training_cases import Stopped, assert_same_outcome, tiny

from diffusion.training.run import train

# Six full batches an epoch; seven, of which the last makes an optimizer step of its own when two are accumulated.
EVEN = {"data__batch_size": 200}
ODD = {"data__batch_size": 171, "trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 6}


def stop(step, hook="on_train_batch_end"):
    return {"_target_": "training_cases.StopAt", "step": step, "hook": hook}


def interrupted(run_dir, stops, **changes):
    """Stop a run at each of (step, hook), starting the same command again, and let it end."""
    for at in stops:
        with pytest.raises(Stopped):
            train(tiny(run_dir, callbacks__stop=stop(*at), **changes))
    train(tiny(run_dir, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, made once for each way to train."""
    made = {}

    def run(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            train(tiny(made[key], **changes))
        return made[key]

    return run


@pytest.mark.parametrize("ways", [EVEN, ODD], ids=["even", "odd_accumulated"])
@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, whole, ways, every_n_steps):
    changes = {**ways, "callbacks__checkpoints": checkpoints(every_n_steps)}
    stops = [
        (2,),
        (5, "on_validation_batch_end"),
        (6,),
        (7, "on_train_batch_start"),
        (10, "on_validation_start"),
        (13,),
    ]
    interrupted(tmp_path, stops, **changes)
    assert_same_outcome(whole(**ways), tmp_path)


def checkpoints(every_n_steps):
    target = "diffusion.training.checkpoints.Checkpoints"
    return {"_target_": target, "_partial_": True, "every_n_steps": every_n_steps}


def test_a_run_stopped_after_every_step_ends_with_the_same_bits(tmp_path, whole):
    interrupted(tmp_path, [(step,) for step in range(2, 15)], **EVEN)
    assert_same_outcome(whole(**EVEN), tmp_path)


def test_the_same_command_twice_gives_the_same_bits(tmp_path, whole):
    train(tiny(tmp_path, **EVEN))
    assert_same_outcome(whole(**EVEN), tmp_path)


def test_a_finished_run_started_again_says_so_and_changes_nothing(tmp_path, whole, capsys):
    run_dir = whole(**EVEN)
    before = {path: path.read_bytes() for path in run_dir.rglob("*.*") if path.is_file()}
    train(tiny(run_dir, **EVEN))
    assert "has finished its 14 steps" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_dir.rglob("*.*") if path.is_file()} == before


def test_the_checkpoint_loads_without_unpickling_objects(whole):
    checkpoint = torch.load(whole(**EVEN) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 14

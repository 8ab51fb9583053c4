"""May a run go on with other settings than it began with? Only where its numbers stay, or where that is asked for."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from training_cases import Stopped, tiny

from diffusion.cli import composed
from diffusion.run_folder import read_status
from diffusion.training.lr_schedules import warmup_cosine
from diffusion.training.resume import Start, check_changes, differences, is_harmless, starting_point
from diffusion.training.run import train

QUIET = {"callbacks__samples": None, "trainer__max_steps": 6, "trainer__limit_val_batches": 0}


def quick(run_dir, **changes):
    return tiny(run_dir, **{**QUIET, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("made") / "run"
    with pytest.raises(Stopped):
        train(quick(run_dir, callbacks__stop={"_target_": "training_cases.StopAt", "step": 4}))
    return run_dir


@pytest.fixture
def stopped(made, tmp_path):
    """A run that has three of its six steps."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def last(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# what is harmless


@pytest.mark.parametrize(
    "key",
    [
        *("optimizer.lr", "optimizer._target_", "lr_scheduler.total_steps", "seed", "net.width", "schedule._target_"),
        *("diffusion.parameterization", "task.parameterization", "task.condition_drop", "loss.snr_gamma", "ema.decays"),
        *("data.seed", "data.horizontal_flip", "data.image_size", "timestep_sampler", "num_train_timesteps"),
        *("trainer.gradient_clip_val", "trainer.precision", "trainer.limit_train_batches", "trainer.overfit_batches"),
        *("data.batch_size", "trainer.devices", "trainer.accumulate_grad_batches", "latent_dtype", "autoencoder"),
    ],
)
def test_settings_that_change_the_numbers_are_not_harmless(key):
    assert not is_harmless(key)


@pytest.mark.parametrize(
    "key",
    [
        *("name", "threads", "trainer.max_steps", "trainer.log_every_n_steps", "callbacks.samples.every_n_steps"),
        *("callbacks.checkpoints.keep_last", "logger.wandb.project", "logger", "data.num_workers", "data.root"),
        *("sampler.num_steps", "guidance.guidance_scale", "trainer.accelerator", "trainer.enable_progress_bar"),
        *("forecast", "sweep_dir", "objective", "direction"),
    ],
)
def test_settings_that_leave_the_numbers_alone_are_harmless(key):
    assert is_harmless(key)


def test_every_key_of_the_config_at_the_top_has_been_thought_of():
    """One that is new stops a resumed run of before, unless it is told here to be harmless."""
    harmless = {key for key in composed("train") if is_harmless(key)}
    assert harmless == {
        *("name", "forecast", "threads", "latent_cache", "run_dir", "resume", "sweep_dir", "objective", "direction"),
        *("sampler", "guidance", "callbacks", "logger"),
    }


def test_what_is_not_there_is_null_and_a_tuple_is_a_list():
    one = {"a": 1, "b": None, "c": {}, "d": [1, 2], "resume": "auto", "run_dir": "x", "g": {"h": 1}}
    other = {"a": 1, "d": (1, 2), "e": {"f": None}, "resume": "force", "run_dir": "y", "g": {"h": 2, "i": 3}}
    assert differences(one, other) == {"g.h": (1, 2), "g.i": (None, 3)}


def start(changed, **more):
    return Start(Path("last.ckpt"), 3, held={"samples_a_step": 16}, changed=changed, **more)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "fine"),
    [(16, 1, 1, True), (8, 2, 1, True), (8, 1, 2, True), (4, 2, 2, True), (16, 2, 1, False), (8, 1, 1, False)],
)
def test_a_step_may_be_divided_otherwise_while_its_samples_stay_as_many(batch_size, world_size, accumulate, fine):
    changed = {"data.batch_size": (16, batch_size), "trainer.devices": (1, world_size)}
    trainer = SimpleNamespace(world_size=world_size, accumulate_grad_batches=accumulate)
    if fine:
        check_changes(start(changed), trainer, batch_size)
    else:
        with pytest.raises(ValueError, match=r"data\.batch_size: 16 -> "):
            check_changes(start(changed), trainer, batch_size)
    check_changes(start(changed, forced=True), trainer, batch_size)
    check_changes(start(changed, own=False), trainer, batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# a run that goes on, or does not


def test_a_run_with_other_settings_stops_with_their_list_and_stays_as_it_is(stopped, capsys):
    status, checkpoint = read_status(stopped), (stopped / "checkpoints" / "last.ckpt").read_bytes()
    config = (stopped / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="trained with other settings") as refusal:
        train(quick(stopped, optimizer__lr=5e-4, ema__decays=[0.9], trainer__log_every_n_steps=1, seed=3))
    lines = str(refusal.value).splitlines()
    assert lines[1:-1] == ["  seed: 0 -> 3", "  optimizer.lr: 0.002 -> 0.0005", "  ema.decays: [0.9, 0.5] -> [0.9]"]
    assert "resume=force" in lines[-1] and "another run_dir" in lines[-1]
    assert "changed: trainer.log_every_n_steps: 2 -> 1" in capsys.readouterr().err
    assert read_status(stopped) == status
    assert (stopped / "config.yaml").read_bytes() == config
    assert (stopped / "checkpoints" / "last.ckpt").read_bytes() == checkpoint


def test_harmless_changes_are_listed_and_the_run_goes_on_with_the_same_numbers(stopped, tmp_path, capsys):
    harmless = {"data__num_workers": 1, "trainer__log_every_n_steps": 3, "name": "other", "threads": 1}
    train(quick(stopped, **harmless, callbacks__guard=None))
    err = capsys.readouterr().err
    assert "changed: data.num_workers: None -> 1" in err and "changed: name: tiny -> other" in err
    train(quick(tmp_path / "whole"))
    assert torch.equal(
        last(stopped)["state_dict"]["net.first.weight"], last(tmp_path / "whole")["state_dict"]["net.first.weight"]
    )


class Rates(Callback):
    """Note the learning rate of each step."""

    used: ClassVar[list[float]] = []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])


def test_each_step_after_a_forced_resume_has_the_new_rate(stopped):
    Rates.used.clear()
    train(quick(stopped, resume="force", optimizer__lr=5e-4, callbacks__rates=RATES))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule, rates = warmup_cosine(optimizer, total_steps=14, warmup_steps=3), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert Rates.used == pytest.approx(rates[3:], rel=1e-9)


RATES = {"_target_": "test_resume_settings.Rates"}


def test_force_goes_on_with_the_new_settings(stopped):
    """An optimizer's own settings come back with its state, unless somebody sees to it."""
    before = last(stopped)["optimizer_states"][0]
    train(quick(stopped, resume="force", optimizer__lr=5e-4, optimizer__weight_decay=0.3, lr_scheduler__total_steps=20))
    after = last(stopped)["optimizer_states"][0]
    assert read_status(stopped).state == "finished"
    assert after["param_groups"][0]["weight_decay"] == 0.3
    cosine = (1 + torch.cos(torch.tensor((6 - 3) / (20 - 3) * torch.pi))) / 2
    assert after["param_groups"][0]["lr"] == pytest.approx(5e-4 * float(cosine), rel=1e-5)
    assert after["state"][0]["step"] == before["state"][0]["step"] + 3  # its moments went on
    assert last(stopped)["config"]["optimizer"]["lr"] == 5e-4  # with which the run now goes on without force
    train(
        quick(
            stopped, trainer__max_steps=7, optimizer__lr=5e-4, optimizer__weight_decay=0.3, lr_scheduler__total_steps=20
        )
    )


def test_the_state_of_another_run_begins_with_the_settings_given(stopped, tmp_path, capsys):
    train(quick(tmp_path / "tuned", resume=str(stopped), optimizer__lr=1e-5, lr_scheduler=None))
    assert "going on after step 3" in capsys.readouterr().err
    assert last(tmp_path / "tuned")["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-5
    assert last(tmp_path / "tuned")["global_step"] == 6
    train(quick(tmp_path / "tuned", optimizer__lr=1e-5, lr_scheduler=None, trainer__max_steps=7))  # its own by now


def test_forcing_nothing_changes_nothing(stopped, tmp_path):
    train(quick(stopped, resume="force"))
    train(quick(tmp_path / "whole"))
    one, other = last(stopped), last(tmp_path / "whole")
    assert torch.equal(one["state_dict"]["net.first.weight"], other["state_dict"]["net.first.weight"])
    assert one["lr_schedulers"] == other["lr_schedulers"]


def test_a_checkpoint_from_before_settings_were_kept_is_compared_with_the_folders(stopped):
    for path in (stopped / "checkpoints").iterdir():
        old = torch.load(path, weights_only=True)
        del old["config"], old["samples_a_step"]
        torch.save(old, path)
    with pytest.raises(ValueError, match=r"seed: 0 -> 4"):
        train(quick(stopped, seed=4))
    train(quick(stopped))


def test_a_run_begun_with_its_last_step_done_is_an_error(stopped, tmp_path):
    with pytest.raises(ValueError, match=r"begins after step 3, and trainer\.max_steps=3 leaves nothing to train"):
        train(quick(tmp_path / "tuned", resume=str(stopped), trainer__max_steps=3))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints of something else


@pytest.mark.parametrize("resume", ["auto", "force", "path"])
def test_a_checkpoint_of_another_task_is_refused(stopped, tmp_path, resume):
    run_dir = tmp_path / "other" if resume == "path" else stopped
    config = quick(run_dir, resume=str(stopped) if resume == "path" else resume)
    config["task"] = {"_target_": "diffusion.training.classifier.ClassifierTask"}
    with pytest.raises(ValueError, match="is of a DenoiserTask, and this run trains a ClassifierTask; choose the task"):
        starting_point(config, run_dir)


def test_a_checkpoint_of_another_network_is_refused_with_every_key(stopped, tmp_path):
    with pytest.raises(ValueError, match="does not fit the network of this run, ") as refusal:
        train(quick(tmp_path / "wide", resume=str(stopped), net__width=12))
    assert "mis-shaped net.first.weight: checkpoint (8, 1, 3, 3), network (12, 1, 3, 3)" in str(refusal.value)
    with pytest.raises(ValueError, match="missing net") as refusal:
        train(quick(tmp_path / "wide", resume=str(stopped), net___target_="training_cases.Memory"))
    assert "unexpected net.first.weight" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"\x80\x02not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(stopped, tmp_path, content):
    (tmp_path / "bad.ckpt").write_bytes(content)
    before = read_status(stopped)
    with pytest.raises(ValueError, match=r"cannot resume from .*bad\.ckpt: it is damaged or no checkpoint of train"):
        train(quick(stopped, resume=str(tmp_path / "bad.ckpt")))
    assert read_status(stopped) == before


def test_an_older_checkpoint_of_the_same_run_can_be_gone_back_to(stopped):
    train(quick(stopped, resume=str(stopped / "checkpoints" / "last-1.ckpt")))
    assert last(stopped)["global_step"] == 6
    with pytest.raises(ValueError, match="seed: 0 -> 9"):
        train(quick(stopped, resume=str(stopped / "checkpoints" / "last-1.ckpt"), seed=9, trainer__max_steps=9))

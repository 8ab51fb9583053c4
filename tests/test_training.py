"""Does training do what it says: learn, draw the same numbers, log the truth, and stop cleanly?"""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_cases import TinyNet, alone, assert_same_outcome, tiny

from diffusion.checkpoint import read_header
from diffusion.losses import DenoisingLoss
from diffusion.process import GaussianDiffusion
from diffusion.schedule import cosine
from diffusion.timestep_samplers import UniformTimesteps
from diffusion.training.checkpoints import Interrupted
from diffusion.training.denoiser import DenoiserTask
from diffusion.training.guard import NonFiniteLoss
from diffusion.training.lr_schedules import warmup_constant, warmup_cosine, warmup_linear
from diffusion.training.metrics import MetricsCSV, read_rows
from diffusion.training.run import build_task, train


def rows(run_dir):
    return read_rows(run_dir / "metrics.csv")


def column(run_dir, name):
    return [float(row[name]) for row in rows(run_dir) if row.get(name)]


def weights(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_one_batch_can_be_learnt(tmp_path):
    data = {"net__dropout": 0.0, "net___target_": "training_cases.Memory", "diffusion__parameterization": "x0"}
    short = {"trainer__max_steps": 200, "trainer__log_every_n_steps": 50, "trainer__limit_val_batches": 0}
    quiet = {"callbacks__samples": None, "callbacks__checkpoints__every_n_steps": 1000, "lr_scheduler": None}
    plain = {"timestep_sampler": None, "optimizer__lr": 1e-3, "data__batch_size": 4, "trainer__overfit_batches": 1}
    train(tiny(tmp_path, **data, **short, **quiet, **plain))
    losses = column(tmp_path, "train/loss")
    assert losses[-1] < 0.5 * losses[0]


def test_the_picture_callback_does_not_change_the_weights(tmp_path):
    train(tiny(tmp_path / "with"))
    train(tiny(tmp_path / "without", callbacks__samples=None))
    assert len(list((tmp_path / "with" / "samples").glob("*.png"))) == 8
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_averages_and_logging_do_not_change_the_weights(tmp_path):
    train(tiny(tmp_path / "with"))
    quiet = {"callbacks__samples": None, "callbacks__log": None, "callbacks__progress": None}
    train(tiny(tmp_path / "without", ema=None, trainer__limit_val_batches=0, **quiet))
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert same({k: v for k, v in one.items() if k.startswith("net.")}, other)
    assert read_header(tmp_path / "without" / "model.safetensors").weights == "raw"


def test_another_seed_gives_other_weights(tmp_path):
    train(tiny(tmp_path / "a", trainer__max_steps=1))
    train(tiny(tmp_path / "b", trainer__max_steps=1, seed=1))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_global_seed_of_the_process_changes_nothing(tmp_path):
    torch.manual_seed(1)
    train(tiny(tmp_path / "a", trainer__max_steps=3))
    torch.manual_seed(2)
    train(tiny(tmp_path / "b", trainer__max_steps=3))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains(tmp_path, precision):
    train(tiny(tmp_path, trainer__precision=precision, trainer__max_steps=3))
    assert all(math.isfinite(loss) for loss in column(tmp_path, "train/loss"))
    assert load_file(tmp_path / "model.safetensors")["first.weight"].dtype == torch.float32


def test_a_learned_variance_trains_with_the_hybrid_loss(tmp_path):
    class_ = {"diffusion__variance": "learned", "loss__vlb_weight": 0.001}
    train(tiny(tmp_path, trainer__max_steps=2, net__out_channels=2, **class_))
    assert len(column(tmp_path, "train/loss")) == 1


def test_data_without_classes_train_an_unconditional_network(tmp_path):
    train(tiny(tmp_path, trainer__max_steps=4, net__num_classes=None))
    assert list((tmp_path / "samples").glob("*.png"))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_logged_gradient_norm_is_that_before_clipping(tmp_path, clip):
    changes = {"trainer__max_steps": 1, "trainer__log_every_n_steps": 1, "net__dropout": 0.0, "timestep_sampler": None}
    config = tiny(tmp_path, trainer__gradient_clip_val=clip, trainer__limit_val_batches=0, **changes)
    train(config)
    assert column(tmp_path, "train/grad_norm")[0] == pytest.approx(first_gradient_norm(config), rel=1e-5)


def first_gradient_norm(config):
    """The norm of the first batch's gradients, from the task's own step but without Lightning."""
    from diffusion.training.run import build

    task, data = build_task(config), build(config["data"])
    alone(task).training_step(next(iter(data.train_dataloader())), 0)["loss"].backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in task.parameters()))


def test_accumulating_two_half_batches_is_one_step_of_their_mean(tmp_path):
    train(tiny(tmp_path, trainer__accumulate_grad_batches=2, trainer__max_steps=3, trainer__log_every_n_steps=1))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["batches_seen"] == 6
    ema = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("EMA"))
    assert ema["num_updates"] == 3
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_each_row_of_the_metrics_says_everything_and_appears_once(tmp_path):
    train(tiny(tmp_path))
    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == [2, 4, 5, 6, 8, 10, 12, 14]
    logged = {name for row in table for name, value in row.items() if value}
    losses = {"train/loss", *(f"train/loss_q{q}" for q in (1, 2, 3, 4)), "val/loss", "val/loss_ema", "val/loss_ema_0.5"}
    assert losses | {"train/grad_norm", "train/lr", "train/images_per_second", "train/memory_gb"} <= logged


def test_the_validation_loss_of_the_same_weights_is_the_same(tmp_path):
    frozen = {"optimizer__lr": 0.0, "optimizer__weight_decay": 0.0}
    train(tiny(tmp_path, trainer__val_check_interval=3, **frozen))
    for name in ("val/loss", "val/loss_ema"):
        assert len(column(tmp_path, name)) == 4
        assert len(set(column(tmp_path, name))) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    diverging = {"_target_": "training_cases.Poison", "step": 5}
    with pytest.raises(NonFiniteLoss, match=r"became nan at step 6, in a batch with the timesteps \d.*Try a lower"):
        train(tiny(tmp_path, callbacks__poison=diverging))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert all(value.isfinite().all() for value in load_file(tmp_path / "model.safetensors").values())


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def failing(checkpoint, path, **kwargs):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        save(checkpoint, path, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    said = r"cannot write the checkpoint of step 4 .*: No space left.* needs 0\.0\d MB .* free there; .*last\.ckpt is"
    with pytest.raises(OSError, match=said):
        train(tiny(tmp_path))
    monkeypatch.undo()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    train(tiny(tmp_path))
    train(tiny(tmp_path / "whole"))
    assert_same_outcome(tmp_path / "whole", tmp_path)


def test_a_signal_leaves_a_resumable_checkpoint_and_says_how_to_go_on(tmp_path, capsys):
    signalled = {"_target_": "training_cases.SignalAt", "step": 5}
    with pytest.raises(SystemExit) as end:
        train(tiny(tmp_path, callbacks__signal=signalled))
    assert end.value.code == 143
    assert f"run_dir={tmp_path}" in capsys.readouterr().err
    train(tiny(tmp_path))
    train(tiny(tmp_path / "whole"))
    assert_same_outcome(tmp_path / "whole", tmp_path)


def test_interrupted_names_signal_and_step(tmp_path):
    assert "SIGTERM after step 7" in str(Interrupted(15, 7, tmp_path))


def test_a_resume_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        train(tiny(tmp_path, resume=str(tmp_path / "nowhere.ckpt")))


def test_resuming_from_a_damaged_checkpoint_is_an_error(tmp_path):
    bad = tmp_path / "bad.ckpt"
    for content in (b"", b"PK\x03\x04 half a file", b"\x80\x02not a checkpoint"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no checkpoint"):
            train(tiny(tmp_path / "run", resume=str(bad)))


def test_resume_false_does_not_write_into_another_run(tmp_path):
    train(tiny(tmp_path, trainer__max_steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(tmp_path, resume=False))


def test_a_run_can_start_from_another_runs_folder(tmp_path):
    train(tiny(tmp_path / "a", trainer__max_steps=4))
    train(tiny(tmp_path / "b", trainer__max_steps=6, resume=str(tmp_path / "a")))
    assert [row["step"] for row in rows(tmp_path / "b")] == ["5", "6"]


def test_kept_checkpoints_outlive_the_last(tmp_path):
    train(tiny(tmp_path, callbacks__checkpoints__keep_every_n_steps=6))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["last-1.ckpt", "last.ckpt", "step=0000006.ckpt", "step=0000012.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / kept[2], weights_only=True)["global_step"] == 6


def test_the_model_file_holds_the_average_and_says_so(tmp_path):
    train(tiny(tmp_path))
    header = read_header(tmp_path / "model.safetensors")
    assert (header.weights, header.ema_decay, header.step) == ("ema", 0.9, 14)
    assert header.facts == {
        "shape": [1, 8, 8], "num_classes": 10, "class_names": list("0123456789"), "condition_drop": 0.2
    }  # fmt: skip
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    ema = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("EMA"))
    assert same(ema["averages"]["0.9"], load_file(tmp_path / "model.safetensors"))


def test_fast_dev_run_writes_nothing(tmp_path):
    train(tiny(tmp_path / "run", trainer__fast_dev_run=True))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_metrics_and_pictures(tmp_path):
    node = {"_target_": "diffusion.training.metrics.tensorboard_logger", "_partial_": True}
    train(tiny(tmp_path, logger={"tensorboard": node}, trainer__max_steps=4))
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_wandb_works_offline_and_gets_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    node = {"_target_": "diffusion.training.metrics.wandb_logger", "_partial_": True, "offline": True, "project": "t"}
    train(tiny(tmp_path, logger={"wandb": node}, trainer__max_steps=4))
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"condition_drop" in files[0].read_bytes()


@pytest.mark.slow
def test_compiling_keeps_the_names_of_the_parameters(tmp_path):
    train(tiny(tmp_path, task__compile=True, trainer__max_steps=1, callbacks__samples=None))
    assert set(load_file(tmp_path / "model.safetensors")) == set(TinyNet().state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def task(**settings):
    optimizer = torch.optim.SGD
    return DenoiserTask(TinyNet(), GaussianDiffusion(cosine(50)), loss=DenoisingLoss(), optimizer=optimizer, **settings)


def test_condition_drop_takes_about_its_share_of_labels(tmp_path, monkeypatch):
    seen = []
    plain = DenoiserTask.condition

    def spied(self, batch, *key, drop=None):
        condition = plain(self, batch, *key, drop=drop)
        if drop is not None:
            assert torch.equal(condition["label"] == -1, drop)
            assert torch.equal(condition["label"][~drop], batch["label"][~drop])
            seen.append(drop)
        return condition

    monkeypatch.setattr(DenoiserTask, "condition", spied)
    train(tiny(tmp_path, task__condition_drop=0.3, data__batch_size=64, callbacks__samples=None))
    drop = torch.cat(seen).float()
    assert drop.mean() == pytest.approx(0.3, abs=4 * (0.21 / len(drop)) ** 0.5)


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_a_condition_drop_that_is_no_probability_is_refused(probability):
    with pytest.raises(ValueError, match="condition_drop"):
        task(condition_drop=probability)


def test_a_timestep_sampler_of_another_chain_is_refused():
    with pytest.raises(ValueError, match="num_train_timesteps"):
        task(timestep_sampler=UniformTimesteps(1000))


def rates(schedule, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, used = schedule(optimizer), []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_warmup_rises_linearly_and_never_begins_at_zero():
    assert rates(lambda optimizer: warmup_constant(optimizer, warmup_steps=3), 5) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_falls_to_its_final_fraction():
    used = rates(lambda o: warmup_cosine(o, total_steps=10, warmup_steps=2, final_fraction=0.1), 12)
    assert used[2] == 2.0
    assert used[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert used[10] == used[11] == pytest.approx(0.2)


def test_a_line_falls_as_guided_diffusions_annealing():
    used = rates(lambda o: warmup_linear(o, total_steps=10), 12)
    assert used == pytest.approx([2.0 * (1 - min(step, 10) / 10) for step in range(12)])
    used = rates(lambda o: warmup_linear(o, total_steps=10, warmup_steps=2, final_fraction=0.1), 12)
    assert used[:3] == pytest.approx([2 / 3, 4 / 3, 2.0]) and used[6] == pytest.approx(2.0 * 0.55)
    assert used[10] == used[11] == pytest.approx(0.2)


def test_a_run_shorter_than_its_warmup_only_rises():
    used = rates(lambda optimizer: warmup_cosine(optimizer, total_steps=3, warmup_steps=9), 3)
    assert used == pytest.approx([0.2, 0.4, 0.6])


def test_the_metrics_file_grows_columns_and_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0}, step=2)
    log.save()
    log.log_metrics({"b": 3.0}, step=2)
    log.log_metrics({"a": 4.0, "b": 5.0}, step=3)
    log.finalize("success")
    assert read_rows(path) == [
        {"step": "1", "a": "1", "b": ""}, {"step": "2", "a": "2", "b": "3"}, {"step": "3", "a": "4", "b": "5"}
    ]  # fmt: skip
    with open(path, "a") as file:
        file.write("1,9")  # a row that a kill cut short
    again = MetricsCSV(path, resume_step=2)
    again.log_metrics({"a": 6.0}, step=4)
    again.save()
    assert [(row["step"], row["a"]) for row in read_rows(path)] == [("1", "1"), ("2", "2"), ("4", "6")]

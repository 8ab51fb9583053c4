"""What becomes of a run that is started again: where does it go on, when does it refuse, what does its folder say?"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import Stopped, assert_same_outcome, tiny

import diffusion.training.run
from diffusion.checkpoint import read_header
from diffusion.run_folder import locked, read_record, read_status, write_status
from diffusion.training.checkpoint_files import candidates
from diffusion.training.metrics import MetricsCSV, read_rows
from diffusion.training.run import train

ROOT = Path(__file__).parent.parent
QUIET = {"callbacks__samples": None, "trainer__max_steps": 6, "data__batch_size": 300}


def quick(run_dir, **changes):
    """A run of six steps, four to an epoch, without pictures."""
    return tiny(run_dir, **{**QUIET, **changes})


def stop(step, hook="on_train_batch_end"):
    return {"_target_": "training_cases.StopAt", "step": step, "hook": hook}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that has finished and one that was stopped after four of its steps; to be copied."""
    folder = tmp_path_factory.mktemp("runs")
    train(quick(folder / "whole"))
    with pytest.raises(Stopped):
        train(quick(folder / "stopped", callbacks__stop=stop(5, "on_train_batch_start")))
    return folder


@pytest.fixture
def whole(runs, tmp_path):
    return Path(shutil.copytree(runs / "whole", tmp_path / "whole"))


@pytest.fixture
def stopped(runs, tmp_path):
    return Path(shutil.copytree(runs / "stopped", tmp_path / "stopped"))


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


class SignalIn(Callback):
    """Send this process a signal in the hook of that name."""

    def __init__(self, number, hook):
        self.number = number
        setattr(self, hook, self._send)

    def _send(self, trainer, *args, **kwargs):
        os.kill(os.getpid(), self.number)


def signalled(number, hook):
    return {"_target_": "test_resume.SignalIn", "number": int(number), "hook": hook}


# ---------------------------------------------------------------------------------------------------------------------
# what the folder says


def test_a_finished_run_says_so_and_how_it_was_made(runs):
    status, record = read_status(runs / "whole"), read_record(runs / "whole")
    assert status[:3] == ("finished", 6, 6) and status.error is None
    assert len(record["starts"]) == 1 and record["starts"][0]["device"] == "cpu"
    assert record["starts"][0]["resumed_step"] is None and record["starts"][0]["world_size"] == 1
    assert record["data"]["name"] == "Digits" and record["data"]["num_samples"] == 1797
    assert len(record["data"]["hash"]) == 64
    weights = {name: value for name, value in last(runs / "whole")["state_dict"].items() if name.startswith("net.")}
    assert record["parameters"] == sum(value.numel() for value in weights.values())


def test_a_run_that_failed_says_where_and_why_and_goes_on(stopped, runs):
    assert read_status(stopped)[:3] == ("failed", 5, 6)
    assert read_status(stopped).error == "Stopped: on_train_batch_start at step 5"
    train(quick(stopped))
    assert read_status(stopped).state == "finished"
    assert [start["resumed_step"] for start in read_record(stopped)["starts"]] == [None, 5]
    assert_same_outcome(runs / "whole", stopped)


def test_a_run_that_fails_before_its_first_step_says_why(tmp_path):
    with pytest.raises(ValueError, match="condition_drop"):
        train(quick(tmp_path, task__condition_drop=2.0))
    status = read_status(tmp_path)
    assert status[:2] == ("failed", None)
    assert status.error == "task.condition_drop is a probability in [0, 1], got 2.0"


def test_a_run_is_running_while_it_trains(tmp_path):
    seen = []
    node = {"_target_": "test_resume.Look", "_partial_": True}
    Look.seen = seen
    train(quick(tmp_path, callbacks__look=node))
    assert [status.state for status in seen] == ["running"] * 6
    assert [status.step for status in seen] == [None, 1, 2, 3, 4, 5]  # of the last checkpoint


class Look(Callback):
    """Read the run's status at each step."""

    seen = None

    def __init__(self, config):
        self.run_dir = config["run_dir"]

    def on_train_batch_start(self, *args):
        self.seen.append(read_status(self.run_dir))


@pytest.fixture
def interruptible():
    """Hear SIGINT, which is ignored where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "code", "hook"),
    [
        ("SIGINT", 130, "on_before_backward"),
        ("SIGTERM", 143, "on_before_backward"),
        ("SIGUSR1", 138, "on_before_backward"),
        ("SIGUSR2", 140, "on_before_backward"),
        ("SIGTERM", 143, "setup"),  # before the first step,
        ("SIGINT", 130, "on_fit_start"),
        ("SIGTERM", 143, "teardown"),  # and after the last one
    ],
)
@pytest.mark.usefixtures("interruptible")
def test_a_signal_at_any_time_leaves_a_run_that_goes_on(tmp_path, runs, capsys, name, code, hook):
    with pytest.raises(SystemExit) as end:
        train(quick(tmp_path, callbacks__signal=signalled(getattr(signal, name), hook)))
    assert end.value.code == code
    status = read_status(tmp_path)
    assert status.state == "preempted" and name in status.error
    assert "to go on: " in capsys.readouterr().err
    train(quick(tmp_path))
    assert read_status(tmp_path).state == "finished"
    assert_same_outcome(runs / "whole", tmp_path)


def test_a_second_start_of_a_run_that_is_running_is_refused(stopped):
    before = bytes_of(stopped)
    with locked(stopped), pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        train(quick(stopped))
    assert {**bytes_of(stopped), stopped / ".lock": b""} == before


def test_a_finished_run_started_again_loads_nothing(whole, monkeypatch, capsys):
    before = bytes_of(whole)
    monkeypatch.setattr(diffusion.training.run, "build", None)
    assert train(quick(whole)) == whole
    assert "has finished its 6 steps; raise trainer.max_steps" in capsys.readouterr().err
    assert bytes_of(whole) == before


def test_a_finished_run_goes_on_when_it_is_to_be_longer(whole, tmp_path):
    train(quick(whole, trainer__max_steps=8))
    train(quick(tmp_path / "long", trainer__max_steps=8))
    assert read_status(whole)[:3] == ("finished", 8, 8)
    assert_same_outcome(tmp_path / "long", whole)


def test_a_run_of_epochs_is_finished_when_its_epochs_are(tmp_path, monkeypatch, capsys):
    epochs = {"trainer__max_steps": -1, "trainer__max_epochs": 1}
    train(quick(tmp_path, **epochs))
    assert read_status(tmp_path)[:3] == ("finished", 4, None)
    with monkeypatch.context() as patch:
        patch.setattr(diffusion.training.run, "build", None)
        train(quick(tmp_path, **epochs))
    assert "has finished its 4 steps" in capsys.readouterr().err
    train(quick(tmp_path, trainer__max_steps=-1, trainer__max_epochs=2))
    assert read_status(tmp_path)[:2] == ("finished", 8)


def test_a_run_that_was_killed_before_its_model_was_written_writes_it(whole):
    (whole / "model.safetensors").unlink()
    write_status(whole, "running", step=6, max_steps=6)
    train(quick(whole))
    assert (whole / "model.safetensors").exists() and read_status(whole).state == "finished"


def test_a_finished_run_without_its_checkpoints_neither_goes_on_nor_begins_anew(whole):
    shutil.rmtree(whole / "checkpoints")
    before = bytes_of(whole)
    with pytest.raises(ValueError, match="finished its 6 steps, and its checkpoints are gone"):
        train(quick(whole, trainer__max_steps=8))
    assert bytes_of(whole) == before


def test_data_that_have_changed_are_told(stopped):
    record = yaml.safe_load((stopped / "record.yaml").read_text())
    record["data"]["hash"] = "0" * 64
    (stopped / "record.yaml").write_text(yaml.safe_dump(record))
    with pytest.warns(UserWarning, match="not those that this run began with: 1797 samples of hash 000000000000 then"):
        train(quick(stopped))


# ---------------------------------------------------------------------------------------------------------------------
# damaged checkpoints


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "gone"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(stopped, runs, damage):
    path = stopped / "checkpoints" / "last.ckpt"
    data = bytearray(path.read_bytes())
    weight = last(stopped)["state_dict"]["net.first.weight"].numpy().tobytes()
    at = bytes(data).index(weight)
    data[at + 5] ^= 8
    path.write_bytes({"truncated": data[:-50], "empty": b"", "flipped": data, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
        train(quick(stopped))
    else:
        with pytest.warns(UserWarning, match=r"last\.ckpt is damaged .*going on from the one before, .*last-1\.ckpt"):
            train(quick(stopped))
    assert [start["resumed_step"] for start in read_record(stopped)["starts"]] == [None, 4]
    assert_same_outcome(runs / "whole", stopped)


def test_checkpoints_that_are_all_damaged_are_one_clear_error(stopped):
    for path in candidates(stopped):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be read \(last\.ckpt: .*; last-1\.ckpt: "):
        train(quick(stopped))
    assert read_status(stopped).state == "failed" and "can be read" in read_status(stopped).error


# ---------------------------------------------------------------------------------------------------------------------
# the best ones


def best_steps(run_dir, metric, sign=1):
    rows = [row for row in read_rows(run_dir / "metrics.csv") if row.get(metric)]
    return [int(row["step"]) for row in sorted(rows, key=lambda row: sign * float(row[metric]))]


BEST = {"trainer__val_check_interval": 2, "callbacks__checkpoints__every_n_steps": 5, "trainer__max_steps": 8}


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_the_best_checkpoints_and_the_best_model_stay(tmp_path, mode, sign):
    best = {"callbacks__checkpoints__best": "val/loss", "callbacks__checkpoints__best_mode": mode}
    train(quick(tmp_path, **BEST, **best, callbacks__checkpoints__keep_best=2))
    first, second, *_ = best_steps(tmp_path, "val/loss", sign)
    folder = tmp_path / "checkpoints"
    assert torch.load(folder / "best.ckpt", weights_only=True)["global_step"] == first
    kept = sorted(path.name for path in folder.glob("best_*"))
    assert kept == sorted(f"best_step={step:07d}.ckpt" for step in (first, second))
    assert read_header(tmp_path / "best.safetensors").step == first


@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_resumed_run_keeps_the_same_best(tmp_path, at):
    best = {"callbacks__checkpoints__best": "val/loss_ema", "callbacks__checkpoints__best_mode": "max"}
    train(quick(tmp_path / "a", **BEST, **best))
    with pytest.raises(Stopped):
        train(quick(tmp_path / "b", **BEST, **best, callbacks__stop=stop(at)))
    for path in [*(tmp_path / "b" / "checkpoints").glob("best*"), *(tmp_path / "b").glob("best*")]:
        if best_steps(tmp_path / "b", "val/loss_ema", -1)[0] == last(tmp_path / "b")["global_step"]:
            path.unlink()  # as a kill right after the checkpoint would leave it
    train(quick(tmp_path / "b", **BEST, **best))
    assert names(tmp_path / "b" / "checkpoints") == names(tmp_path / "a" / "checkpoints")
    one, other = (torch.load(tmp_path / run / "checkpoints" / "best.ckpt", weights_only=True) for run in "ab")
    assert one["global_step"] == other["global_step"]
    assert torch.equal(one["state_dict"]["net.first.weight"], other["state_dict"]["net.first.weight"])
    assert (tmp_path / "a" / "best.safetensors").exists() and (tmp_path / "b" / "best.safetensors").exists()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_best_that_is_not_measured_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"best=val/los, but validation measures val/loss, val/loss_ema.*best=null"):
        train(quick(tmp_path, callbacks__checkpoints__best="val/los"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keep_last", 0, "keep_last is a number of checkpoints >= 1, got 0"),
        ("keep_best", 0, "keep_best is a number of checkpoints >= 1, got 0"),
        ("every_n_steps", 0, "every_n_steps is a number of optimizer steps >= 1, got 0"),
        ("best_mode", "least", "best_mode is min or max, got 'least'"),
    ],
)
def test_numbers_of_checkpoints_that_make_no_sense_are_refused(tmp_path, name, value, message):
    changes = {f"callbacks__checkpoints__{name}": value, "callbacks__checkpoints__best": "val/loss"}
    with pytest.raises(Exception, match=message):
        train(quick(tmp_path, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# loggers


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    node = {"tensorboard": {"_target_": "diffusion.training.metrics.tensorboard_logger", "_partial_": True}}
    settings = {"trainer__log_every_n_steps": 1, "callbacks__checkpoints__every_n_steps": 4, "logger": node}
    with pytest.raises(Stopped):
        train(quick(tmp_path, **settings, callbacks__stop=stop(6)))  # two steps beyond the checkpoint
    train(quick(tmp_path, **settings))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    written = [float(row["train/loss"]) for row in read_rows(tmp_path / "metrics.csv")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(written, rel=1e-6)


def test_a_full_disk_leaves_the_rows_that_are_there(tmp_path, monkeypatch):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0}, step=2)
    before = (tmp_path / "metrics.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *args, **kwargs: FullFile(path))
        with pytest.raises(OSError, match=r"cannot write .*metrics\.csv: No space left on device"):
            log.log_metrics({"a": 3.0}, step=3)
    assert (tmp_path / "metrics.csv").read_bytes() == before


class FullFile:
    """A file that takes three bytes and no more."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def write(self, text):
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_APPEND), "w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")


# ---------------------------------------------------------------------------------------------------------------------
# ranks

RANK = """
import os, subprocess, sys, time
from diffusion.ranks import end_with_first_rank
end_with_first_rank()
if "LOCAL_RANK" in os.environ:
    print("here", flush=True)
else:
    subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env={**os.environ, "LOCAL_RANK": "1"})
time.sleep(120)
"""


def test_a_rank_ends_when_the_process_that_started_it_is_killed():
    program = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert program.stdout.readline() == "here\n"
    program.kill()
    program.wait()
    with program.stdout:
        assert program.stdout.read() == ""  # which ends when the last process that holds it has


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id_and_on_the_same_axis(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    target = "diffusion.training.metrics.wandb_logger"
    node = {"wandb": {"_target_": target, "_partial_": True, "offline": True, "project": "t"}}
    settings = {"trainer__log_every_n_steps": 1, "callbacks__checkpoints__every_n_steps": 2, "logger": node}
    with pytest.raises(Stopped):
        train(quick(tmp_path, **settings, callbacks__stop=stop(5, "on_train_batch_start")))
    train(quick(tmp_path, **settings))
    one, other = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert one.name == other.name  # which has the id in it
    assert "wandb sync" in capsys.readouterr().err
    assert logged(one) == [1, 2, 3, 4, 5]
    assert logged(other) == [5, 6]  # step 5 was after the checkpoint; W&B takes no step twice


def logged(path):
    """The steps at which a file of W&B's has rows. It is a log of LevelDB's, here of one block: no record is parted."""
    from wandb.proto import wandb_internal_pb2

    data, at, steps = path.read_bytes(), 7, []
    assert len(data) < 2**15
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")  # after four bytes of checksum, before one of type
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(items["trainer/global_step"]))
            assert record.history.step.num == steps[-1]
    return steps

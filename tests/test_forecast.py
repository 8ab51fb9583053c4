"""Does the forecast tell the truth, and leave nothing behind? Against closed forms, real tensors and the run itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from autoencoder_cases import GAN, tiny_autoencoder
from lightning.pytorch import Callback, Trainer
from torch import nn
from training_cases import assert_same_outcome, tiny

from diffusion.training import forecast as words
from diffusion.training import forecast_run, rehearsal, run
from diffusion.training.ema import EMA
from diffusion.training.footprint import LiveBytes, StepNeeds, Twin, parameter_counts, resized, size_of
from diffusion.training.interruptions import times_due, validations

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def twin_of(folder: Path, **changes: Any) -> tuple[Twin, dict[str, Any]]:
    """A tiny run's twin, and a batch of its data."""
    config = tiny(folder, **changes)
    task, data = run.build_task(config), run.build(config["data"])
    trainer = run.build_trainer(config, folder, run.build_callbacks(config, {}, data), None)
    data.setup("fit")
    return Twin(task, trainer, CPU), resized(data.train_set.__getitems__([(0, 0)]), data.batch_size)


# -- what a step needs -------------------------------------------------------------------------------------------------


def flops_of_tiny_net(batch: int, width: int = 8) -> int:
    """Forward and backward of `TinyNet`: 2 per multiply-add; no gradient goes to the noisy image and to the time."""
    pixels = batch * 8 * 8
    first, time, last = pixels * 9 * width, batch * width, pixels * 9 * width
    return 2 * (2 * first + 2 * time + 3 * last)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_flops_are_those_of_the_closed_form(tmp_path: Path, accumulated: int) -> None:
    twin, batch = twin_of(tmp_path, data__batch_size=24, trainer__accumulate_grad_batches=accumulated)
    assert twin.needs(batch).flops == accumulated * flops_of_tiny_net(24)


class Sizes(Callback):
    """What a real step really holds."""

    def on_before_optimizer_step(self, trainer: Trainer, task: Any, optimizer: Any) -> None:
        self.gradients = size_of(p.grad for p in task.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: Trainer, task: Any, *args: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.optimizer = size_of(
            value for state in states for value in state.values() if isinstance(value, torch.Tensor)
        )
        averages = next(callback for callback in trainer.callbacks if isinstance(callback, EMA)).averages.values()
        self.ema = size_of(tensor for average in averages for tensor in average.values())
        self.parameters = size_of([*task.parameters(), *task.buffers()])


def test_parameters_gradients_optimizer_and_averages_are_those_of_the_real_tensors(tmp_path: Path) -> None:
    config, sizes = tiny(tmp_path, trainer__max_steps=2), Sizes()
    task, data = run.build_task(config), run.build(config["data"])
    trainer = run.build_trainer(config, tmp_path, [run.build(config["ema"]), sizes], None)
    held = Twin(task, trainer, CPU).held
    trainer.fit(task, datamodule=data)
    assert held == {name: getattr(sizes, name) for name in ("parameters", "gradients", "optimizer", "ema")}
    assert parameter_counts(task) == (sum(p.numel() for p in task.net.parameters()), 0)


def test_live_bytes_after_the_forward_pass_are_the_saved_tensors_and_the_answer() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Sigmoid())
    x, saved = torch.randn(5, 1, 8, 8), {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net(x)
    for tensor in (x, *net.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    live = LiveBytes([x, *net.parameters()])
    with live:
        answer = net(x)  # the sigmoid saves its answer
        assert live.now == sum(saved.values()) == 4 * 5 * (4 * 64 + 2 * 36)  # of tanh and sigmoid
        answer.sum().backward()
    assert live.peak > live.now
    del answer
    net.zero_grad()
    assert live.now == 0


def test_activations_grow_with_the_batch_and_nothing_else_does(tmp_path: Path) -> None:
    twin, batch = twin_of(tmp_path)
    small, large = (twin.needs(resized(batch, size)) for size in (100, 200))
    assert large.activations == pytest.approx(2 * small.activations, rel=0.05)
    assert [getattr(small, name) for name in words.MEMORY[:-1]] == [getattr(large, name) for name in words.MEMORY[:-1]]


def test_half_precision_halves_what_the_network_keeps(tmp_path: Path) -> None:
    full, batch = twin_of(tmp_path)
    half, _ = twin_of(tmp_path, trainer__precision="bf16-mixed")
    assert half.needs(batch).activations < full.needs(batch).activations
    true_half, _ = twin_of(tmp_path, trainer__precision="bf16-true")
    assert true_half.held["gradients"] == full.held["gradients"] / 2


def test_a_twin_touches_neither_the_task_nor_its_counters_nor_random_numbers(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    task, data = run.build_task(config), run.build(config["data"])
    trainer = run.build_trainer(config, tmp_path, [], None)
    data.setup("fit")
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    state, order = torch.get_rng_state(), data.train_set
    Twin(task, trainer, CPU).needs(resized(order.__getitems__([(0, 0)]), 8))
    assert torch.equal(torch.get_rng_state(), state) and task.batches_seen == 0 and task._trainer is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())


# -- how often, how much -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps", "times"), [(500, 1500, 3), (500, 1501, 4), (1000, 10, 1), (1, 7, 7)])
def test_events_are_counted_with_the_last_step(every: int, steps: int, times: int) -> None:
    assert (
        times_due(every, steps) == times == len({step for step in range(1, steps + 1) if step % every == 0} | {steps})
    )


def test_validations_are_counted_in_batches(tmp_path: Path) -> None:
    class Counted(Callback):
        count = 0

        def on_train_start(self, trainer: Trainer, task: Any) -> None:
            self.told = validations(trainer, trainer.max_steps)

        def on_validation_end(self, *args: Any) -> None:
            self.count += 1

    for changes in (
        {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 4},
        {"trainer__check_val_every_n_epoch": 1, "trainer__val_check_interval": 0.5},
        {"trainer__limit_val_batches": 0},
    ):
        config, counted = tiny(tmp_path, trainer__max_steps=12, **changes), Counted()
        task, data = run.build_task(config), run.build(config["data"])
        run.build_trainer(config, tmp_path, [counted], None).fit(task, datamodule=data)
        assert counted.told == counted.count


def test_the_largest_batch_lies_on_the_line_through_two() -> None:
    def needs(batch: int) -> StepNeeds:
        return StepNeeds(batch, 0, 0, 0, 0, 0, 0, peak=1000 + 30 * batch)

    assert words.largest_batch(needs(10), needs(20), 1000 + 30 * 77 + 29) == 77
    assert words.largest_batch(needs(10), needs(20), 999) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.seconds(0.0042), "4.2 ms"),
        (words.seconds(59.94), "59.9 s"),
        (words.seconds(200), "3 min 20 s"),
        (words.seconds(18_120), "5 h 2 min"),
        (words.seconds(273_600), "3 d 4 h"),
        (words.size(1536), "1.5 KiB"),
        (words.size(3 * 2**30), "3 GiB"),
        (words.count(7_046_823_936), "7.05 G"),
        (words.count(12), "12"),
    ],
)
def test_numbers_are_said_in_units_that_fit(said: str, expected: str) -> None:
    assert said == expected


# -- forecast=true -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal of few steps."""
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "WARM_UP", 1)


@pytest.mark.usefixtures("hasty")
def test_a_forecast_leaves_nothing_and_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run.train(tiny(tmp_path / "run", forecast=True))
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for part in ("parameters", "FLOPs", "memory", "activations", "a step", "in all", "disk", "largest batch"):
        assert part in said


@pytest.mark.usefixtures("hasty")
def test_a_forecast_counts_everything_that_interrupts_a_run(tmp_path: Path) -> None:
    found = forecast_run.forecast(
        tiny(tmp_path / "run", trainer__max_steps=20, callbacks__checkpoints__every_n_steps=7)
    )
    assert {event.name: event.times for event in found.events} == {
        "validation": 4,
        "sample grid": 5,
        "checkpoints": 3,
        "end": 1,
    }
    between = sum(event.times * event.seconds for event in found.events)
    assert found.total_seconds == pytest.approx(found.start_seconds + 20 * found.seconds_per_step + between)
    assert 0 < found.data_seconds < found.seconds_per_step and found.max_steps == 20
    assert found.largest_batch == 1200  # all of the training images
    assert sum(found.memory[name] for name in words.MEMORY) < found.memory["total"]


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_a_discriminator_that_begins_late_makes_two_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[rehearsal.Phase] = []
    finish = rehearsal.Rehearsal.finish
    monkeypatch.setattr(rehearsal.Rehearsal, "finish", lambda self, t: (phases.extend(self.phases), finish(self, t)))
    found = forecast_run.forecast(tiny_autoencoder(tmp_path / "run", **GAN))
    plain = forecast_run.forecast(tiny_autoencoder(tmp_path / "run"))
    assert [phase.steps for phase in phases] == [4, 10, 14]
    assert phases[0].needs.flops == phases[2].needs.flops == plain.flops_per_step < found.flops_per_step
    assert found.flops_per_step == phases[1].needs.flops
    assert found.parameters > plain.parameters and found.memory["optimizer"] > plain.memory["optimizer"]
    assert found.seconds_per_step == pytest.approx((4 * phases[0].seconds + 10 * phases[1].seconds) / 14)


@pytest.mark.usefixtures("hasty")
def test_a_step_that_does_not_fit_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path / "run")
    fits = forecast_run.forecast(config)
    monkeypatch.setattr(run, "fit", lambda *args: pytest.fail("it trained"))
    for module in (rehearsal, forecast_run):  # found out with the first batch, or before the task is built
        monkeypatch.setattr(module, "available_memory", lambda device: 10_000)
        found = forecast_run.forecast(config)
        assert found.seconds_per_step is None and "does not fit" in str(found)
        assert found.flops_per_step == fits.flops_per_step and found.parameters == fits.parameters
        assert {name: found.memory[name] for name in words.MEMORY} == {name: fits.memory[name] for name in words.MEMORY}
    assert found.largest_batch == 0
    assert list(tmp_path.iterdir()) == []


# -- at the start of each run ------------------------------------------------------------------------------------------

START = {"_target_": "diffusion.training.forecast.StartForecast"}


def with_forecast(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "callbacks": {"forecast": START, **config["callbacks"]}}


def test_the_forecast_of_a_run_leaves_its_bits_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run.train(tiny(tmp_path / "without"))
    capsys.readouterr()
    run.train(with_forecast(tiny(tmp_path / "with")))
    assert_same_outcome(tmp_path / "without", tmp_path / "with")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("forecast: ")]
    assert len(said) == 2 and "FLOPs a step" in said[0] and "in all" in said[1]
    found = yaml.safe_load((tmp_path / "with" / "forecast.yaml").read_text(encoding="utf-8"))
    assert found["flops_per_step"] == flops_of_tiny_net(200)
    assert found["memory"]["total"] >= found["memory"]["process"] > 0 and found["total_seconds"] > 0


def test_a_run_goes_on_where_its_forecast_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a network that tensors without data cannot pass")

    monkeypatch.setattr(Twin, "needs", fail)
    run.train(with_forecast(tiny(tmp_path, trainer__max_steps=2)))
    assert "no forecast: RuntimeError: a network that" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "forecast.yaml").exists()


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_forecasts_two_processes_once(tmp_path: Path) -> None:
    overrides = ["trainer=cpu_ddp", "trainer.max_steps=30"]
    command = [sys.executable, "train.py", "forecast=true", *overrides, f"run_dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest batch") == 1
    assert list(tmp_path.iterdir()) == []

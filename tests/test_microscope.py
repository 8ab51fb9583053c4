"""Does the loss microscope see what is there, and does looking change nothing?"""

import math

import pandas as pd
import pytest
import torch
from hint_cases import MICROSCOPE, SMALL_NET, short
from rank_cases import run_ranks
from test_latent_denoiser import text_run
from test_training_classifier import tiny_classifier
from tiny import random_net
from torch import nn
from training_cases import StopAt, Stopped, assert_same_outcome, tiny

from diffusion.losses import DenoisingLoss
from diffusion.process import GaussianDiffusion, q_sample
from diffusion.report.microscope import COLUMNS, read, read_hints
from diffusion.schedule import cosine, linear
from diffusion.training import microscope
from diffusion.training.autoencoder import AutoencoderTask
from diffusion.training.looks import (
    OFFSETS,
    InputNoise,
    Lens,
    Subject,
    per_x0,
    rank_facts,
    schedule_facts,
    trivial_error,
    undisturbed,
)
from diffusion.training.run import train

LOOKING = {"callbacks__microscope": {**MICROSCOPE, "every_n_steps": 3}}


def images(count=12, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def conditional(count=12):
    return Subject(images(count), {"label": torch.arange(count) % 10})


# ---------------------------------------------------------------------------------------------------------------------
# looking changes nothing


def settings(**changes):
    """A run whose network has dropout and whose timestep sampler remembers losses; the microscope beside the rest."""
    return {"trainer__max_steps": 8, **changes}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_is_the_same_bits_with_and_without_it(tmp_path, accumulated):
    how = settings(trainer__accumulate_grad_batches=accumulated)
    config = tiny(tmp_path / "with", **how)
    config["callbacks"] = {"microscope": LOOKING["callbacks__microscope"], **config["callbacks"]}
    train(config)
    train(tiny(tmp_path / "without", **how))
    assert_same_outcome(tmp_path / "with", tmp_path / "without")
    assert read(tmp_path / "with")["step"].unique().tolist() == [0, 3, 6, 8]


def test_a_look_leaves_gradients_modes_and_random_states_as_they_were():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5), nn.BatchNorm2d(1))
    net[1].eval()  # frozen on purpose
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    before = torch.get_rng_state()
    with undisturbed(net, None, device=torch.device("cpu")):
        assert not any(part.training for part in net.modules())
        torch.rand(3)
        diffusion = GaussianDiffusion(cosine(20))
        Lens(Told(net), diffusion, DenoisingLoss(), size=5).row(Subject(images(), {}), 9)
    assert [part.training for part in net] == [True, False, True] and net.training
    assert torch.equal(torch.get_rng_state(), before)
    assert net[0].weight.grad.item() == 7.0 and net[0].bias.grad is None
    assert net[2].num_batches_tracked == 0


class Told(nn.Module):
    """A network that does not listen to the time."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **condition):
        return self.net(x)


def test_a_run_that_is_stopped_and_resumed_has_the_same_files(tmp_path, monkeypatch):
    from diffusion.training import run

    steps = {"trainer__max_steps": 8, "callbacks__checkpoints__every_n_steps": 1, **LOOKING}
    train(short(tmp_path / "whole", ema___target_="hint_cases.FrozenEMA", **steps))
    config = short(tmp_path / "parts", ema___target_="hint_cases.FrozenEMA", **steps)
    build = run.build_callbacks
    monkeypatch.setattr(run, "build_callbacks", lambda *args: [*build(*args), StopAt(5)])
    with pytest.raises(Stopped):
        train(config)
    monkeypatch.undo()
    train(config)
    for name in ("microscope.csv", "hints.yaml"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()
    assert [hint["name"] for hint in read_hints(tmp_path / "parts")] == ["EMA frozen"]


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    (tmp_path / "microscope.csv").write_text("step,t,loss\n3,0,1.0\n6,0,0.5\n")
    (tmp_path / "hints.yaml").write_text("- {name: a, since: 3, until: 6}\n- {name: b, since: 6, until: 6}\n")
    callback = microscope.Microscope(data=None, config={})
    callback._take_up(tmp_path, 4)
    assert [row["step"] for row in callback.rows] == ["3"]
    assert callback.hints == {"a": {"name": "a", "since": 3, "until": 4}}


# ---------------------------------------------------------------------------------------------------------------------
# the numbers


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("size", [12, 5])
def test_a_row_has_the_loss_and_the_gradient_of_one_batch_at_its_timestep(kind, size):
    net, diffusion, loss = random_net({"net": SMALL_NET}), GaussianDiffusion(cosine(50), kind), DenoisingLoss()
    subject, t = conditional(), 30
    lens = Lens(net, diffusion, loss, size=size)
    row = lens.row(subject, t)
    at = torch.full((12,), t)
    loss(diffusion, net, subject.x0, at, lens.noise(subject.x0, t), subject.condition).loss.mean().backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None))
    with torch.no_grad():
        mean = float(loss(diffusion, net, subject.x0, at, lens.noise(subject.x0, t), subject.condition).loss.mean())
    assert row["loss"] == pytest.approx(mean, rel=1e-5) == pytest.approx(row["mse"], rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert lens.error(subject, t) == pytest.approx(mean, rel=1e-5)
    assert row[f"{kind}_error"] == pytest.approx(mean / goal_square(diffusion, lens, subject, t), rel=1e-5)


def goal_square(diffusion, lens, subject, t):
    goal = diffusion.target(subject.x0, lens.noise(subject.x0, t), torch.full((len(subject.x0),), t))
    return float(goal.square().mean())


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_network_that_knows_the_answer_has_no_error(kind):
    subject, t, diffusion = Subject(images(), {}), 30, GaussianDiffusion(cosine(50), kind)

    class Oracle(nn.Module):
        def __init__(self):
            super().__init__()
            self.times = nn.Parameter(torch.ones(()))

        def forward(self, x, at):
            return self.times * diffusion.target(subject.x0, lens.noise(subject.x0, t), at)

    lens = Lens(Oracle(), diffusion, DenoisingLoss())
    row = lens.row(subject, t)
    assert max(row["mse"], row["x0_mse"], row[f"{kind}_error"]) < 1e-10
    assert row[f"{kind}_correlation"] == pytest.approx(1.0)
    others = [row[f"{other}_error"] for other in ("eps", "x0", "v") if other != kind]
    assert min(others) > 0.2


def test_the_trivial_error_is_that_of_the_best_line():
    """Against the least squares of x0 on x_t, on numbers that have nothing but mean and variance."""
    draws = torch.Generator().manual_seed(0)
    x0 = 0.3 + 0.8 * torch.randn(200_000, dtype=torch.float64, generator=draws)
    alpha, sigma = 0.6, 0.8
    x = alpha * x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=draws)
    table = torch.stack([x, torch.ones_like(x)], 1)
    rest = x0 - table @ torch.linalg.lstsq(table, x0).solution
    assert trivial_error(0.64, alpha, sigma) == pytest.approx(float(rest.square().mean()), rel=0.01)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_an_error_of_x0_is_carried_to_the_answers_space(kind):
    diffusion, t = GaussianDiffusion(cosine(50), kind), torch.tensor([20])
    at = diffusion.schedule.level(20)
    x0, eps = images(1), images(1, seed=1)
    x = q_sample(x0, eps, at)
    answer = diffusion.target(x0, eps, t) + 0.1
    off = float((diffusion.prediction(answer, x, t).x0 - x0).square().mean())
    assert off * per_x0(kind, at.alpha, at.sigma) == pytest.approx(0.01, rel=1e-4)


def test_the_noise_is_the_same_in_every_run_and_another_at_each_timestep():
    one, other = (Lens(None, GaussianDiffusion(cosine(50)), size=size) for size in (3, 8))
    x0 = images()
    assert torch.equal(one.noise(x0, 5), other.noise(x0, 5))
    assert not torch.equal(one.noise(x0, 5), one.noise(x0, 6))


# ---------------------------------------------------------------------------------------------------------------------
# the noise of training's inputs


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000), cosine(40)], ids=["linear", "cosine", "short"])
def test_the_likeliest_timestep_is_that_of_the_noise(offset, schedule):
    diffusion, draws = GaussianDiffusion(schedule), torch.Generator().manual_seed(1)
    noise = InputNoise(torch.device("cpu"))
    for _ in range(20):
        t = torch.randint(2, min(20, schedule.num_train_timesteps // 4), (64,), generator=draws)
        x0 = torch.rand(64, 1, 8, 8, generator=draws)
        x = q_sample(x0, torch.randn(x0.shape, generator=draws), schedule.level(t + offset))
        noise.add(diffusion, x0, x, t)
    facts = noise.facts()
    assert OFFSETS[max(range(5), key=facts["likelihoods"].__getitem__)] == offset


def test_the_noise_has_the_schedules_variance_and_scaled_times_are_understood():
    diffusion, draws = GaussianDiffusion(cosine(200), time_scale=5.0), torch.Generator().manual_seed(1)
    noise = InputNoise(torch.device("cpu"))
    t = torch.arange(200)
    x0 = torch.rand(200, 1, 16, 16, generator=draws)
    noise.add(diffusion, x0, q_sample(x0, torch.randn(x0.shape, generator=draws), diffusion.schedule.level(t)), 5.0 * t)
    assert noise.facts()["ratios"] == pytest.approx([1.0] * 8, abs=0.06)
    assert noise.facts()["counts"] == [25] * 8


def test_what_varies_in_x0_itself_is_allowed_for():
    diffusion, draws = GaussianDiffusion(cosine(200)), torch.Generator().manual_seed(1)
    noise, t = InputNoise(torch.device("cpu")), torch.arange(200)
    x0 = torch.zeros(200, 1, 16, 16)
    drawn = x0 + 0.5 * torch.randn(x0.shape, generator=draws)
    x = q_sample(drawn, torch.randn(x0.shape, generator=draws), diffusion.schedule.level(t))
    noise.add(diffusion, x0, x, t, torch.full((200,), 0.25))
    assert noise.facts()["ratios"] == pytest.approx([1.0] * 8, abs=0.06)


def test_ranks_are_compared_in_pairs():
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 4, 64, generator=draws)
    t = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 2, 1, 1]])
    apart = rank_facts(t, noise)
    assert apart["same_timesteps"] == 0.25 and apart["noise_correlation"] < 0.2 and apart["world_size"] == 3
    noise[2] = noise[0]
    assert rank_facts(t, noise)["noise_correlation"] == pytest.approx(1.0)
    assert rank_facts(t, None)["noise_correlation"] is None


def test_the_chains_ends_are_those_of_the_schedule():
    facts = schedule_facts(GaussianDiffusion(linear(1000)))
    assert facts["last_alpha"] == pytest.approx(math.sqrt(4.0358e-5), rel=1e-3)
    assert facts["first_sigma"] == pytest.approx(0.01)
    assert schedule_facts(GaussianDiffusion(linear(1000, beta_end=0.2)))["dead"] > 0.6


# ---------------------------------------------------------------------------------------------------------------------
# every kind of run


def columns(run_dir):
    table = read(run_dir)
    last = table[table["step"] == table["step"].max()]
    return {name for name in last if last[name].notna().all()}


DENOISER = set(COLUMNS) - {"accuracy"}


def test_a_conditional_denoiser_fills_every_column(tmp_path):
    train(short(tmp_path, trainer__max_steps=2))
    assert columns(tmp_path) == DENOISER
    assert read(tmp_path)["t"].unique().tolist() == [0, 20, 40, 59, 79, 99]


def test_without_condition_and_average_their_columns_stay_empty(tmp_path):
    train(short(tmp_path, net={**SMALL_NET, "num_classes": None}, ema=None, trainer__max_steps=2))
    assert columns(tmp_path) == DENOISER - {"mse_null", "mse_ema"}


def test_a_model_of_texts_is_asked_with_and_without_them(tmp_path):
    train(text_run(tmp_path, trainer__max_steps=2, callbacks__samples=None, **LOOKING))
    assert columns(tmp_path) == DENOISER


def test_a_learned_variance_and_half_precision_are_looked_at(tmp_path):
    hybrid = {"diffusion__variance": "learned", "loss__vlb_weight": 0.001, "net": {**SMALL_NET, "out_channels": 2}}
    train(short(tmp_path, trainer__max_steps=2, trainer__precision="bf16-mixed", **hybrid))
    table = read(tmp_path)
    assert columns(tmp_path) == DENOISER and (table["loss"] > table["mse"]).all()


@pytest.mark.parametrize("noised", [True, False])
def test_a_classifier_has_loss_gradient_and_accuracy(tmp_path, noised):
    train(tiny_classifier(tmp_path, task__noised=noised, trainer__max_steps=3, **LOOKING))
    assert columns(tmp_path) == {"step", "t", "alpha", "sigma", "loss", "grad_norm", "accuracy"}
    assert (read(tmp_path)["t"].nunique() > 1) == noised


def test_a_compiled_network_is_heard_and_looked_at_uncompiled(tmp_path, monkeypatch):
    """Without waiting for a compiler: what is called in its place counts its calls."""
    calls = []

    def compiled(net):
        def called(*args, **kwargs):
            calls.append(len(args[0]))
            return net._call_impl(*args, **kwargs)

        net._compiled_call_impl = called

    monkeypatch.setattr(nn.Module, "compile", compiled)
    task = {"task__compile": True, "task___target_": "hint_cases.OffByOne"}
    train(short(tmp_path, trainer__max_steps=8, **task))
    assert calls == [64] * 8
    assert [hint["name"] for hint in read_hints(tmp_path)] == ["timestep off by one"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", {"_target_": "diffusion.training.sharded.Sharded"}], ids=["ddp", "fsdp"])
def test_two_processes_look_once_and_never_wait_for_each_other_in_vain(tmp_path, strategy):
    two = {"trainer__devices": 2, "trainer__strategy": strategy, "data__batch_size": 32, "trainer__max_steps": 4}
    run_ranks([short(tmp_path / "run", **two, **LOOKING)], tmp_path / "configs.json")
    assert read_hints(tmp_path / "run") == []
    assert columns(tmp_path / "run") == (DENOISER if strategy == "ddp" else DENOISER - {"grad_norm"})
    assert read(tmp_path / "run")["step"].value_counts().to_dict() == {0: 6, 3: 6, 4: 6}


@pytest.mark.parametrize(("name", "value"), [("every_n_steps", 0), ("num_images", 1), ("num_timesteps", 1)])
def test_settings_that_look_at_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"callbacks\.microscope\.{name} must be at least"):
        microscope.Microscope(data=None, config={}, **{name: value})


def test_a_task_without_timesteps_is_refused():
    with pytest.raises(ValueError, match=r"AutoencoderTask has no timesteps to look at; .* callbacks\.microscope=null"):
        microscope.Microscope(data=None, config={}).on_train_start(None, AutoencoderTask.__new__(AutoencoderTask))


# ---------------------------------------------------------------------------------------------------------------------
# reading


def test_a_folder_that_saw_nothing_has_no_rows(tmp_path):
    assert list(read(tmp_path).columns) == list(COLUMNS) and not len(read(tmp_path))
    assert read_hints(tmp_path) == []


@pytest.mark.parametrize("text", ["", "step,t\n", "nonsense", "step,t,loss\n5,0,0.1\n5,10,0.", "\x00\x01\n"])
def test_what_a_kill_left_is_read_as_far_as_it_goes(tmp_path, text):
    (tmp_path / "microscope.csv").write_text(text)
    (tmp_path / "hints.yaml").write_text("- [")
    table = read(tmp_path)
    assert table["loss"].tolist() == ([0.1] if "0.1" in text else [])
    assert isinstance(table, pd.DataFrame) and read_hints(tmp_path) == []

"""Is each classic bug told, where it is planted in a real run, and is a healthy run left in peace?"""

import copy

import pytest
import torch
import yaml
from hint_cases import SMALL_NET, short
from latent_cases import NODE
from rank_cases import run_ranks
from test_latent_denoiser import random_autoencoder
from tiny import facts

from diffusion.checkpoint import save_model
from diffusion.report.hints import RULES, hints_of
from diffusion.report.microscope import read_hints
from diffusion.training.latent_scale import measure_scale, training_images
from diffusion.training.run import build, train

TASK, KIND = "task___target_", "diffusion__parameterization"
FEW = {"trainer__max_steps": 8}  # for what can be seen before anything is learnt


def names(run_dir):
    return [hint["name"] for hint in read_hints(run_dir)]


def hinted(tmp_path, **changes):
    train(short(tmp_path, **changes))
    return names(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# planted in runs

PLANTED = {
    "data in 0..1": {"data___target_": "hint_cases.Digits01", **FEW},
    "data in 0..255": {"data___target_": "hint_cases.Digits255", **FEW},
    "timestep off by one": {TASK: "hint_cases.OffByOne", **FEW},
    "schedule wrong": {TASK: "hint_cases.WrongBetas", **FEW},
    "condition never dropped": {TASK: "hint_cases.NeverDrops", **FEW},
    "EMA frozen": {"ema___target_": "hint_cases.FrozenEMA", **FEW},
    "eps read as v": {TASK: "hint_cases.LearnsEps", KIND: "v"},
}
CONFUSED = {
    "v read as eps": {TASK: "hint_cases.LearnsV"},
    "x0 read as eps": {TASK: "hint_cases.LearnsX0"},
    "eps read as x0": {TASK: "hint_cases.LearnsEps", KIND: "x0"},
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_told_and_nothing_else(tmp_path, bug, capsys):
    assert hinted(tmp_path, **PLANTED[bug]) == [bug]
    said = capsys.readouterr().err
    assert said.count(f"hint at step {read_hints(tmp_path)[0]['since']}: {bug}: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("bug", CONFUSED)
def test_every_confusion_of_what_the_network_answers_is_told(tmp_path, bug):
    assert hinted(tmp_path, **CONFUSED[bug]) == [bug]


@pytest.mark.parametrize("kind", ["v", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("eps", "x0"))])
def test_a_healthy_twin_gets_no_hint(tmp_path, kind, capsys):
    assert hinted(tmp_path, **{KIND: kind}, callbacks__microscope__every_n_steps=30) == []
    assert "hint" not in capsys.readouterr().err


def test_an_average_that_is_never_called_is_frozen_too(tmp_path):
    assert hinted(tmp_path, ema___target_="hint_cases.ForgottenEMA", **FEW) == ["EMA frozen"]


def test_a_condition_that_is_kept_on_purpose_is_a_hint_only_where_guidance_is_asked_for(tmp_path):
    kept = {"task__condition_drop": 0.0, **FEW}
    assert hinted(tmp_path / "guided", **kept) == ["condition never dropped"]
    assert "guidance_scale=2" in read_hints(tmp_path / "guided")[0]["seen"]
    plain = {"_target_": "diffusion.guidance.NoGuidance"}
    assert hinted(tmp_path / "plain", guidance=plain, **kept) == []


def test_one_timestep_off_is_seen_on_the_usual_long_chain(tmp_path):
    assert hinted(tmp_path, timesteps=1000, **{TASK: "hint_cases.OffByOne"}, trainer__max_steps=40) == [
        "timestep off by one"
    ]


def test_a_config_whose_process_is_not_the_tasks_is_told(tmp_path):
    """What model.safetensors would say of the network beside what it learnt."""
    assert hinted(tmp_path, **{TASK: "hint_cases.OwnSchedule"}, **FEW) == ["schedule wrong"]
    assert "the one in the config" in read_hints(tmp_path)[0]["seen"]


def test_betas_that_leave_half_of_the_image_at_the_end_are_told(tmp_path):
    betas = {"_target_": "diffusion.schedule.linear", "num_train_timesteps": 100, "reference_steps": None}
    assert hinted(tmp_path, schedule=betas, diffusion__schedule=betas, **FEW) == ["schedule wrong"]
    assert "at the last timestep 0.6" in read_hints(tmp_path)[0]["seen"]


@pytest.fixture(scope="module")
def right_scale():
    """What gives the digits' latents of the tests' autoencoder unit variance."""
    data = build({"_target_": "diffusion.data.digits.Digits", "batch_size": 64})
    return measure_scale(small_autoencoder(1.0), training_images(data), num_images=200)[0]


def small_autoencoder(scale):
    """An untrained autoencoder whose latents are nearly certain, as those of trained ones are."""
    model = random_autoencoder(scale_factor=scale, shift=0.0)
    with torch.no_grad():
        model.to_latent.bias[NODE["latent_channels"] :] -= 10  # the log-variance
    return model


def latent_run(folder, scale, **changes):
    """A run on latents, encoded in each step unless there is a cache."""
    config = {"net": None, "diffusion": None, "autoencoder": {**NODE, "scale_factor": scale, "shift": 0.0}}
    file, about = folder / "autoencoder.safetensors", facts(shape=[1, 8, 8], condition_drop=0.0)
    save_model(file, small_autoencoder(scale), config, weights="raw", step=1, facts=about)
    parts = {
        "autoencoder": {"_target_": "diffusion.checkpoint.load_autoencoder", "checkpoint": str(file)},
        "net": {**SMALL_NET, "in_channels": NODE["latent_channels"], "out_channels": NODE["latent_channels"]},
    }
    return short(folder / "run", **parts, **changes)


@pytest.mark.parametrize(("times", "expected"), [(1, []), (5.5, ["latents unscaled"]), (0.18, ["latents unscaled"])])
def test_latents_are_told_apart_by_their_scale(tmp_path, right_scale, times, expected):
    train(latent_run(tmp_path, times * right_scale, **FEW))
    assert names(tmp_path / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_one_timestep_off_is_seen_in_latents_too(tmp_path, right_scale, cached):
    settings = {"trainer__max_steps": 30} | ({"latent_cache": str(tmp_path / "cache")} if cached else {})
    train(latent_run(tmp_path, right_scale, **{TASK: "hint_cases.OffByOne"}, **settings))
    assert names(tmp_path / "run") == ["timestep off by one"]


@pytest.mark.slow
def test_ranks_that_draw_the_same_noise_are_told_and_others_are_not(tmp_path):
    two = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 32, **FEW}
    bad = short(tmp_path / "bad", **{TASK: "hint_cases.SameDraws"}, **two)
    run_ranks([bad, short(tmp_path / "good", **two)], tmp_path / "configs.json")
    assert names(tmp_path / "bad") == ["the same noise on all ranks"]
    assert names(tmp_path / "good") == []


SCHEDULES = ["linear", "cosine", "sigmoid", "scaled_linear", "zero_snr"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_healthy_runs_on_every_schedule_get_no_hint_at_any_time(tmp_path, schedule):
    node = {"_target_": f"diffusion.schedule.{schedule}", "num_train_timesteps": 1000}
    if schedule == "zero_snr":
        inner = {"_target_": "diffusion.schedule.scaled_linear", "num_train_timesteps": 1000}
        node = {"_target_": "diffusion.schedule.zero_terminal_snr", "schedule": inner}
    for kind in ("v", "x0") if schedule == "zero_snr" else ("eps", "v", "x0"):
        settings = {
            "schedule": node,
            "diffusion__schedule": node,
            KIND: kind,
            "callbacks__microscope__every_n_steps": 5,
        }
        assert hinted(tmp_path / kind, timesteps=1000, trainer__max_steps=40, **settings) == []


# ---------------------------------------------------------------------------------------------------------------------
# rules

ROW = {"t": 50, "alpha": 0.5, "sigma": 0.87, "mse": 0.2, "mse_null": 0.25, "mse_ema": 0.2}
HEALTHY = {
    "step": 500,
    "latents": False,
    "data": {"validation": {"low": -1.0, "high": 1.0, "mean": -0.4, "std": 0.75}},
    "schedule": {"num_train_timesteps": 1000, "first_sigma": 0.01, "last_alpha": 0.006, "dead": 0.04},
    "inputs": {
        "samples": 500,
        "offsets": [-2, -1, 0, 1, 2],
        "likelihoods": [-900.0, -300.0, 0.0, -200.0, -700.0],
        "ratios": [1.0] * 8,
        "counts": [500] * 8,
    },
    "ema": {"decay": 0.99, "updates": 500, "weights_moved": 1.0, "average_moved": 0.9, "initial_share": 0.0},
    "condition": {"drop": 0.1, "guidance_scale": 2.0, "samples": 9000, "dropped": 900, "null": True},
    "parameterization": "v",
    "exported": {
        "parameterization": "v",
        "num_train_timesteps": 1000,
        "away": 0.0,
        "away_at": 0,
        "time_scale": 1.0,
    },
    "ranks": {"world_size": 2, "samples": 16, "same_timesteps": 0.06, "noise_correlation": 0.03},
    "curve": [{**ROW, "eps_error": 1.1, "x0_error": 2.9, "v_error": 0.3}],
}


def look(**changes):
    """A healthy look with changes by dotted keys, `__` for the dot."""
    found = copy.deepcopy(HEALTHY)
    for key, value in changes.items():
        *path, leaf = key.split("__")
        node = found
        for part in path:
            node = node[part]
        node[leaf] = value
    return found


def told(**changes):
    return [hint.name for hint in hints_of(look(**changes))]


def test_a_healthy_look_gives_no_hint():
    assert told() == []


@pytest.mark.parametrize("missing", ["inputs", "ema", "condition", "exported", "ranks"])
def test_what_was_not_measured_gives_no_hint(missing):
    assert told(**{missing: None}) == []
    assert told(curve=[]) == []


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"data__validation__low": 0.0}, "data in 0..1"),
        ({"data__validation__low": -2.1, "data__validation__high": 2.6}, "data beyond -1..1"),
        ({"latents": True, "data__validation__std": 5.5}, "latents unscaled"),
        ({"inputs__likelihoods": [0.0, 40.0, 0.0, -9.0, -9.0]}, "timestep off by one"),
        ({"inputs__ratios": [1.0] * 6 + [0.7, 0.6]}, "schedule wrong"),
        ({"schedule__last_alpha": 0.4}, "schedule wrong"),
        ({"schedule__dead": 0.5}, "schedule wrong"),
        ({"schedule__first_sigma": 0.5}, "schedule wrong"),
        ({"exported__away": 0.1}, "schedule wrong"),
        ({"exported__time_scale": 4.0}, "schedule wrong"),
        ({"exported__parameterization": "eps"}, "v read as eps"),
        ({"condition__dropped": 0}, "condition never dropped"),
        ({"condition__null": False}, "condition never dropped"),
        ({"ranks__noise_correlation": 0.99}, "the same noise on all ranks"),
        ({"ranks__noise_correlation": None, "ranks__same_timesteps": 1.0}, "the same noise on all ranks"),
        ({"ema__average_moved": 0.0}, "EMA frozen"),
        ({"ema__initial_share": 0.9}, "EMA too slow"),
    ],
)
def test_each_rule_tells_what_it_is_for(changes, hint):
    (found,) = hints_of(look(**changes))
    assert found.name == hint
    assert all(text and not text.endswith(".") for text in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__validation__low": -0.05},  # a bright photograph has a dark pixel
        {"latents": True, "data__validation__std": 0.6},
        {"schedule__last_alpha": 0.068},  # Stable Diffusion
        {"inputs__likelihoods": [0.0, 5.0, 0.0, -9.0, -9.0]},  # too few samples to be certain
        {"inputs__likelihoods": [400.0, 200.0, 0.0, -200.0, -400.0]},  # two off or more: no neighbour is right
        {"inputs__ratios": [0.7] + [1.0] * 7},  # a part with few timesteps
        {"condition__samples": 100, "condition__dropped": 0},  # happens to one run in 40,000
        {"condition__drop": 0.0, "condition__dropped": 0, "condition__guidance_scale": 1.0},
        {"ema__initial_share": 0.9, "ema__updates": 20},  # a trial
        {"ema__average_moved": 0.0, "ema__weights_moved": 0.0},  # nothing was trained
        {"curve": [{**ROW, "eps_error": 1.0, "x0_error": 1.0, "v_error": 1.0}]},  # answers 0, as at the start
        {"ranks__noise_correlation": None, "ranks__same_timesteps": 1.0, "ranks__samples": 1},
    ],
)
def test_what_only_looks_like_a_bug_is_left_in_peace(changes):
    assert told(**changes) == []


def test_every_rule_says_what_it_looks_for():
    assert all(rule.__doc__ for rule in RULES)


def test_hints_remember_when_they_began_and_when_they_were_last_seen(tmp_path):
    train(short(tmp_path, callbacks__microscope__every_n_steps=4, **PLANTED["data in 0..1"]))
    (hint,) = yaml.safe_load((tmp_path / "hints.yaml").read_text())
    assert (hint["since"], hint["until"]) == (0, 8)

"""Several processes write what one writes, also when they are killed and start again, and no failure hangs."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from latent_cases import NODE
from PIL import Image
from process_cases import STARTERS, Job, command, last_words, outcome, sampled, slurm, words
from tiny import DIFFUSION, ROOT, facts, save_tiny

import diffusion.generate
import diffusion.processes
import diffusion.sample_folder
import diffusion.sample_parts
from diffusion.checkpoint import Part, build, load_model, save_model
from diffusion.generate import batches, whole
from diffusion.guidance import NoGuidance
from diffusion.processes import Team, surroundings, together
from diffusion.sampling import Sampler

DIGITS = ROOT / "checkpoints" / "digits.safetensors"
KILLS = int(os.environ.get("DIFFUSION_KILLS", "4"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model.safetensors")


# -- what several processes write --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Seventy digits of one process in batches of 64."""
    folder = tmp_path_factory.mktemp("digits")
    return sampled(folder / "job", words(DIGITS, folder / "out", "num_samples=70", "seed=3"))


@pytest.mark.parametrize(("size", "batch_size"), [(2, 1), (2, 7), (2, 64), (3, 64), (1, 7)])
def test_processes_and_batch_sizes_change_no_byte(tmp_path, digits, size, batch_size):
    arguments = words(DIGITS, tmp_path / "out", "num_samples=70", "seed=3", f"batch_size={batch_size}")
    ours = sampled(tmp_path / "job", arguments, size=size)
    assert ours.keys() == digits.keys() and "parts" not in ours and len(ours) == 74
    for name, content in digits.items():
        assert ours[name] == content, name


@pytest.mark.slow
def test_slurms_variables_start_the_same_team(tmp_path, digits):
    arguments = words(DIGITS, tmp_path / "out", "num_samples=70", "seed=3", "batch_size=16")
    assert sampled(tmp_path / "job", arguments, size=2, starter=slurm) == digits


def test_each_batch_is_drawn_once_by_whoever_is_free(checkpoint, tmp_path, monkeypatch):
    save = diffusion.sample_folder.save_pictures

    def noted(*args, first, **how):
        time.sleep(0.1 if os.environ["RANK"] == "0" else 0.01)
        (tmp_path / f"{first}-{os.environ['RANK']}").touch()
        save(*args, first=first, **how)

    monkeypatch.setattr(diffusion.sample_folder, "save_pictures", noted)
    sampled(tmp_path / "job", words(checkpoint, tmp_path / "out", "num_samples=60", "batch_size=4", "pad_to=4"), size=2)
    drawn = sorted(tuple(map(int, path.name.split("-"))) for path in tmp_path.glob("*-?"))
    assert [first for first, _ in drawn] == list(range(0, 60, 4))
    assert sum(rank for _, rank in drawn) > 15 / 2 and any(rank == 0 for _, rank in drawn)


TEXT = {
    "_target_": "diffusion.conditioning.TextConditioner",
    "encoder": {
        "_target_": "diffusion.models.text.TextTransformer",
        "vocab_size": 1024,
        "channels": 16,
        "num_layers": 1,
        "num_heads": 2,
        "max_length": 12,
        "activation": "gelu",
    },
}
IMAGE = {
    "_target_": "diffusion.conditioning.ImageConditioner",
    "encoder": {
        "_target_": "diffusion.models.vision.PatchEncoder",
        "image_size": 8,
        "patch_size": 4,
        "in_channels": 1,
        "channels": 16,
        "num_layers": 1,
        "num_heads": 2,
    },
}


def save_everything(path):
    """A denoiser of latents that listens to labels, captions and images."""
    net = {
        "_target_": "diffusion.models.unet.UNet",
        "in_channels": 2,
        "out_channels": 2,
        "channels": 8,
        "norm_groups": 4,
        "num_heads": 2,
        "num_classes": 10,
        "context_channels": 16,
        "stages": [{"depth": 1, "attention": "cross"}],
    }
    joint = {"_target_": "diffusion.conditioning.JointConditioner", "conditioners": [TEXT, IMAGE]}
    config = {"net": net, "diffusion": DIFFUSION}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            name: Part(module=build(node), config=node)
            for name, node in (("autoencoder", NODE), ("conditioner", joint))
        }
        built = build(net)
        for weight in built.parameters():  # those that are zero when training begins, too
            torch.nn.init.normal_(weight, std=0.2)
    save_model(path, built, config, weights="raw", step=1, facts=facts(), parts=parts)
    return path


@pytest.mark.slow
def test_latents_labels_prompts_and_images_reach_the_sample_that_they_are_for(tmp_path):
    model = save_everything(tmp_path / "model.safetensors")
    for i in range(3):
        Image.fromarray(np.full((8, 8), 90 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    asked = [
        "labels=[3,1,4,1,5]",
        'prompt=["a red star","two blue rings"]',
        'negative_prompt=["a ring","a red star","nothing"]',
        f"condition_image=[{','.join(str(tmp_path / f'{i}.png') for i in range(3))}]",
        *("pad_to=4", "num_samples=22", "sampler=ddpm"),
    ]
    one = sampled(tmp_path / "job", words(model, tmp_path / "one", *asked))
    two = sampled(tmp_path / "job", words(model, tmp_path / "two", *asked, "batch_size=1"), size=2)
    assert two == one
    said = one["images/000007.png"][1]
    assert (said["seed"], said["label"], said["prompt"]) == (7, 4, "two blue rings")
    images = np.load(tmp_path / "one" / "samples.npz")["arr_0"]
    assert len(np.unique(images.reshape(22, -1), axis=0)) == 22
    for changed in (
        "labels=[3]",
        "prompt=a red star",
        "negative_prompt=a ring",
        f"condition_image={tmp_path / '0.png'}",
    ):
        line = last_words(*words(model, tmp_path / changed[:6], *asked), changed, "num_samples=8")
        other = sampled(tmp_path / "job", line)
        assert other["images/000007.png"][0] != one["images/000007.png"][0], changed


def test_any_choice_of_batches_draws_what_all_would(checkpoint):
    model = load_model(checkpoint)
    draw = partial(
        *(batches, model.net, model.diffusion, Sampler(num_steps=2), NoGuidance()),
        num_samples=11,
        batch_size=3,
        pad_to=2,
        labels=[i % 10 for i in range(11)],
        shape=(1, 8, 8),
    )
    assert whole(3, 2) == 4 and whole(4, 2) == 4 and whole(1, 16) == 16
    everything = list(draw())
    assert [len(batch.seeds) for batch in everything] == [4, 4, 3]
    counted = []
    for batch, number in zip(draw(numbers=[2, 0], on_step=counted.append), [2, 0], strict=True):
        assert batch.seeds == everything[number].seeds and batch.labels == everything[number].labels
        assert torch.equal(batch.images, everything[number].images)
    assert counted == [3, 3, 4, 4]


# -- the end of one ----------------------------------------------------------------------------------------------------

MANY = ("num_samples=64", "batch_size=4", "pad_to=4")


def slowly(monkeypatch, seconds=0.04):
    """Leave time to be killed; the processes that are forked from this one inherit it."""
    save = diffusion.sample_folder.save_pictures
    monkeypatch.setattr(
        diffusion.sample_folder, "save_pictures", lambda *args, **how: time.sleep(seconds) or save(*args, **how)
    )


def wait_for_parts(out_dir, count=1):
    """Wait until so many batches are done."""
    end = time.monotonic() + 60
    while len(list((out_dir / "parts").glob("[0-9]*.npy"))) < count:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def many(checkpoint, tmp_path_factory):
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("many")
    return sampled(folder / "job", words(checkpoint, folder / "out", *MANY))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bytes(
    checkpoint, tmp_path, monkeypatch, many, size, number
):
    arguments = words(checkpoint, tmp_path / "out", *MANY)
    slowly(monkeypatch)
    draws = random.Random(f"{size} {number}")
    for attempt in range(2):
        job = Job(tmp_path / f"killed-{attempt}", size, command(arguments))
        if number % 4:  # every fourth kill may come before sampling has begun
            wait_for_parts(tmp_path / "out", draws.randrange(1, 7 * (attempt + 1)))
        time.sleep(draws.uniform(0, 0.1 if number % 4 else 1.5))
        for process in job.processes:
            process.kill()
        job.wait()
    print(f"killed with {len(list((tmp_path / 'out' / 'parts').glob('[0-9]*.npy')))} of 16 batches")
    finished = (tmp_path / "out" / "samples.npz").exists() and not (tmp_path / "out" / "parts/settings.json").exists()
    left = outcome(tmp_path / "out") if finished else sampled(tmp_path / "job", arguments, size=3 - size)
    assert {name: content for name, content in left.items() if "parts" not in name} == many


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_others_with_one_error(checkpoint, tmp_path, monkeypatch, many, victim):
    monkeypatch.setattr(diffusion.processes, "PATIENCE", 1.0)
    arguments = words(checkpoint, tmp_path / "out", *MANY)
    slowly(monkeypatch)
    job = Job(tmp_path / "job", 3, command(arguments))
    wait_for_parts(tmp_path / "out", 3)
    job.processes[victim].kill()
    statuses, printed = job.wait()
    assert [status for rank, status in enumerate(statuses) if rank != victim] == [2, 2]
    assert printed.count("error:") == 1 and "ended without a word" in printed and "Traceback" not in printed
    assert len(list((tmp_path / "out" / "parts").glob("*.npy"))) < 16  # nobody worked on for nothing
    assert sampled(tmp_path / "again", arguments, size=2) == many


def fail_in(rank, error, monkeypatch):
    """Let the third batch of one process fail."""
    save, calls = diffusion.sample_folder.save_pictures, []

    def failing(*args, **kwargs):
        calls.append(None)
        if os.environ.get("RANK") == str(rank) and len(calls) == 3:
            raise error
        save(*args, **kwargs)

    monkeypatch.setattr(diffusion.sample_folder, "save_pictures", failing)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_others_and_speaks_alone(checkpoint, tmp_path, monkeypatch, rank):
    fail_in(rank, OSError(28, "No space left on device"), monkeypatch)
    slowly(monkeypatch, 0.02)
    statuses, printed = Job(tmp_path / "job", 2, command(words(checkpoint, tmp_path / "out", *MANY))).wait()
    assert statuses == [2, 2]
    assert printed.count("error:") == 1 and "error: No space left on device" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_a_failure_that_nobody_foresaw_shows_its_traceback_once(checkpoint, tmp_path, monkeypatch):
    fail_in(1, ZeroDivisionError("by zero"), monkeypatch)
    slowly(monkeypatch, 0.02)
    statuses, printed = Job(tmp_path / "job", 2, command(words(checkpoint, tmp_path / "out", *MANY))).wait()
    assert statuses == [2, 1]
    assert printed.count("ZeroDivisionError: by zero") == 1 and "error: " not in printed


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("labels=[99]", "labels=[99] must be whole numbers from 0 to 9"),
        ("num_samples=three", "num_samples=three does not fit"),
        ("devices=2", "2 processes were started already; leave devices out"),
    ],
)
def test_a_mistake_that_all_processes_see_is_told_once(checkpoint, tmp_path, mistake, said):
    statuses, printed = Job(tmp_path / "job", 2, command([*words(checkpoint, tmp_path / "out"), mistake])).wait()
    assert statuses == [2, 2]
    assert printed.count("error:") == 1 and said in printed, printed
    assert not (tmp_path / "out" / "parts" / "settings.json").exists()


def test_warnings_and_results_are_said_once(tmp_path):
    model = save_tiny(tmp_path / "model.safetensors", about=facts(condition_drop=0.0))
    statuses, printed = Job(tmp_path / "job", 3, command(words(model, tmp_path / "out", "num_samples=20"))).wait()
    assert statuses == [0, 0, 0]
    assert printed.count("trained without condition drop") == 1
    assert printed.count("batches of 64 make 1 for 3 processes") == 1 and "a batch_size of at most 7" in printed
    assert printed.count(f"{tmp_path / 'out'}\n") == 1 and printed.count("sampled 20/20 images") == 1


@pytest.mark.parametrize(
    ("name", "status", "size"),
    [("SIGINT", 130, 1), ("SIGTERM", 143, 2), pytest.param("SIGUSR1", 138, 2, marks=pytest.mark.slow)],
)
def test_a_signal_stops_all_and_one_says_how_to_go_on(checkpoint, tmp_path, monkeypatch, many, name, status, size):
    arguments = words(checkpoint, tmp_path / "out", *MANY)
    slowly(monkeypatch)
    job = Job(tmp_path / "job", size, command(arguments))
    wait_for_parts(tmp_path / "out", 4)
    for process in job.processes[-1:] if name == "SIGTERM" else job.processes:
        os.kill(process.pid, getattr(signal, name))
    statuses, printed = job.wait()
    assert statuses[-1] == status and all(other in (status, 2) for other in statuses), printed
    assert printed.count("to go on: ") == 1 and "error:" not in printed and "Traceback" not in printed, printed
    typed = shlex.split(printed.partition("to go on: ")[2].splitlines()[0])
    assert typed[0] == "sample.py" and sorted(typed[1:]) == sorted(arguments)
    assert sampled(tmp_path / "again", typed[1:], size=3 - size) == many


def test_processes_that_do_not_come_are_waited_for_only_so_long(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion.processes, "MEETING", timedelta(seconds=1))
    job = Job(tmp_path / "job", 2, lambda: time.sleep(3) if os.environ["RANK"] == "1" else lonely(tmp_path, checkpoint))
    statuses, printed = job.wait()
    assert statuses == [2, 0] and "the 2 processes of this job did not find each other" in printed


def lonely(folder, checkpoint):
    command(words(checkpoint, folder / "out"))()


@pytest.mark.slow
def test_two_runs_do_not_write_into_one_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion.sample_parts, "PATIENCE", 0.3)
    arguments = words(checkpoint, tmp_path / "out", *MANY)
    slowly(monkeypatch, 0.1)
    first = Job(tmp_path / "first", 1, command(arguments))
    wait_for_parts(tmp_path / "out")
    statuses, printed = Job(tmp_path / "second", 1, command(arguments)).wait()
    assert statuses == [2] and f"another run writes in {tmp_path / 'out'}" in printed
    assert first.wait()[0] == [0]


def test_a_run_that_waited_for_another_finds_its_samples(checkpoint, tmp_path, monkeypatch):
    arguments = words(checkpoint, tmp_path / "out", *MANY)
    slowly(monkeypatch)
    first = Job(tmp_path / "first", 1, command(arguments))
    wait_for_parts(tmp_path / "out")
    statuses, printed = Job(tmp_path / "second", 1, command(arguments)).wait()
    assert statuses == [2] and "waiting for another run" in printed and "already holds samples" in printed
    assert first.wait()[0] == [0]


# -- who starts the processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "team"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, (0, 1, 0)),  # a shell
        ({"SLURM_NTASKS": "8"}, (0, 1, 0)),  # an allocation, but no task of it
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2, 1)),  # torchrun in a job
    ],
)
def test_the_team_is_what_torchrun_or_slurm_says(monkeypatch, variables, team):
    for name in STARTERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = surroundings()
    assert (found.rank, found.size, found.local_rank) == team


def test_a_rank_outside_the_team_is_refused():
    with pytest.raises(ValueError, match="process 3 of 2 cannot be"):
        Team(3, 2)
    with pytest.raises(ValueError, match="devices is a number of processes, at least 1; got 0"):
        together(print, None, devices=0)


def start(*arguments):
    """Type a command."""
    variables = {name: value for name, value in os.environ.items() if name not in STARTERS}
    typed = [sys.executable, str(ROOT / "sample.py"), *arguments]
    return subprocess.Popen(
        typed,
        env=variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )


@pytest.mark.slow
def test_devices_starts_processes_of_its_own(tmp_path, digits):
    process = start(*words(DIGITS, tmp_path / "out", "num_samples=70", "seed=3", "batch_size=16", "devices=2"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == f"{tmp_path / 'out'}\n" and err.count("sampled 70/70 images") == 1
    assert outcome(tmp_path / "out") == digits


def children(pid):
    """The numbers of the Python processes that a process has started."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "child"])
def test_devices_killed_at_a_random_moment_end_with_the_same_bytes(checkpoint, tmp_path, victim):
    line = words(checkpoint, tmp_path / "out", "num_samples=400", "batch_size=4", "pad_to=4", "save_images=false")
    process = start(*line, "devices=2")
    wait_for_parts(tmp_path / "out", random.Random(victim).randrange(1, 40))
    started = children(process.pid)
    assert len(started) == 2
    os.kill(process.pid if victim == "parent" else started[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    if victim == "child":
        assert process.returncode == 2 and err.count("error:") == 1 and "process 1 of 2 was ended by SIGKILL" in err
    process = start(*line, "devices=2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on after" in err
    whole_run = words(checkpoint, tmp_path / "whole", "num_samples=400", "save_images=false")
    assert sampled(tmp_path / "job", whole_run)["samples.npz"] == (tmp_path / "out" / "samples.npz").read_bytes()


@pytest.mark.slow
def test_one_signal_to_the_parent_stops_its_processes(checkpoint, tmp_path):
    line = words(checkpoint, tmp_path / "out", "num_samples=8000", "batch_size=4", "pad_to=4", "save_images=false")
    process = start(*line, "devices=2")
    wait_for_parts(tmp_path / "out", 2)
    started = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("to go on: ") == 1 and "Traceback" not in err, err
    assert "devices=2" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in started)


@pytest.mark.slow
def test_an_error_in_a_started_process_is_one_line(checkpoint, tmp_path):
    process = start(*words(checkpoint, tmp_path / "out", "labels=[99]", "devices=2"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1 and "error: labels=[99] must be" in err

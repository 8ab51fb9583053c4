"""Does a run that was killed at random moments end with the same bits? Real processes, real SIGKILL.

`DIFFUSION_KILLS=50 pytest tests/test_kill_resume.py` for the full measurement: so many kills, the ways to train in
turn. Every step writes a checkpoint of some megabytes, so that many kills hit one half way.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import assert_same_outcome, tiny

from diffusion.run_folder import read_status
from diffusion.training.checkpoint_files import candidates, read_checkpoint

KILLS = int(os.environ.get("DIFFUSION_KILLS", "4"))
STEPS = 24
LARGE = {
    "net___target_": "training_cases.Memory",
    "net__width": 512,
    "trainer__max_steps": STEPS,
    "trainer__val_check_interval": 10,
    "callbacks__checkpoints__every_n_steps": 1,
    "callbacks__checkpoints__keep_every_n_steps": 10,
    "callbacks__checkpoints__best": "val/loss_ema",
    "callbacks__samples__every_n_steps": 8,
}
WAYS = {
    "plain": {},
    "workers": {"data__num_workers": 2},
    "accumulated": {"trainer__accumulate_grad_batches": 2, "data__batch_size": 100},
    "ddp": {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 100},
}
TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, str(TESTS / "run_tiny.py")]


class Forked:
    """A run in a child of a process that has everything imported."""

    def __init__(self, server, config, messages):
        self.server, self.messages, self.status = server, messages, None
        server.stdin.write(f"{messages} {json.dumps(config)}\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def wait(self):
        """Return the exit status, or minus the signal."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return self.status


class Alone:
    """A run in an interpreter of its own, as a user starts it; it starts its other ranks."""

    def __init__(self, config, messages):
        self.messages = messages
        with open(messages, "a") as file:
            command = [*COMMAND, json.dumps(config)]
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file, process_group=0)

    def send_signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        """Return the exit status, or minus the signal."""
        return self.process.wait()


@pytest.fixture(scope="module")
def start():
    """Start a run: `start(way, run_dir)`, the same each time; `alone` as a user does, which takes longer."""
    servers = []

    def begin(way, run_dir, *, alone=False):
        config, messages = tiny(run_dir, **{**LARGE, **WAYS[way]}), run_dir.parent / f"{run_dir.name}.log"
        if alone:
            return Alone(config, messages)
        if not servers:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            servers.append(subprocess.Popen(COMMAND, env=ENVIRONMENT, **pipes))
        return Forked(servers[0], config, messages)

    yield begin
    for server in servers:
        with server:
            server.stdin.close()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Runs that nothing interrupted, each made once: `whole(way)` gives folder and seconds of training."""
    made = {}

    def run(way):
        if way not in made:
            run_dir = tmp_path_factory.mktemp(way) / "whole"
            process = start(way, run_dir)
            wait_for_training(process, run_dir)
            begun = time.monotonic()
            assert process.wait() == 0, process.messages.read_text()
            made[way] = run_dir, time.monotonic() - begun
        return made[way]

    return run


def wait_for_training(process, run_dir):
    """Wait until this start of the run is about to take its first step, or has ended."""
    while not (run_dir / "metrics.csv").exists() and not (run_dir / "checkpoints").exists():
        if (status := read_status(run_dir)) is not None and status.state in ("failed", "finished"):
            return
        time.sleep(0.005)


def wait_for_step(run_dir, step):
    """Wait until a checkpoint of this step is there, or a later one; None: until the folder is."""
    while True:
        status = read_status(run_dir)
        if status is not None and (step is None or (status.step or 0) >= step):
            return
        time.sleep(0.002)


def usable(run_dir):
    """Return the step of the newest checkpoint; all that there are must be readable."""
    steps = [read_checkpoint(path)["global_step"] for path in candidates(run_dir)]
    return steps[0] if steps else None


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(tmp_path, start, whole, number):
    way = list(WAYS)[number % len(WAYS)]
    run_dir, (model, seconds) = tmp_path / "run", whole(way)
    process = start(way, run_dir)
    at = random.randrange(STEPS - 1) if number % 5 else None  # every fifth kill may come before training has begun
    wait_for_step(run_dir, at)
    time.sleep(random.uniform(0, seconds / STEPS))
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    step = usable(run_dir)
    writing = [path.name for path in run_dir.rglob(".*") if "partial" in path.name or ".new" in path.name]
    state = read_status(run_dir) and read_status(run_dir).state
    assert not killed or state in (None, "killed", "finished")
    process = start(way, run_dir)
    assert process.wait() == 0, process.messages.read_text()
    assert read_status(run_dir)[:3] == ("finished", STEPS, STEPS)
    assert usable(run_dir) == STEPS
    assert_same_outcome(model, run_dir)
    print(f"{way}: killed={killed} with a checkpoint of step {step} of {STEPS}, while writing {writing}: equal")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "number", "status"), [("workers", "SIGINT", 130), ("ddp", "SIGTERM", 143)])
def test_a_signal_ends_the_process_with_its_status_and_the_same_command_goes_on(
    tmp_path, start, whole, way, number, status
):
    run_dir = tmp_path / "run"
    process = start(way, run_dir, alone=True)
    wait_for_training(process, run_dir)
    process.send_signal(getattr(signal, number))
    messages = process.messages
    assert process.wait() == status, messages.read_text()
    assert "to go on:" in messages.read_text()
    assert f"run_dir={run_dir}" in messages.read_text()
    assert "Traceback" not in messages.read_text()
    assert read_status(run_dir).state == "preempted"
    assert 0 < usable(run_dir) < STEPS
    process = start(way, run_dir)
    assert process.wait() == 0, messages.read_text()
    assert_same_outcome(whole(way)[0], run_dir)
